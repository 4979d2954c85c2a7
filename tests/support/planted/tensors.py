"""Mistakes with whole tensors and their values: layers, embedding and head, rounding, damage."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.planted.faults import BF16, LAYER, Victim, fault


def wide(victim: Victim) -> bool:
    return any(array.dtype == np.float32 for array in victim.arrays.values())


# -- layers ------------------------------------------------------------------------------------------------------------


def reorder(v: Victim, order: list[int]) -> None:
    """Layer i gets all tensors of layer order[i]."""
    old = dict(v.arrays)
    for i, origin in enumerate(order):
        for name in old:
            there = name.replace(LAYER.format(i), LAYER.format(origin))
            if name.startswith(LAYER.format(i)) and there in old:
                v.arrays[name] = old[there].copy()


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


# -- embedding and head ------------------------------------------------------------------------------------------------


@fault("embedding.scaled")
def embedding_scaled(v: Victim) -> None:
    v.change([v.name("embed")], lambda w: w * np.float32(np.sqrt(v.config.hidden_size)))


@fault("embedding.unscaled")
def embedding_scale_divided_out(v: Victim) -> None:
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


# -- numbers -----------------------------------------------------------------------------------------------------------


def with_large_values(v: Victim) -> None:
    for i in v.layers:
        v.arrays[v.name("up_proj", i)][3, 5] = 1e5 if v.arrays[v.name("up_proj", i)].dtype != np.float16 else 6e4


def not_half(v: Victim) -> bool:
    return all(array.dtype != np.float16 for array in v.arrays.values())


@fault(
    "numbers.fp16-overflow", prepare=with_large_values, needs=not_half, forms=("memory",)
)  # gemma2tool does not write infinities
def overflow_in_float16(v: Victim) -> None:
    v.everywhere("up_proj", lambda w: w.astype(np.float16).astype(np.float32))


@fault("numbers.fp16-overflow", prepare=with_large_values, needs=not_half)
def clipped_to_float16(v: Victim) -> None:
    v.everywhere("up_proj", lambda w: np.clip(w, -65504, 65504))


def with_small_values(v: Victim) -> None:
    for i in v.layers:
        v.change(
            [v.name("gate_proj", i)],
            lambda w: w * np.where(np.arange(len(w)) % 7 == 0, 2e-6, 1)[:, None].astype(np.float32),
        )


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
    """Values of float16, which are often halfway between two values of bfloat16."""
    v.change(list(v.arrays), lambda w: w.astype(np.float16).astype(np.float32))


@fault("numbers.other-rounding", needs=wide, prepare=with_ties)
def ties_rounded_away_from_zero(v: Victim) -> None:
    """The whole file in bfloat16: half a unit is added, and the low bits are truncated."""
    for name, array in v.arrays.items():
        v.arrays[name] = ((array.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).view(BF16)


@fault("numbers.fp8-rounding", paired=False)
def rounded_through_e4m3(v: Victim) -> None:
    v.change(
        [name for name in v.arrays if "proj" in name], lambda w: w.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


@fault("numbers.fp8-rounding", paired=False)
def rounded_through_e5m2(v: Victim) -> None:
    v.change(list(v.arrays), lambda w: w.astype(ml_dtypes.float8_e5m2).astype(np.float32))


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


@fault("damage.region")
def rows_overwritten(v: Victim) -> None:
    array = v.arrays[v.name("up_proj", 1)]
    array[5:9] = np.random.default_rng(12).standard_normal(array[5:9].shape).astype(array.dtype)


@fault("damage.nonfinite", forms=("memory",))  # gemma2tool does not write them
def scattered_nans(v: Victim) -> None:
    array = v.arrays[v.name("k_proj", 0)]
    array[np.random.default_rng(13).random(array.shape) < 0.05] = np.nan


@fault("layer.added")
def an_additional_layer(v: Victim) -> None:
    last = v.config.num_hidden_layers
    for name in [name for name in v.arrays if name.startswith(LAYER.format(0))]:
        v.arrays[name.replace(LAYER.format(0), LAYER.format(last))] = v.arrays[name].copy()
    v.configure(num_hidden_layers=last + 1, layer_types=(*v.config.layer_types, v.config.layer_types[last % 2]))


@fault("layer.permuted", needs=lambda v: v.config.num_hidden_layers > 3)
def three_layers_rotated(v: Victim) -> None:
    reorder(v, [1, 2, 0, *range(3, v.config.num_hidden_layers)])


@fault("numbers.fp16-flushed", prepare=with_small_values, needs=not_half)
def subnormal_numbers_flushed(v: Victim) -> None:
    v.everywhere("gate_proj", lambda w: np.where(abs(w) < 2.0**-14, 0, w.astype(np.float16).astype(np.float32)))


@fault("numbers.negated")
def down_negated(v: Victim) -> None:
    v.everywhere("down_proj", lambda w: -w)


@fault("tensor.missing", forms=("memory",))
def a_projection_left_out(v: Victim) -> None:
    del v.arrays[v.name("v_proj", 1)]


@fault("tensor.extra", forms=("memory",))
def an_unknown_tensor(v: Victim) -> None:
    v.arrays["model.layers.0.self_attn.rotary.weight"] = v.arrays[v.name("norm")].copy()


@fault("tensor.rows-exchanged", paired=False)
def two_tokens_exchanged(v: Victim) -> None:
    array = v.arrays[v.name("embed")]
    array[[50, 90]] = array[[90, 50]]


@fault("tensor.rows-exchanged", paired=False)
def three_rows_rotated(v: Victim) -> None:
    array = v.arrays[v.name("gate_proj", 1)]
    array[[3, 40, 41]] = array[[40, 41, 3]]


@fault("tensor.same-region", paired=False)
def the_same_rows_of_all_layers_overwritten(v: Victim) -> None:
    generator = np.random.default_rng(14)
    for i in v.layers:
        array = v.arrays[v.name("up_proj", i)]
        array[5:9] = generator.standard_normal(array[5:9].shape).astype(array.dtype)


@fault("damage.nonfinite", forms=("memory",), paired=False)
def one_value_is_nan(v: Victim) -> None:
    v.arrays[v.name("down_proj", 1)][17, 33] = np.nan


@fault("damage.nonfinite", forms=("memory",), paired=False)
def one_value_is_infinite(v: Victim) -> None:
    v.arrays[v.name("embed")][17, 3] = -np.inf


@fault("weights.all-differ", paired=False)
def trained_further(v: Victim) -> None:
    generator = np.random.default_rng(15)
    v.change(
        [name for name in v.arrays if "proj" in name],
        lambda w: w + np.float32(0.02 * w.std()) * generator.standard_normal(w.shape).astype(np.float32),
    )


@fault("weights.all-differ", paired=False)
def all_weights_slightly_off(v: Victim) -> None:
    generator = np.random.default_rng(16)
    v.change(
        [name for name in v.arrays if "proj" in name],
        lambda w: w * (1 + np.float32(0.02) * generator.standard_normal(w.shape).astype(np.float32)),
    )
