"""Mistakes within a layer: norms, smoothing, attention, feed-forward."""

from __future__ import annotations

import numpy as np

from tests.support.planted.faults import BF16, Victim, fault

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


# -- norms -------------------------------------------------------------------------------------------------------------


@fault("norm.plus-one")
def norms_stored_with_one(v: Victim) -> None:
    v.change(v.norms(), lambda w: 1 + w)


@fault("norm.minus-one")
def norms_one_subtracted(v: Victim) -> None:
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


# -- attention ---------------------------------------------------------------------------------------------------------


def interleave(w: np.ndarray, width: int) -> np.ndarray:
    """Halves to interleaved pairs, head by head."""
    out = w.copy()
    for start in range(0, len(w), width):
        for pair in range(width // 2):
            out[start + 2 * pair] = w[start + pair]
            out[start + 2 * pair + 1] = w[start + width // 2 + pair]
    return out


def halve(w: np.ndarray, width: int) -> np.ndarray:
    """Interleaved pairs to halves, head by head."""
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
        k, w = (
            v.arrays[v.name(kind, i)].reshape(c.num_key_value_heads, c.head_dim, -1) for kind in ("k_proj", "v_proj")
        )
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
    per = c.num_attention_heads // c.num_key_value_heads
    order = [g * per + j for j in range(per) for g in range(c.num_key_value_heads)]
    v.everywhere("q_proj", lambda w: np.concatenate([w[n * c.head_dim : (n + 1) * c.head_dim] for n in order]))


@fault("attention.unturned")
def q_einsum_not_transposed(v: Victim) -> None:
    """(H, D, h) reshaped to (H * h, D)."""
    c = v.config
    v.everywhere(
        "q_proj",
        lambda w: np.ascontiguousarray(w.reshape(-1, c.head_dim, c.hidden_size).transpose(0, 2, 1)).reshape(w.shape),
    )


@fault("attention.o-transposed")
def o_reshaped_not_transposed(v: Victim) -> None:
    v.everywhere("o_proj", lambda w: np.ascontiguousarray(w.T).reshape(w.shape))


@fault(
    "attention.o-transposed",
    forms=("memory",),
    needs=lambda v: v.arrays[v.name("o_proj", 0)].shape[0] != v.arrays[v.name("o_proj", 0)].shape[1],
)
def o_left_transposed(v: Victim) -> None:
    v.everywhere("o_proj", lambda w: w.T)


@fault("attention.query-scale-folded", needs=lambda v: v.config.query_pre_attn_scalar != 1)
def queries_scaled_in_the_file(v: Victim) -> None:
    v.everywhere("q_proj", lambda w: w * np.float32(v.config.query_pre_attn_scalar**-0.5))


# -- feed-forward ------------------------------------------------------------------------------------------------------


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
def down_transposed_twice(v: Victim) -> None:
    v.everywhere("down_proj", lambda w: w.reshape(w.shape[::-1]).T)


@fault("mlp.missplit")
def gate_and_up_interleaved(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("gate_proj", i), v.name("up_proj", i)
        both = np.stack([v.arrays[a], v.arrays[b]], axis=1).reshape(-1, v.config.hidden_size)
        half = len(both) // 2
        v.arrays[a], v.arrays[b] = both[:half].copy(), both[half:].copy()


@fault("norm.rescaled")
def norm_scales_times_one_and_a_half(v: Victim) -> None:
    v.change(v.norms(), lambda w: 1.5 * (1 + w) - 1)


@fault("tensor.offset")
def a_quarter_added_to_norms(v: Victim) -> None:
    v.everywhere("post_attention_layernorm", lambda w: w + 0.25)


@fault("smoothing.folded")
def smoothing_folded_correctly(v: Victim) -> None:
    smooth(v, ("gate_proj", "up_proj"), "pre_feedforward_layernorm", 1.0)


@fault("attention.qkv-transposed")
def values_reshaped_not_transposed(v: Victim) -> None:
    v.everywhere("v_proj", lambda w: np.ascontiguousarray(w.T).reshape(w.shape))


@fault("tensor.scaled")
def up_scaled(v: Victim) -> None:
    v.everywhere("up_proj", lambda w: w * np.float32(1.37))


@fault("tensor.misplaced", needs=lambda v: v.arrays[v.name("q_proj", 0)].shape == v.arrays[v.name("o_proj", 0)].shape)
def queries_and_output_swapped(v: Victim) -> None:
    for i in v.layers:
        a, b = v.name("q_proj", i), v.name("o_proj", i)
        v.arrays[a], v.arrays[b] = v.arrays[b], v.arrays[a]


# -- heads in an unknown order -----------------------------------------------------------------------------------------


def by_heads(v: Victim, order: list[int]) -> None:
    """Query head i becomes head order[i], in the rows of q_proj and the columns of o_proj."""
    width = v.config.head_dim
    for i in v.layers:
        q, o = v.arrays[v.name("q_proj", i)], v.arrays[v.name("o_proj", i)]
        new_q, new_o = q.copy(), o.copy()
        for head, origin in enumerate(order):
            here, there = slice(head * width, (head + 1) * width), slice(origin * width, (origin + 1) * width)
            new_q[here], new_o[:, here] = q[there], o[:, there]
        v.arrays[v.name("q_proj", i)], v.arrays[v.name("o_proj", i)] = new_q, new_o


@fault("attention.heads-permuted", paired=False)
def two_query_heads_exchanged(v: Victim) -> None:
    by_heads(v, [1, 0, *range(2, v.config.num_attention_heads)])


@fault("attention.heads-permuted", paired=False)
def query_heads_rolled(v: Victim) -> None:
    count = v.config.num_attention_heads
    by_heads(v, [*range(1, count), 0])
