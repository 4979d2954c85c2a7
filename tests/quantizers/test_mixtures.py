"""Which tensor gets which type: the rules for the released sizes, overrides, fallbacks. Whole files are tested in
formats/gguf."""

from __future__ import annotations

from collections import Counter

import pytest

from gemma2tool.errors import UsageError
from gemma2tool.model.config import SIZES, Gemma2Config
from gemma2tool.quantizers.gguf_encoders import block_elements
from gemma2tool.quantizers.gguf_types import row_bytes
from gemma2tool.quantizers.mixtures import (
    FILE_TYPES,
    Choice,
    Matrix,
    Model,
    Overrides,
    choose,
    file_type,
    needs_imatrix,
)

BLOCKS = block_elements()


def matrices(config: Gemma2Config) -> list[Matrix]:
    d, f, h = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    cols = {"attn_q": d, "attn_k": d, "attn_v": d, "attn_output": h, "ffn_gate": d, "ffn_up": d, "ffn_down": f}
    matrices = [Matrix("token_embd.weight", "token_embd", None, d)]
    for layer in range(config.num_hidden_layers):
        matrices += [Matrix(f"blk.{layer}.{kind}.weight", kind, layer, size) for kind, size in cols.items()]
    return matrices


def chosen(size: str, name: str, imatrix: bool = False, **overrides: object) -> Choice:
    config = SIZES[size]
    model = Model(config.num_hidden_layers, config.num_key_value_groups, imatrix)
    return choose(file_type(name), matrices(config), model, BLOCKS, Overrides(**overrides))


def nbytes(size: str, choice: Choice) -> int:
    """Tensor data of a whole file: the chosen types, and norms in F32."""
    config = SIZES[size]
    d, h = config.hidden_size, config.head_dim
    q, kv, f = config.num_attention_heads * h, config.num_key_value_heads * h, config.intermediate_size
    rows = {"token_embd": config.vocab_size, "attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": d}
    rows |= {"ffn_gate": f, "ffn_up": f, "ffn_down": d}
    total = (4 * config.num_hidden_layers + 1) * d * 4
    return total + sum(rows[m.kind] * row_bytes(choice.types[m.name], m.cols) for m in matrices(config))


@pytest.mark.parametrize(
    ("size", "name", "gigabytes"),
    [
        ("2b", "q4_k_m", 1.703), ("2b", "q6_k", 2.145), ("2b", "q8_0", 2.778), ("9b", "q2_k", 3.799),
        ("9b", "q3_k_m", 4.756), ("9b", "iq4_xs", 5.217), ("9b", "q4_0", 5.437), ("9b", "q4_k_m", 5.755),
        ("9b", "q5_k_m", 6.641), ("9b", "q6_k", 7.583), ("9b", "q8_0", 9.821), ("27b", "q4_k_m", 16.639),
        ("27b", "q8_0", 28.931),
    ],
)  # fmt: skip
def test_sizes_of_the_released_models(size: str, name: str, gigabytes: float) -> None:
    assert round(nbytes(size, chosen(size, name)) / 1e9, 3) == gigabytes


MORE = {
    "2b": [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25],
    "9b": [*range(5), *range(7, 36, 3), *range(36, 42)],
    "27b": [*range(5), *range(7, 40, 3), *range(40, 46)],
}


@pytest.mark.parametrize("size", SIZES)
def test_layers_with_more_bits(size: str) -> None:
    for name in ("q4_k_m", "q5_k_m"):
        types = chosen(size, name).types
        better = [
            layer for layer in range(SIZES[size].num_hidden_layers) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"
        ]
        assert better == MORE[size]
        assert better == [i for i in range(SIZES[size].num_hidden_layers) if types[f"blk.{i}.attn_v.weight"] == "Q6_K"]


def test_order_of_tensors_has_no_effect() -> None:
    config = SIZES["2b"]
    model = Model(config.num_hidden_layers, config.num_key_value_groups)
    backwards = matrices(config)[::-1]
    for name, ftype in FILE_TYPES.items():
        assert choose(ftype, backwards, model, BLOCKS).types == chosen("2b", name).types, name


def test_an_importance_matrix_changes_some_types() -> None:
    for name, tensor, without, with_ in (
        ("q4_0", "blk.0.ffn_down.weight", "Q4_0", "Q4_1"),
        ("q5_0", "blk.0.ffn_down.weight", "Q5_0", "Q5_1"),
        ("iq4_xs", "blk.0.ffn_down.weight", "Q5_K", "IQ4_XS"),
        ("iq3_xxs", "blk.0.attn_v.weight", "IQ3_S", "IQ3_XXS"),
        ("iq3_xxs", "blk.9.ffn_down.weight", "Q3_K", "IQ3_XXS"),
    ):
        assert chosen("2b", name).types[tensor] == without
        assert chosen("2b", name, imatrix=True).types[tensor] == with_


def test_which_types_need_an_importance_matrix() -> None:
    needing = set()
    for name, ftype in FILE_TYPES.items():
        types = chosen("2b", name).types
        if any(needs_imatrix(ftype, m, types[m.name]) for m in matrices(SIZES["2b"])):
            needing.add(name)
    assert needing == {"q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs"}
    assert not needs_imatrix(FILE_TYPES["iq1_s"], matrices(SIZES["2b"])[0], "IQ1_S")


def test_overrides_and_their_precedence() -> None:
    patterns = [(r"blk\.0\.ffn", "Q8_0"), ("ffn_down", "Q3_K"), ("token_embd", "Q4_0")]
    types = chosen("2b", "q4_k_m", patterns=patterns).types
    assert [types[f"blk.{i}.ffn_down.weight"] for i in (0, 1)] == ["Q8_0", "Q3_K"]
    assert types["token_embd.weight"] == "Q4_0"
    types = chosen("2b", "q4_k_m", patterns=patterns, pure=True, token_embedding="Q5_K", output="Q2_K").types
    assert types["token_embd.weight"] == "Q5_K"
    assert types["blk.0.attn_v.weight"] == "Q4_K" and types["blk.1.ffn_down.weight"] == "Q3_K"
    assert chosen("2b", "q4_k_m", output="Q2_K").types["token_embd.weight"] == "Q2_K"
    assert Counter(chosen("2b", "q4_k_m", pure=True).types.values()) == {"Q4_K": 183}
    assert chosen("2b", "f16", token_embedding="Q8_0").types["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("preferred", "cols", "fallback"),
    [
        ("Q4_K", 288, "Q5_0"), ("Q5_K", 288, "Q5_1"), ("Q6_K", 288, "Q8_0"), ("Q2_K", 288, "Q4_0"),
        ("TQ1_0", 288, "Q4_0"), ("IQ4_XS", 288, "IQ4_NL"), ("IQ1_S", 288, "IQ4_NL"), ("Q4_K", 48, "F16"),
        ("Q8_0", 48, "F16"), ("Q4_0", 40, "F16"), ("Q8_0", 288, "Q8_0"),
    ],
)  # fmt: skip
def test_fallbacks_for_rows_that_do_not_divide(preferred: str, cols: int, fallback: str) -> None:
    matrix = Matrix("blk.0.ffn_gate.weight", "ffn_gate", 0, cols)
    overrides = Overrides(patterns=[("ffn_gate", preferred)])
    choice = choose(file_type("q8_0"), [matrix], Model(1, 2), BLOCKS, overrides)
    assert choice.types[matrix.name] == fallback
    assert choice.fallbacks == ({} if fallback == preferred else {matrix.name: preferred})


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        raise_hint("q4_k_x")
    for overrides, words in (
        ({"patterns": [("ffn_dwn", "Q8_0")]}, "matches no tensor"),
        ({"patterns": [("ffn[", "Q8_0")]}, "regular expression"),
        ({"patterns": [("ffn", "Q4_K_M")]}, "unknown GGUF tensor type"),
        ({"token_embedding": "Q7"}, "unknown GGUF tensor type"),
        ({"output": "Q7"}, "unknown GGUF tensor type"),
    ):
        with pytest.raises(UsageError, match=words):
            chosen("2b", "q4_k_m", **overrides)
    with pytest.raises(UsageError, match="do not divide"):
        choose(file_type("q8_0"), [Matrix("token_embd.weight", "token_embd", None, 48)], Model(1, 2), BLOCKS,
               Overrides(token_embedding="Q8_0"))  # fmt: skip


def raise_hint(name: str) -> None:
    try:
        file_type(name)
    except UsageError as error:
        raise UsageError(error.id, error.hint) from error


def test_names_in_any_case_and_short_ones() -> None:
    assert file_type("Q4_K_M") is file_type("q4_k") is FILE_TYPES["q4_k_m"]
