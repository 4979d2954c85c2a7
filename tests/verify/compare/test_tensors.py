"""Tensors against their source: every fault fails, and no required difference does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.lazy import ArrayTensor, LazyTensor, MappedRows
from gemma2tool.verify.compare import tensors as tensors_module
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules, kind_of
from gemma2tool.verify.compare.tensors import compare_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": BF16}


def weights(shape: tuple[int, ...] = (48, 256), dtype: np.dtype = BF16, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(dtype)


def compare(source: np.ndarray | LazyTensor, candidate: np.ndarray | LazyTensor, **options: object) -> TensorComparison:
    sides = [side if isinstance(side, LazyTensor) else ArrayTensor(side) for side in (source, candidate)]
    expected = options.pop("expected", None)
    rules = TensorRules(expected={"t": expected} if expected else {}, **options)
    (comparison,) = compare_tensors({"t": sides[0]}, {"t": sides[1]}, rules)
    return comparison


# -- floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "candidate", "rule"), [
    ("bf16", "bf16", "exact"), ("bf16", "f32", "exact"), ("f16", "f32", "exact"), ("f32", "f32", "exact"),
    ("f16", "f16", "exact"), ("f32", "bf16", "cast"), ("f32", "f16", "cast"), ("bf16", "f16", "cast"), ("f16", "bf16",
    "cast"),
])  # fmt: skip
def test_correct_float_conversions_pass_and_one_flipped_bit_fails(source: str, candidate: str, rule: str) -> None:
    original = weights(dtype=DTYPES[source])
    returned = original.astype(np.float32).astype(DTYPES[candidate])
    comparison = compare(original, returned)
    assert (comparison.rule, comparison.ok, comparison.differing) == (rule, True, 0)
    assert comparison.rmse == pytest.approx(
        np.sqrt(np.mean((returned.astype(np.float64) - original.astype(np.float64)) ** 2))
    )
    bits = returned.view(f"u{returned.itemsize}")
    bits[7, 31] ^= 1
    comparison = compare(original, returned)
    assert not comparison.ok and comparison.differing == 1 and "[7, 31]" in comparison.message


def test_every_flipped_bit_of_a_lossless_tensor_is_found() -> None:
    original = weights((40, 50))
    generator = np.random.default_rng(1)
    for _ in range(400):
        returned = original.copy()
        row, column, bit = generator.integers(40), generator.integers(50), generator.integers(16)
        returned.view(np.uint16)[row, column] ^= np.uint16(1 << bit)
        comparison = compare(original, returned)
        assert not comparison.ok and f"[{row}, {column}]" in comparison.message


def test_truncation_instead_of_rounding_fails() -> None:
    original = weights(dtype=np.dtype(np.float32))
    truncated = (original.view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    comparison = compare(original, truncated)
    assert comparison.rule == "cast" and not comparison.ok


def test_float16_overflow_is_named() -> None:
    original = weights()
    original[3, 4] = 1e6
    with np.errstate(over="ignore"):
        returned = original.astype(np.float32).astype(np.float16)
    comparison = compare(original, returned)
    assert (
        not comparison.ok
        and "infinite" in comparison.message
        and "[3, 4]" in comparison.message
        and comparison.nonfinite == 1
    )


def test_nan_of_the_source_is_counted_on_both_sides() -> None:
    original = weights()
    original[0, 9] = np.nan
    comparison = compare(original, original.copy())
    assert comparison.ok and comparison.nonfinite == comparison.source_nonfinite == 1


def test_the_sign_of_zero_counts() -> None:
    original = np.zeros(16, np.float32)
    returned = original.copy()
    returned[5] = -0.0
    assert not compare(original, returned).ok


# -- a target's convention ---------------------------------------------------------------------------------------------


def test_a_convention_may_lose_only_what_it_rounds() -> None:
    norm = weights((64,), np.dtype(np.float32))
    norm[2] = -0.0
    source = ArrayTensor(norm)
    expected = MappedRows(source, lambda w: (w + np.float32(1)) - np.float32(1), np.float32)
    written = expected.load()
    comparison = compare(source, written, expected=expected)
    assert comparison.ok and comparison.rule == "expected" and 0 < comparison.max_abs_error < 1e-7
    assert not compare(source, written).ok, "a difference without the convention"
    written.view(np.uint32)[7] ^= 1
    assert not compare(source, written, expected=expected).ok
    assert not compare(source, norm, expected=expected).ok, "such a file cannot hold the source exactly"


# -- quantized ---------------------------------------------------------------------------------------------------------


def q8_0(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and float16 scales of ggml's Q8_0, from its definition."""
    blocks = rows.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    codes = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return codes, scale.astype(np.float16)


def decode(codes: np.ndarray, scale: np.ndarray, shape: tuple[int, ...]) -> ArrayTensor:
    return ArrayTensor((codes * scale.astype(np.float32)).astype(np.float32).reshape(shape), stored="q8_0")


def test_q8_0_is_within_its_bound_and_every_damaged_block_is_not() -> None:
    original = weights()
    codes, scale = q8_0(original)
    assert compare(original, decode(codes, scale, original.shape)).ok
    for factor in (0.97, 1.03, 2.0, 0.0, -1.0):
        damaged = scale.copy()
        damaged[100] = damaged[100] * np.float16(factor)
        comparison = compare(original, decode(codes, damaged, original.shape))
        assert not comparison.ok and comparison.bad_blocks == 1, factor
        assert "[12, 128]" in comparison.message  # block 100 of 8 to a row
    damaged = codes.copy()
    damaged[17] = np.roll(damaged[17], 1)
    assert compare(original, decode(damaged, scale, original.shape)).bad_blocks == 1


def test_bf16_rounding_of_decoded_values_is_allowed() -> None:
    original = weights()
    rounded = decode(*q8_0(original), original.shape).array.astype(BF16)
    assert compare(original, ArrayTensor(rounded, stored="q8_0")).ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("spread", ["normal", "uneven"])
def test_bitsandbytes_four_bit(kind: str, double: bool, spread: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    original = weights((300, 200), np.dtype(np.float32))  # rows that blocks of 64 straddle
    if spread == "uneven":
        original *= np.exp(1.5 * np.random.default_rng(3).standard_normal((300, 1))).astype(np.float32)
        original[40:60] = 0
    packed, state = functional.quantize_4bit(
        torch.from_numpy(original), blocksize=64, quant_type=kind, compress_statistics=double
    )
    stored = f"{kind}-dq" if double else kind
    returned = functional.dequantize_4bit(packed, state).numpy()
    comparison = compare(original, ArrayTensor(returned, stored=stored))
    assert comparison.ok, comparison.message
    blocks = np.abs(np.append(original, np.zeros(-original.size % 64, np.float32)).reshape(-1, 64)).max(1)
    first = 64 * int(blocks.argmax())  # scales of small blocks are coarse if quantized together with large ones
    damaged = returned.copy()
    damaged.reshape(-1)[first : first + 64] *= 1.25
    assert compare(original, ArrayTensor(damaged, stored=stored)).bad_blocks == 1
    if not double:
        damaged = returned.copy()
        damaged.reshape(-1)[first : first + 64] *= 1.001
        assert compare(original, ArrayTensor(damaged, stored=stored)).bad_blocks == 1, (
            "the largest value is stored exactly"
        )


def test_int8_by_rows() -> None:
    original = weights(dtype=np.dtype(np.float16))
    scale = np.abs(original.astype(np.float32)).max(1, keepdims=True)
    codes = np.round(original.astype(np.float32) * 127 / scale)
    returned = (codes * scale / 127).astype(np.float32)
    assert compare(original, ArrayTensor(returned, stored="int8")).ok
    returned[9] *= 1.01
    assert compare(original, ArrayTensor(returned, stored="int8")).bad_blocks == 1


@pytest.mark.parametrize("stored", sorted(BOUNDS))
def test_another_tensor_is_beyond_every_types_bound(stored: str) -> None:
    original, other = weights((64, 256)), weights((64, 256), seed=1).astype(np.float32)
    for rounding in ("nearest", "imatrix"):
        assert not compare(original, ArrayTensor(other, stored=stored), rounding=rounding).ok


@pytest.mark.parametrize("stored", sorted(BOUNDS))
def test_zeros_are_beyond_every_types_bound(stored: str) -> None:
    original = weights((64, 256))
    nothing = ArrayTensor(np.zeros((64, 256), np.float32), stored=stored)
    assert not compare(original, nothing).ok


def test_an_unknown_type_is_measured_without_a_limit() -> None:
    original = weights()
    comparison = compare(original, ArrayTensor(original.astype(np.float32) * 1.5, stored="q17"))
    assert comparison.ok and comparison.rule == "reported" and comparison.relative_rmse == pytest.approx(0.5)


def test_the_callers_limit_replaces_the_types() -> None:
    original = weights()
    returned = decode(*q8_0(original), original.shape)
    assert not compare(original, returned, max_relative_rmse=1e-4).ok


# -- measures ----------------------------------------------------------------------------------------------------------


def test_measures_match_double_precision() -> None:
    original = weights((777, 64))
    returned = decode(*q8_0(original), original.shape)
    comparison = compare(original, returned)
    error = returned.array.astype(np.float64) - original.astype(np.float64)
    rms = np.sqrt(np.mean(original.astype(np.float64) ** 2))
    assert comparison.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    assert comparison.relative_rmse == pytest.approx(np.sqrt(np.mean(error**2)) / rms, rel=1e-5)
    assert comparison.snr_db == pytest.approx(20 * np.log10(rms / np.sqrt(np.mean(error**2))), rel=1e-5)
    assert comparison.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)


def test_the_result_depends_neither_on_threads_nor_on_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"t{i}" for i in range(5)]
    original = {name: ArrayTensor(weights((100, 96), seed=i)) for i, name in enumerate(names)}
    returned = {}
    for i, name in enumerate(names):
        codes, scale = q8_0(original[name].array)
        scale[i * 7] *= np.float16(1.5)
        returned[name] = decode(codes, scale, (100, 96))
    monkeypatch.setattr(tensors_module, "CHUNK_VALUES", 96 * 7)
    one = compare_tensors(original, returned)
    assert compare_tensors(original, returned, threads=4) == one
    assert all(comparison.bad_blocks == 1 for comparison in one)
    monkeypatch.setattr(tensors_module, "CHUNK_VALUES", 1 << 20)
    whole = compare_tensors(original, returned)
    assert [comparison.message for comparison in whole] == [comparison.message for comparison in one]
    assert [comparison.to_json() for comparison in whole] == [comparison.to_json() for comparison in one]


def test_progress_adds_up() -> None:
    original = {name: ArrayTensor(weights((30, 96), seed=i)) for i, name in enumerate("ab")}
    seen: list[tuple[int, str]] = []
    compare_tensors(original, original, advance=lambda nbytes, name: seen.append((nbytes, name)))
    assert sum(nbytes for nbytes, _ in seen) == 2 * 30 * 96 * 2 and {name for _, name in seen} == {"a", "b"}


def test_an_error_of_a_reader_is_raised() -> None:
    class Broken(ArrayTensor):
        def load_rows(self, first: int, last: int) -> np.ndarray:
            raise OSError("gone")

    for threads in (1, 3):
        with pytest.raises(OSError, match="gone"):
            compare_tensors({"t": ArrayTensor(weights())}, {"t": Broken(weights())}, threads=threads)


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_the_kind_is_the_loosest_lossy_type() -> None:
    original = {name: ArrayTensor(weights(seed=i)) for i, name in enumerate("abc")}

    def kind(**stored: str) -> str:
        returned = dict(original) | {
            name: ArrayTensor(weights().astype(np.float32), stored=type_) for name, type_ in stored.items()
        }
        return kind_of(original, returned, (), None)

    assert kind() == "lossless"
    assert kind(a="f32") == "lossless"
    assert kind(a="f16") == "f16"
    assert kind(a="q8_0", b="q4_0", c="q6_k") == "q4_0"
    assert kind(a="q8_0", b="mystery") == "unknown"
    wide = original | {"a": ArrayTensor(weights().astype(np.float32))}
    assert kind_of(original, wide, ("a",), None) == "convention"
    assert kind_of(original, original, ("a",), None) == "bf16", "arithmetic in a narrow type loses as much as the type"
    assert (
        kind_of(
            original, original, ("a",), compare_tensors(original, original, TensorRules(expected={"a": original["a"]}))
        )
        == "lossless"
    )
