"""Tensors against their source: nothing that differs passes, nothing that had to differ is blamed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.lazy import ArrayTensor, LazyTensor, MappedRows
from gemma2tool.verify.compare import tensors as subject
from gemma2tool.verify.compare.bounds import BOUNDS
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.rules import TensorRules, kind_of
from gemma2tool.verify.compare.tensors import compare_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": BF16}


def weights(shape: tuple[int, ...] = (48, 256), dtype: np.dtype = BF16, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(dtype)


def compare(source: np.ndarray | LazyTensor, candidate: np.ndarray | LazyTensor, **options: object) -> TensorComparison:
    sides = [each if isinstance(each, LazyTensor) else ArrayTensor(each) for each in (source, candidate)]
    expected = options.pop("expected", None)
    rules = TensorRules(expected={"t": expected} if expected else {}, **options)
    (comparison,) = compare_tensors({"t": sides[0]}, {"t": sides[1]}, rules)
    return comparison


# -- floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "candidate", "rule"), [
    ("bf16", "bf16", "exact"), ("bf16", "f32", "exact"), ("f16", "f32", "exact"), ("f32", "f32", "exact"),
    ("f16", "f16", "exact"), ("f32", "bf16", "cast"), ("f32", "f16", "cast"), ("bf16", "f16", "cast"), ("f16", "bf16", "cast"),
])  # fmt: skip
def test_honest_float_conversions_pass_and_one_flipped_bit_does_not(source: str, candidate: str, rule: str) -> None:
    ours = weights(dtype=DTYPES[source])
    theirs = ours.astype(np.float32).astype(DTYPES[candidate])
    found = compare(ours, theirs)
    assert (found.rule, found.ok, found.differing) == (rule, True, 0)
    assert found.rmse == pytest.approx(np.sqrt(np.mean((theirs.astype(np.float64) - ours.astype(np.float64)) ** 2)))
    bits = theirs.view(f"u{theirs.itemsize}")
    bits[7, 31] ^= 1
    found = compare(ours, theirs)
    assert not found.ok and found.differing == 1 and "[7, 31]" in found.message


def test_every_single_flipped_bit_of_a_lossless_tensor_is_found() -> None:
    ours = weights((40, 50))
    generator = np.random.default_rng(1)
    for _ in range(400):
        theirs = ours.copy()
        row, column, bit = generator.integers(40), generator.integers(50), generator.integers(16)
        theirs.view(np.uint16)[row, column] ^= np.uint16(1 << bit)
        found = compare(ours, theirs)
        assert not found.ok and f"[{row}, {column}]" in found.message


def test_truncation_instead_of_rounding_is_a_fault() -> None:
    ours = weights(dtype=np.dtype(np.float32))
    truncated = (ours.view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    found = compare(ours, truncated)
    assert found.rule == "cast" and not found.ok


def test_float16_overflow_is_named() -> None:
    ours = weights()
    ours[3, 4] = 1e6
    with np.errstate(over="ignore"):
        theirs = ours.astype(np.float32).astype(np.float16)
    found = compare(ours, theirs)
    assert not found.ok and "infinite" in found.message and "[3, 4]" in found.message and found.nonfinite == 1


def test_nan_that_the_source_has_too_is_counted_on_both_sides() -> None:
    ours = weights()
    ours[0, 9] = np.nan
    found = compare(ours, ours.copy())
    assert found.ok and found.nonfinite == found.source_nonfinite == 1


def test_sign_of_zero_counts() -> None:
    ours = np.zeros(16, np.float32)
    theirs = ours.copy()
    theirs[5] = -0.0
    assert not compare(ours, theirs).ok


# -- a target's convention ---------------------------------------------------------------------------------------------


def test_a_convention_may_lose_what_it_must_and_no_more() -> None:
    norm = weights((64,), np.dtype(np.float32))
    norm[2] = -0.0
    source = ArrayTensor(norm)
    kept = MappedRows(source, lambda w: (w + np.float32(1)) - np.float32(1), np.float32)
    written = kept.load()
    found = compare(source, written, expected=kept)
    assert found.ok and found.rule == "expected" and 0 < found.max_abs_error < 1e-7
    assert not compare(source, written).ok, "without the convention it is a difference"
    written.view(np.uint32)[7] ^= 1
    assert not compare(source, written, expected=kept).ok
    assert not compare(source, norm, expected=kept).ok, "even the exact source is not what such a file can hold"


# -- quantized ---------------------------------------------------------------------------------------------------------


def q8_0(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and float16 scales of ggml's Q8_0, from its definition."""
    blocks = rows.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    codes = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return codes, scale.astype(np.float16)


def decode(codes: np.ndarray, scale: np.ndarray, shape: tuple[int, ...]) -> ArrayTensor:
    return ArrayTensor((codes * scale.astype(np.float32)).astype(np.float32).reshape(shape), stored="q8_0")


def test_q8_0_within_its_bound_and_every_damaged_block_outside() -> None:
    ours = weights()
    codes, scale = q8_0(ours)
    assert compare(ours, decode(codes, scale, ours.shape)).ok
    for factor in (0.97, 1.03, 2.0, 0.0, -1.0):
        damaged = scale.copy()
        damaged[100] = damaged[100] * np.float16(factor)
        found = compare(ours, decode(codes, damaged, ours.shape))
        assert not found.ok and found.bad_blocks == 1, factor
        assert "[12, 128]" in found.message  # block 100 of 8 to a row
    damaged = codes.copy()
    damaged[17] = np.roll(damaged[17], 1)
    assert compare(ours, decode(damaged, scale, ours.shape)).bad_blocks == 1


def test_bf16_rounding_of_decoded_values_is_allowed_for() -> None:
    ours = weights()
    rounded = decode(*q8_0(ours), ours.shape).array.astype(BF16)
    assert compare(ours, ArrayTensor(rounded, stored="q8_0")).ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("spread", ["normal", "uneven"])
def test_bitsandbytes_four_bit(kind: str, double: bool, spread: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    ours = weights((300, 200), np.dtype(np.float32))  # rows that blocks of 64 straddle
    if spread == "uneven":
        ours *= np.exp(1.5 * np.random.default_rng(3).standard_normal((300, 1))).astype(np.float32)
        ours[40:60] = 0
    packed, state = functional.quantize_4bit(
        torch.from_numpy(ours), blocksize=64, quant_type=kind, compress_statistics=double
    )
    stored = f"{kind}-dq" if double else kind
    theirs = functional.dequantize_4bit(packed, state).numpy()
    found = compare(ours, ArrayTensor(theirs, stored=stored))
    assert found.ok, found.message
    blocks = np.abs(np.append(ours, np.zeros(-ours.size % 64, np.float32)).reshape(-1, 64)).max(1)
    first = 64 * int(
        blocks.argmax()
    )  # the scales of small blocks are coarse where they are quantized beside large ones
    damaged = theirs.copy()
    damaged.reshape(-1)[first : first + 64] *= 1.25
    assert compare(ours, ArrayTensor(damaged, stored=stored)).bad_blocks == 1
    if not double:
        damaged = theirs.copy()
        damaged.reshape(-1)[first : first + 64] *= 1.001
        assert compare(ours, ArrayTensor(damaged, stored=stored)).bad_blocks == 1, (
            "the largest value comes back exactly"
        )


def test_int8_by_rows() -> None:
    ours = weights(dtype=np.dtype(np.float16))
    scale = np.abs(ours.astype(np.float32)).max(1, keepdims=True)
    codes = np.round(ours.astype(np.float32) * 127 / scale)
    theirs = (codes * scale / 127).astype(np.float32)
    assert compare(ours, ArrayTensor(theirs, stored="int8")).ok
    theirs[9] *= 1.01
    assert compare(ours, ArrayTensor(theirs, stored="int8")).bad_blocks == 1


@pytest.mark.parametrize("stored", sorted(BOUNDS))
def test_another_tensor_is_within_no_types_bound(stored: str) -> None:
    ours, other = weights((64, 256)), weights((64, 256), seed=1).astype(np.float32)
    for weighted in (False, True):
        assert not compare(ours, ArrayTensor(other, stored=stored), weighted=weighted).ok


@pytest.mark.parametrize("stored", sorted(BOUNDS))
def test_zeros_are_within_no_types_bound(stored: str) -> None:
    ours = weights((64, 256))
    nothing = ArrayTensor(np.zeros((64, 256), np.float32), stored=stored)
    assert not compare(ours, nothing).ok


def test_an_unknown_type_is_measured_not_judged() -> None:
    ours = weights()
    found = compare(ours, ArrayTensor(ours.astype(np.float32) * 1.5, stored="q17"))
    assert found.ok and found.rule == "reported" and found.relative_rmse == pytest.approx(0.5)


def test_the_callers_ceiling_replaces_the_types() -> None:
    ours = weights()
    theirs = decode(*q8_0(ours), ours.shape)
    assert not compare(ours, theirs, max_relative_rmse=1e-4).ok


# -- measures ----------------------------------------------------------------------------------------------------------


def test_measures_are_those_of_double_precision() -> None:
    ours = weights((777, 64))
    theirs = decode(*q8_0(ours), ours.shape)
    found = compare(ours, theirs)
    error = theirs.array.astype(np.float64) - ours.astype(np.float64)
    rms = np.sqrt(np.mean(ours.astype(np.float64) ** 2))
    assert found.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    assert found.relative_rmse == pytest.approx(np.sqrt(np.mean(error**2)) / rms, rel=1e-5)
    assert found.snr_db == pytest.approx(20 * np.log10(rms / np.sqrt(np.mean(error**2))), rel=1e-5)
    assert found.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)


def test_result_depends_neither_on_threads_nor_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"t{i}" for i in range(5)]
    ours = {name: ArrayTensor(weights((100, 96), seed=i)) for i, name in enumerate(names)}
    theirs = {}
    for i, name in enumerate(names):
        codes, scale = q8_0(ours[name].array)
        scale[i * 7] *= np.float16(1.5)
        theirs[name] = decode(codes, scale, (100, 96))
    monkeypatch.setattr(subject, "CHUNK_VALUES", 96 * 7)
    one = compare_tensors(ours, theirs)
    assert compare_tensors(ours, theirs, threads=4) == one
    assert all(each.bad_blocks == 1 for each in one)
    monkeypatch.setattr(subject, "CHUNK_VALUES", 1 << 20)
    whole = compare_tensors(ours, theirs)
    assert [(each.message, each.bad_blocks) for each in whole] == [(each.message, each.bad_blocks) for each in one]
    assert [each.to_json() for each in whole] == [each.to_json() for each in one]


def test_progress_adds_up() -> None:
    ours = {name: ArrayTensor(weights((30, 96), seed=i)) for i, name in enumerate("ab")}
    seen: list[tuple[int, str]] = []
    compare_tensors(ours, ours, advance=lambda nbytes, name: seen.append((nbytes, name)))
    assert sum(nbytes for nbytes, _ in seen) == 2 * 30 * 96 * 2 and {name for _, name in seen} == {"a", "b"}


def test_a_reader_that_fails_is_heard() -> None:
    class Broken(ArrayTensor):
        def load_rows(self, first: int, last: int) -> np.ndarray:
            raise OSError("gone")

    for threads in (1, 3):
        with pytest.raises(OSError, match="gone"):
            compare_tensors({"t": ArrayTensor(weights())}, {"t": Broken(weights())}, threads=threads)


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_kind_is_the_loosest_type_that_loses_anything() -> None:
    ours = {name: ArrayTensor(weights(seed=i)) for i, name in enumerate("abc")}

    def kind(**stored: str) -> str:
        theirs = dict(ours) | {
            name: ArrayTensor(weights().astype(np.float32), stored=each) for name, each in stored.items()
        }
        return kind_of(ours, theirs, (), None)

    assert kind() == "lossless"
    assert kind(a="f32") == "lossless"
    assert kind(a="f16") == "f16"
    assert kind(a="q8_0", b="q4_0", c="q6_k") == "q4_0"
    assert kind(a="q8_0", b="mystery") == "unknown"
    wide = ours | {"a": ArrayTensor(weights().astype(np.float32))}
    assert kind_of(ours, wide, ("a",), None) == "convention"
    assert kind_of(ours, ours, ("a",), None) == "bf16", "arithmetic in a narrow type costs what the type does"
    assert (
        kind_of(ours, ours, ("a",), compare_tensors(ours, ours, TensorRules(expected={"a": ours["a"]}))) == "lossless"
    )
