"""The catalogue's mistakes, made with a checkpoint as a buggy converter makes them: in plain loops, knowing nothing of the diagnosis.

A fault changes a ``Victim`` in place. What it needs of a model to be a mistake at all (a query head for each key head is no grouping)
is part of it: ``needs`` says no, or ``prepare`` gives the source what it lacks (a value beyond float16's range).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma2tool.model.checkpoint import Assets, Checkpoint
from gemma2tool.model.config import FULL, SLIDING, Gemma2Config
from gemma2tool.model.lazy import ArrayTensor

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER = "model.layers.{}."
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass
class Victim:
    """A checkpoint in memory. ``stored``: quantized types of arrays that are already what decoding them gives."""

    config: Gemma2Config
    arrays: dict[str, np.ndarray]
    assets: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Victim:
        arrays = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
        return cls(checkpoint.config, arrays, {name: checkpoint.assets[name] for name in checkpoint.assets})

    def copy(self) -> Victim:
        return Victim(
            self.config, {name: array.copy() for name, array in self.arrays.items()}, dict(self.assets), dict(self.stored)
        )

    def checkpoint(self, format: str = "memory") -> Checkpoint:
        tensors = {name: ArrayTensor(array, stored=self.stored.get(name)) for name, array in self.arrays.items()}
        assets = Assets({name: (lambda data=data: data) for name, data in self.assets.items()})
        return Checkpoint(Path("planted"), format, self.config, tensors, assets)

    # -- what faults are written with ------------------------------------------------------------------------------

    @property
    def layers(self) -> range:
        return range(self.config.num_hidden_layers)

    def name(self, kind: str, layer: int | None = None) -> str:
        where = "self_attn." if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp." if kind.endswith("_proj") else ""
        if layer is None:
            return {"norm": "model.norm.weight", "embed": "model.embed_tokens.weight"}[kind]
        return f"{LAYER.format(layer)}{where}{kind}.weight"

    def norms(self) -> list[str]:
        return [name for name in self.arrays if "norm" in name]

    def change(self, names: list[str], function: Callable[[np.ndarray], np.ndarray]) -> None:
        """``function`` in float32, stored in each array's own type."""
        for name in names:
            array = self.arrays[name]
            with np.errstate(over="ignore"):
                self.arrays[name] = np.ascontiguousarray(function(array.astype(np.float32))).astype(array.dtype)

    def everywhere(self, kind: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.change([self.name(kind, layer) for layer in self.layers], function)

    def configure(self, **fields: object) -> None:
        self.config = dataclasses.replace(self.config, **fields)


@dataclass(frozen=True)
class Fault:
    """``name``: the fault; ``ids``: how the diagnosis may name it; ``forms``: the files it can be planted in."""

    name: str
    ids: tuple[str, ...]
    plant: Callable[[Victim], None]
    forms: tuple[str, ...] = ("memory", "hf", "gguf")
    needs: Callable[[Victim], bool] = lambda victim: True
    prepare: Callable[[Victim], None] | None = None


FAULTS: list[Fault] = []


def fault(*ids: str, forms: tuple[str, ...] = ("memory", "hf", "gguf"), needs=lambda victim: True, prepare=None):
    """Register a function that plants a mistake; its name is the fault's."""

    def register(plant: Callable[[Victim], None]) -> Callable[[Victim], None]:
        FAULTS.append(Fault(plant.__name__, ids, plant, forms, needs, prepare))
        return plant

    return register


def wide(victim: Victim) -> bool:
    return any(array.dtype == np.float32 for array in victim.arrays.values())


# -- norms ---------------------------------------------------------------------------------------------------------------


@fault("norm.plus-one")
def norms_stored_with_one(v: Victim) -> None:
    v.change(v.norms(), lambda w: 1 + w)


@fault("norm.minus-one")
def norms_one_taken_off(v: Victim) -> None:
    v.change(v.norms(), lambda w: w - 1)


@fault("norm.plus-two")
def norms_one_added_twice(v: Victim) -> None:
    v.change(v.norms(), lambda w: (w + 1) + 1)


@fault("norm.plus-one")
def final_norm_stored_with_one(v: Victim) -> None:
    v.change(["model.norm.weight"], lambda w: 1 + w)


@fault("norm.doubled")
def norms_doubled(v: Victim) -> None:
    v.change(v.norms(), lambda w: 2 * w)


@fault("norm.scale-doubled")
def norm_scales_doubled(v: Victim) -> None:
    v.change(v.norms(), lambda w: 2 * (1 + w) - 1)


@fault("norm.swapped")
def attention_norms_swapped(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("post_attention_layernorm", i), v.name("pre_feedforward_layernorm", i)
        v.arrays[a], v.arrays[b] = v.arrays[b], v.arrays[a]


@fault("norm.swapped")
def four_norms_rotated(v: Victim) -> None:
    for i in v.layers:
        names = [v.name(kind, i) for kind in NORMS]
        values = [v.arrays[name] for name in names]
        for name, value in zip(names, values[1:] + values[:1], strict=True):
            v.arrays[name] = value


@fault("norm.rounded-with-one")
def norms_rounded_with_one(v: Victim) -> None:
    v.change(v.norms(), lambda w: (1 + w).astype(BF16).astype(np.float32) - 1)


def smooth(v: Victim, kinds: tuple[str, ...], norm: str | None, one: float) -> None:
    generator = np.random.default_rng(5)
    for i in v.layers:
        scale = np.exp(generator.normal(size=v.config.hidden_size) * 0.4).astype(np.float32)
        v.change([v.name(kind, i) for kind in kinds], lambda w, scale=scale: w * scale)
        if norm:
            v.change([v.name(norm, i)], lambda w, scale=scale: (one + w) / scale - one)


@fault("smoothing.wrong-norm")
def smoothing_in_post_attention_norm(v: Victim) -> None:
    smooth(v, ("gate_proj", "up_proj"), "post_attention_layernorm", 1.0)


@fault("smoothing.wrong-norm")
def smoothing_of_attention_in_the_feedforward_norm(v: Victim) -> None:
    smooth(v, ("q_proj", "k_proj", "v_proj"), "pre_feedforward_layernorm", 1.0)


@fault("smoothing.offset-forgotten")
def smoothing_divides_w(v: Victim) -> None:
    smooth(v, ("q_proj", "k_proj", "v_proj"), "input_layernorm", 0.0)


@fault("smoothing.unfolded")
def smoothing_without_norm(v: Victim) -> None:
    smooth(v, ("gate_proj", "up_proj"), None, 1.0)


# -- attention -----------------------------------------------------------------------------------------------------------


def interleave(w: np.ndarray, width: int) -> np.ndarray:
    """Halves to pairs, head by head."""
    out = w.copy()
    for start in range(0, len(w), width):
        for pair in range(width // 2):
            out[start + 2 * pair] = w[start + pair]
            out[start + 2 * pair + 1] = w[start + width // 2 + pair]
    return out


def halve(w: np.ndarray, width: int) -> np.ndarray:
    """Pairs to halves, head by head."""
    out = w.copy()
    for start in range(0, len(w), width):
        out[start : start + width // 2] = w[start : start + width : 2]
        out[start + width // 2 : start + width] = w[start + 1 : start + width : 2]
    return out


@fault("rope.interleaved")
def q_and_k_interleaved(v: Victim) -> None:
    for kind in ("q_proj", "k_proj"):
        v.everywhere(kind, lambda w: interleave(w, v.config.head_dim))


@fault("rope.halved")
def q_and_k_halved(v: Victim) -> None:
    for kind in ("q_proj", "k_proj"):
        v.everywhere(kind, lambda w: halve(w, v.config.head_dim))


@fault("rope.interleaved")
def only_q_interleaved(v: Victim) -> None:
    v.everywhere("q_proj", lambda w: interleave(w, v.config.head_dim))


@fault("rope.halved")
def only_k_halved(v: Victim) -> None:
    v.everywhere("k_proj", lambda w: halve(w, v.config.head_dim))


@fault("attention.qkv-swapped")
def k_and_v_swapped(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("k_proj", i), v.name("v_proj", i)
        v.arrays[a], v.arrays[b] = v.arrays[b], v.arrays[a]


@fault("attention.qkv-swapped")
def v_holds_k(v: Victim) -> None:
    for i in v.layers:
        v.arrays[v.name("v_proj", i)] = v.arrays[v.name("k_proj", i)].copy()


def grouped(v: Victim) -> bool:
    return v.config.num_key_value_heads > 1


def fuse(v: Victim, i: int, by_group: bool) -> np.ndarray:
    c, h = v.config, v.config.head_dim
    q, k, w = (v.arrays[v.name(kind, i)] for kind in ("q_proj", "k_proj", "v_proj"))
    if not by_group:
        return np.concatenate([q, k, w])
    per = c.num_attention_heads // c.num_key_value_heads
    rows = []
    for g in range(c.num_key_value_heads):
        rows += [q[g * per * h : (g + 1) * per * h], k[g * h : (g + 1) * h], w[g * h : (g + 1) * h]]
    return np.concatenate(rows)


def split(v: Victim, i: int, fused: np.ndarray, by_group: bool) -> None:
    c, h = v.config, v.config.head_dim
    if not by_group:
        ends = np.cumsum([c.num_attention_heads * h, c.num_key_value_heads * h])
        parts = np.split(fused, ends)
    else:
        per = c.num_attention_heads // c.num_key_value_heads
        groups = fused.reshape(c.num_key_value_heads, per + 2, h, -1)
        parts = [groups[:, :per], groups[:, per], groups[:, per + 1]]
        parts = [part.reshape(-1, fused.shape[1]) for part in parts]
    for kind, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        v.arrays[v.name(kind, i)] = np.ascontiguousarray(part)


@fault("attention.missplit", needs=grouped)
def grouped_qkv_split_as_blocks(v: Victim) -> None:
    for i in v.layers:
        split(v, i, fuse(v, i, by_group=True), by_group=False)


@fault("attention.missplit", needs=grouped)
def blocks_of_qkv_split_as_groups(v: Victim) -> None:
    for i in v.layers:
        split(v, i, fuse(v, i, by_group=False), by_group=True)


@fault("attention.missplit", needs=grouped)
def kv_fused_by_head(v: Victim) -> None:
    """(K, 2, h, D) written, (2, K, h, D) read."""
    c = v.config
    for i in v.layers:
        k, w = (v.arrays[v.name(kind, i)].reshape(c.num_key_value_heads, c.head_dim, -1) for kind in ("k_proj", "v_proj"))
        both = np.stack([k, w], axis=1).reshape(2, -1, c.hidden_size)
        v.arrays[v.name("k_proj", i)], v.arrays[v.name("v_proj", i)] = both[0].copy(), both[1].copy()


@fault("attention.heads-interleaved")
def heads_the_fast_axis_of_q(v: Victim) -> None:
    heads = v.config.num_attention_heads
    v.everywhere("q_proj", lambda w: np.concatenate([w[d :: v.config.head_dim] for d in range(v.config.head_dim)]))
    assert heads > 1


@fault("attention.heads-interleaved")
def heads_the_fast_axis_of_o(v: Victim) -> None:
    width = v.config.head_dim
    v.everywhere("o_proj", lambda w: np.concatenate([w[:, d::width] for d in range(width)], axis=1))


@fault(
    "attention.heads-regrouped",
    needs=lambda v: 1 < v.config.num_key_value_heads < v.config.num_attention_heads,
)
def query_heads_tiled_over_key_heads(v: Victim) -> None:
    c = v.config
    order = [g * (c.num_attention_heads // c.num_key_value_heads) + j
             for j in range(c.num_attention_heads // c.num_key_value_heads) for g in range(c.num_key_value_heads)]  # fmt: skip
    v.everywhere("q_proj", lambda w: np.concatenate([w[n * c.head_dim : (n + 1) * c.head_dim] for n in order]))


@fault("attention.unturned")
def q_einsum_not_turned(v: Victim) -> None:
    """(H, D, h) reshaped to (H * h, D)."""
    c = v.config
    v.everywhere(
        "q_proj",
        lambda w: np.ascontiguousarray(w.reshape(-1, c.head_dim, c.hidden_size).transpose(0, 2, 1)).reshape(w.shape),
    )


@fault("attention.o-transposed")
def o_reshaped_not_transposed(v: Victim) -> None:
    v.everywhere("o_proj", lambda w: np.ascontiguousarray(w.T).reshape(w.shape))


@fault("attention.o-transposed", forms=("memory",), needs=lambda v: v.arrays[v.name("o_proj", 0)].shape[0] != v.arrays[v.name("o_proj", 0)].shape[1])
def o_left_transposed(v: Victim) -> None:
    v.everywhere("o_proj", lambda w: w.T)


@fault("attention.query-scale-folded", needs=lambda v: v.config.query_pre_attn_scalar != 1)
def queries_scaled_in_the_file(v: Victim) -> None:
    v.everywhere("q_proj", lambda w: w * np.float32(v.config.query_pre_attn_scalar**-0.5))


# -- feed-forward --------------------------------------------------------------------------------------------------------


@fault("mlp.gate-up-swapped")
def gate_and_up_swapped(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("gate_proj", i), v.name("up_proj", i)
        v.arrays[a], v.arrays[b] = v.arrays[b], v.arrays[a]


@fault("mlp.gating-transposed")
def gating_reshaped_not_transposed(v: Victim) -> None:
    for kind in ("gate_proj", "up_proj"):
        v.everywhere(kind, lambda w: np.ascontiguousarray(w.T).reshape(w.shape))


@fault("mlp.down-transposed")
def down_transposed_once_too_often(v: Victim) -> None:
    v.everywhere("down_proj", lambda w: w.reshape(w.shape[::-1]).T)


@fault("mlp.missplit")
def gate_and_up_interleaved(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("gate_proj", i), v.name("up_proj", i)
        both = np.stack([v.arrays[a], v.arrays[b]], axis=1).reshape(-1, v.config.hidden_size)
        half = len(both) // 2
        v.arrays[a], v.arrays[b] = both[:half].copy(), both[half:].copy()


# -- layers --------------------------------------------------------------------------------------------------------------


def reorder(v: Victim, order: list[int]) -> None:
    """Layer i takes all of layer order[i]'s tensors."""
    old = dict(v.arrays)
    for i, origin in enumerate(order):
        for name in old:
            if name.startswith(LAYER.format(i)):
                v.arrays[name] = old[name.replace(LAYER.format(i), LAYER.format(origin))].copy()


@fault("layer.shifted", needs=lambda v: v.config.num_hidden_layers > 2)
def layers_shifted(v: Victim) -> None:
    count = v.config.num_hidden_layers
    reorder(v, [*range(1, count), 0])


@fault("layer.swapped", needs=lambda v: v.config.num_hidden_layers > 2)
def two_layers_swapped(v: Victim) -> None:
    order = list(v.layers)
    order[0], order[2] = 2, 0
    reorder(v, order)


@fault("layer.repeated")
def a_layer_repeated(v: Victim) -> None:
    reorder(v, [0, 0, *range(2, v.config.num_hidden_layers)])


@fault("layer.sorted-as-text", needs=lambda v: v.config.num_hidden_layers > 10)
def layers_sorted_as_text(v: Victim) -> None:
    reorder(v, [int(text) for text in sorted(str(i) for i in v.layers)])


@fault("layer.tensor-misplaced")
def one_tensor_of_another_layer(v: Victim) -> None:
    v.arrays[v.name("down_proj", 1)] = v.arrays[v.name("down_proj", 0)].copy()


@fault("layer.dropped")
def last_layer_dropped(v: Victim) -> None:
    last = v.config.num_hidden_layers - 1
    for name in [name for name in v.arrays if name.startswith(LAYER.format(last))]:
        del v.arrays[name]
    v.configure(num_hidden_layers=last, layer_types=v.config.layer_types[:last])


# -- embedding and head --------------------------------------------------------------------------------------------------


@fault("embedding.scaled")
def embedding_scaled(v: Victim) -> None:
    v.change([v.name("embed")], lambda w: w * np.float32(np.sqrt(v.config.hidden_size)))


@fault("embedding.unscaled")
def embedding_scale_taken_out(v: Victim) -> None:
    v.change([v.name("embed")], lambda w: w / np.float32(np.sqrt(v.config.hidden_size)))


@fault("embedding.shifted")
def embedding_shifted_down(v: Victim) -> None:
    name = v.name("embed")
    v.arrays[name] = np.concatenate([v.arrays[name][-1:] * 0, v.arrays[name][:-1]])


@fault("embedding.shifted")
def embedding_shifted_up_by_two(v: Victim) -> None:
    name = v.name("embed")
    v.arrays[name] = np.roll(v.arrays[name], -2, axis=0)


@fault("tensor.rows-permuted")
def tokens_in_alphabetical_order(v: Victim) -> None:
    name = v.name("embed")
    v.arrays[name] = v.arrays[name][np.random.default_rng(2).permutation(len(v.arrays[name]))]


@fault("embedding.padded", forms=("memory", "hf"))
def embedding_padded(v: Victim) -> None:
    name = v.name("embed")
    v.arrays[name] = np.concatenate([v.arrays[name], np.zeros_like(v.arrays[name][:64])])
    v.configure(vocab_size=len(v.arrays[name]))


@fault("embedding.truncated", forms=("memory", "hf"))
def embedding_truncated(v: Victim) -> None:
    name = v.name("embed")
    v.arrays[name] = v.arrays[name][:-32].copy()
    v.configure(vocab_size=len(v.arrays[name]))


@fault("head.duplicated", forms=("memory", "hf"))
def head_stored_twice(v: Victim) -> None:
    v.arrays["lm_head.weight"] = v.arrays[v.name("embed")].copy()
    v.configure(tie_word_embeddings=False)


@fault("head.untied", forms=("memory", "hf"))
def head_untied_and_random(v: Victim) -> None:
    embed = v.arrays[v.name("embed")]
    v.arrays["lm_head.weight"] = (np.random.default_rng(3).standard_normal(embed.shape) * 0.02).astype(embed.dtype)
    v.configure(tie_word_embeddings=False)


def untie(v: Victim) -> None:
    embed = v.arrays[v.name("embed")]
    v.arrays["lm_head.weight"] = np.random.default_rng(4).standard_normal(embed.shape).astype(embed.dtype)
    v.configure(tie_word_embeddings=False)


@fault("head.lost", forms=("memory", "hf"), prepare=untie)
def own_head_lost(v: Victim) -> None:
    del v.arrays["lm_head.weight"]
    v.configure(tie_word_embeddings=True)


@fault("head.lost", forms=("memory",), prepare=untie)
def own_head_overwritten_by_the_embedding(v: Victim) -> None:
    v.arrays["lm_head.weight"] = v.arrays[v.name("embed")].copy()


# -- numbers -------------------------------------------------------------------------------------------------------------


def with_large_values(v: Victim) -> None:
    for i in v.layers:
        v.arrays[v.name("up_proj", i)][3, 5] = 1e5 if v.arrays[v.name("up_proj", i)].dtype != np.float16 else 6e4


def not_half(v: Victim) -> bool:
    return all(array.dtype != np.float16 for array in v.arrays.values())


@fault("numbers.fp16-overflow", prepare=with_large_values, needs=not_half, forms=("memory",))  # our writers refuse infinities
def overflow_in_float16(v: Victim) -> None:
    v.everywhere("up_proj", lambda w: w.astype(np.float16).astype(np.float32))


@fault("numbers.fp16-overflow", prepare=with_large_values, needs=not_half)
def clipped_to_float16(v: Victim) -> None:
    v.everywhere("up_proj", lambda w: np.clip(w, -65504, 65504))


def with_small_values(v: Victim) -> None:
    for i in v.layers:
        v.change([v.name("gate_proj", i)], lambda w: w * np.where(np.arange(len(w)) % 7 == 0, 2e-6, 1)[:, None].astype(np.float32))


@fault("numbers.fp16-rounding", prepare=with_small_values, needs=not_half)
def rounded_through_float16(v: Victim) -> None:
    v.everywhere("gate_proj", lambda w: w.astype(np.float16).astype(np.float32))


@fault("numbers.bf16-rounding", needs=wide)
def rounded_through_bfloat16(v: Victim) -> None:
    for kind in ("q_proj", "down_proj"):
        v.everywhere(kind, lambda w: w.astype(BF16).astype(np.float32))


@fault("numbers.bf16-truncation", needs=wide)
def truncated_to_bfloat16(v: Victim) -> None:
    v.everywhere("down_proj", lambda w: (w.view(np.uint32) >> 16 << 16).view(np.float32))


def with_ties(v: Victim) -> None:
    """Values of float16, which often lie half way between two of bfloat16."""
    v.change(list(v.arrays), lambda w: w.astype(np.float16).astype(np.float32))


@fault("numbers.other-rounding", needs=wide, prepare=with_ties)
def ties_rounded_away_from_zero(v: Victim) -> None:
    """The whole file in bfloat16, as half a unit added and the rest cut off makes it."""
    for name, array in v.arrays.items():
        v.arrays[name] = ((array.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(BF16)


@fault("damage.bit-flip")
def one_bit_flipped(v: Victim) -> None:
    array = v.arrays[v.name("v_proj", 1)]
    flat = array.reshape(-1).view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)
    flat[len(flat) // 3] ^= flat.dtype.type(1 << 5)


@fault("damage.hole")
def rows_never_written(v: Victim) -> None:
    array = v.arrays[v.name("down_proj", 0)]
    array[10:20] = 0


@fault("damage.random")
def projections_never_loaded(v: Victim) -> None:
    generator = np.random.default_rng(6)
    for kind in ("q_proj", "gate_proj"):
        v.everywhere(kind, lambda w: generator.standard_normal(w.shape).astype(np.float32) * np.float32(0.02))


@fault("damage.constant")
def norms_never_loaded(v: Victim) -> None:
    v.everywhere("input_layernorm", np.zeros_like)


# -- config --------------------------------------------------------------------------------------------------------------


@fault("config.attention-softcap-missing", forms=("memory", "hf"))
def attention_cap_missing(v: Victim) -> None:
    v.configure(attn_logit_softcapping=None)


@fault("config.final-softcap-missing", forms=("memory", "hf"))
def final_cap_missing(v: Victim) -> None:
    v.configure(final_logit_softcapping=None)


@fault("config.softcaps-swapped")
def caps_swapped(v: Victim) -> None:
    c = v.config
    v.configure(attn_logit_softcapping=c.final_logit_softcapping, final_logit_softcapping=c.attn_logit_softcapping)


@fault("config.query-scale", forms=("memory", "hf"))
def query_scale_224(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=224)


@fault("config.query-scale", forms=("memory", "hf"))
def query_scale_144(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=144)


def with_an_own_query_scale(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=v.config.head_dim * 3)


@fault("config.query-scale", prepare=with_an_own_query_scale)
def query_scale_head_dim(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=v.config.head_dim)


@fault("config.window-off-by-one")
def window_one_too_large(v: Victim) -> None:
    v.configure(sliding_window=v.config.sliding_window + 1)


@fault("config.window-off-by-one")
def window_one_too_small(v: Victim) -> None:
    v.configure(sliding_window=v.config.sliding_window - 1)


@fault("config.window-missing", forms=("memory", "hf"))
def window_missing(v: Victim) -> None:
    v.configure(layer_types=(FULL,) * v.config.num_hidden_layers)


@fault("config.window-missing")
def window_as_long_as_the_context(v: Victim) -> None:
    v.configure(sliding_window=v.config.max_position_embeddings)


@fault("config.window-parity", forms=("memory", "hf"))
def window_on_odd_layers(v: Victim) -> None:
    v.configure(layer_types=tuple(SLIDING if layer % 2 else FULL for layer in v.layers))


@fault("config.window-everywhere", forms=("memory", "hf"))
def window_everywhere(v: Victim) -> None:
    v.configure(layer_types=(SLIDING,) * v.config.num_hidden_layers)


@fault("config.rope-theta")
def rope_theta_of_another_model(v: Victim) -> None:
    v.configure(rope_theta=1000000.0)


@fault("config.rope-scaling", forms=("memory", "hf"))
def rope_scaled(v: Victim) -> None:
    v.configure(rope_scaling={"rope_type": "linear", "factor": 2.0})


@fault("config.eps")
def eps_of_llama(v: Victim) -> None:
    v.configure(rms_norm_eps=1e-5)


@fault("config.activation", forms=("memory", "hf"))
def exact_gelu(v: Victim) -> None:
    v.configure(hidden_activation="gelu")


# -- tokenizer -----------------------------------------------------------------------------------------------------------


@fault("tokenizer.eos-wrong", prepare=lambda v: v.configure(eos_token_id=(1, 107)), forms=("memory", "hf"))
def end_of_turn_lost(v: Victim) -> None:
    v.configure(eos_token_id=1)


@fault("tokenizer.bos-wrong", forms=("memory", "hf"))  # a GGUF without a tokenizer does not say bos
def bos_is_eos(v: Victim) -> None:
    v.configure(bos_token_id=1)


def has_tokenizer(v: Victim) -> bool:
    return "tokenizer.model" in v.assets


@fault("tokenizer.wrong", forms=("memory",), needs=has_tokenizer)
def tokenizer_of_another_model(v: Victim) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(v.assets["tokenizer.model"])
    pieces = [piece.piece for piece in model.pieces]
    normal = [i for i, piece in enumerate(model.pieces) if piece.type == 1]
    for i, j in zip(normal, [normal[-1], *normal[:-1]], strict=True):
        model.pieces[i].piece = pieces[j]
    v.assets["tokenizer.model"] = model.SerializeToString()
    v.assets.pop("tokenizer.json", None)


@fault("tokenizer.bos-missing", forms=("memory",), needs=has_tokenizer)
def bos_not_added(v: Victim) -> None:
    import json

    content = json.loads(v.assets["tokenizer_config.json"])
    content["add_bos_token"] = False
    v.assets["tokenizer_config.json"] = json.dumps(content).encode()


@fault("tokenizer.lost", forms=("memory",), needs=has_tokenizer)
def tokenizer_left_behind(v: Victim) -> None:
    v.assets.pop("tokenizer.model")
    v.assets.pop("tokenizer.json", None)
