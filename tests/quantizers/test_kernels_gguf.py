"""GGUF block types against ggml itself: the same bytes and the same floats decoded from them, for every instruction
set.

Where the xllamacpp wheel is installed ggml runs beside our kernels; ggml_digests.json holds digests of what it wrote,
for machines without the wheel and for the types whose tables it takes many seconds to build. tests/campaigns holds the
long comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.quantizers import kernels
from gemma2tool.quantizers.gguf_types import GGUF_TYPES, dequantize, quantize, row_bytes
from tests.support import kernel_data, llama_peer

needs_peer = pytest.mark.skipif(not llama_peer.available(), reason="xllamacpp is not installed")
BLOCK_TYPES = [name for name, row in GGUF_TYPES.items() if row.block_elements > 1]
SLOW_PEERS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")
NOT_IN_GGUF_PACKAGE = ("Q1_0", "Q2_0")
DIGESTS = json.loads(Path(__file__).with_name("ggml_digests.json").read_text())


@pytest.fixture(params=kernels.available_instruction_sets())
def instruction_set(request):
    before = kernels.current_instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


def assert_same_blocks(type: str, case: str, got: np.ndarray, expected: np.ndarray) -> None:
    if np.array_equal(got, expected):
        return
    blocks = GGUF_TYPES[type].block_bytes
    wrong = (got.reshape(-1, blocks) != expected.reshape(-1, blocks)).any(axis=1)
    first = int(np.argmax(wrong))
    pytest.fail(
        f"{type}, {case}: {wrong.sum()} of {wrong.size} blocks differ; block {first}:\n"
        f"  gemma2tool {got.reshape(-1, blocks)[first].tobytes().hex()}\n"
        f"  ggml {expected.reshape(-1, blocks)[first].tobytes().hex()}"
    )


@pytest.mark.peer
@needs_peer
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_sizes_are_ggmls(type):
    assert (GGUF_TYPES[type].block_elements, GGUF_TYPES[type].block_bytes) == llama_peer.sizes(type)


@pytest.mark.peer
@pytest.mark.slow
@needs_peer
@pytest.mark.parametrize("type", [type for type in BLOCK_TYPES if type not in SLOW_PEERS])
def test_codes_are_ggmls(type, instruction_set):
    for case, x, weights in kernel_data.cases(GGUF_TYPES[type]):
        assert_same_blocks(type, case, quantize(type, x, weights), llama_peer.quantize(type, x, weights))


@pytest.mark.slow
@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_codes_are_those_recorded_from_ggml(type, instruction_set):
    compared = 0
    for case, x, weights in kernel_data.cases(GGUF_TYPES[type]):
        recorded = DIGESTS[type][case]
        if recorded["input"] == kernel_data.digest(x, weights):  # random numbers may differ with another numpy
            assert kernel_data.digest(quantize(type, x, weights)) == recorded["codes"], case
            compared += 1
    if not compared:
        pytest.skip("this numpy makes other random numbers than those recorded")


@pytest.mark.slow
def test_a_better_split_may_score_lower(instruction_set):
    """A block in which rounding lowers the best score during the search, so that an earlier candidate would now be
    accepted."""
    block = np.load(Path(__file__).with_name("iq1_m_lower_score.npz"))
    assert_same_blocks("IQ1_M", "recorded", quantize("IQ1_M", block["x"], block["importance"]), block["codes"])


@pytest.mark.peer
@pytest.mark.slow
@needs_peer
@pytest.mark.parametrize("type", [*(type for type in BLOCK_TYPES if type not in SLOW_PEERS), "F16", "BF16"])
def test_floats_are_ggmls(type, instruction_set):
    for seed, kind in enumerate(kernel_data.ROWS):
        x = kernel_data.rows(kind, seed, 3, kernel_data.COLS)
        codes = llama_peer.quantize(type, x, np.ones(kernel_data.COLS, np.float32))
        got, expected = dequantize(type, codes, kernel_data.COLS), llama_peer.dequantize(type, codes, kernel_data.COLS)
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), (type, kind)


@pytest.mark.parametrize("type", [type for type in BLOCK_TYPES if type not in NOT_IN_GGUF_PACKAGE])
def test_floats_of_any_codes_are_those_of_the_gguf_package(type, instruction_set):
    """Random bytes contain codes and scales that no quantizer writes."""
    import gguf

    row = GGUF_TYPES[type]
    codes = np.random.default_rng(5).integers(0, 256, (7, row_bytes(type, kernel_data.COLS)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType(row.id))
    got = dequantize(type, codes, kernel_data.COLS)
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), (type, np.argwhere(~same)[:3])


@needs_peer
@pytest.mark.parametrize("type", NOT_IN_GGUF_PACKAGE)
def test_floats_of_any_codes_are_ggmls(type, instruction_set):
    size = row_bytes(type, kernel_data.COLS)
    codes = np.random.default_rng(5).integers(0, 256, (7, size), dtype=np.uint8)
    got, expected = dequantize(type, codes, kernel_data.COLS), llama_peer.dequantize(type, codes, kernel_data.COLS)
    assert ((got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))).all()


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_rows_are_independent_and_instruction_sets_agree(type):
    x = kernel_data.rows("heavy-tailed", 3, 19, 512)
    weights = kernel_data.importance("squares", 3, 512)
    before = kernels.current_instruction_set()
    try:
        every = []
        for isa in kernels.available_instruction_sets():
            kernels.use_instruction_set(isa)
            every.append(quantize(type, x, weights))
            one_by_one = np.concatenate([quantize(type, x[i : i + 1], weights) for i in range(19)])
            assert np.array_equal(every[-1], one_by_one)
        assert all(np.array_equal(codes, every[0]) for codes in every)
    finally:
        kernels.use_instruction_set(before)


def test_threads_share_the_kernels():
    x = kernel_data.rows("normal", 4, 64, 1024)
    weights = kernel_data.importance("squares", 4, 1024)
    with ThreadPoolExecutor(4) as threads:
        for type in ("Q4_K", "IQ3_XXS", "Q8_0"):
            parts = threads.map(lambda i, type=type: quantize(type, x[i : i + 8], weights), range(0, 64, 8))
            assert np.array_equal(np.concatenate(list(parts)), quantize(type, x, weights))


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_quantization_error_is_small(type):
    """Without a peer: the error of normal weights is as small as the bits of the type allow."""
    x = kernel_data.rows("normal", 8, 8, 2048)
    weights = np.ones(2048, np.float32)
    error = dequantize(type, quantize(type, x, weights), 2048) - x
    relative = float(np.sqrt((error**2).mean() / (x**2).mean()))
    bits = GGUF_TYPES[type].bits_per_weight
    scaled_by_the_largest = type == "Q2_0"  # most normal values round to 0
    assert relative < (1.0 if bits < 2.1 or scaled_by_the_largest else 2.2 * 2.0 ** -(bits - 0.3)), relative


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_invalid_values_do_not_crash(type, instruction_set):
    """Values must be finite, but NaN, infinity and weights of any bits neither crash nor write outside the output."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, (5, 512), dtype=np.uint32).view(np.float32)
    x[1], x[2], x[3, ::2] = np.inf, -3e38, np.nan
    weights = rng.integers(0, 2**32, 512, dtype=np.uint32).view(np.float32)
    weights[::7], weights[::5] = np.inf, np.nan
    room = np.full((7, row_bytes(type, 512)), 0xA5, np.uint8)
    quantize(type, x, weights, out=room[1:6])
    assert (room[[0, 6]] == 0xA5).all()
    back = np.full((7, 512), 1.5, np.float32)
    dequantize(type, room[1:6], 512, out=back[1:6])
    assert (back[[0, 6]] == 1.5).all()


def test_out_is_filled_and_refusals():
    x = kernel_data.rows("normal", 1, 2, 256)
    out = np.zeros((2, row_bytes("Q4_0", 256)), np.uint8)
    assert quantize("Q4_0", x, out=out) is out and np.array_equal(out, quantize("Q4_0", x))
    for call, message in [
        (lambda: quantize("Q9_9", x), "unknown GGUF type"),
        (lambda: quantize("Q4_K", x[:, :128]), "multiple of 256"),
        (lambda: quantize("Q4_0", x.astype(np.float64)), "float32"),
        (lambda: quantize("Q4_0", x[0]), "rows must be"),
        (lambda: quantize("Q4_0", x, np.ones(255, np.float32)), "importance must be"),
        (lambda: quantize("IQ2_XXS", x), "importance matrix"),
        (lambda: quantize("Q4_0", x, out=out[:1]), "out must be"),
        (lambda: dequantize("Q4_0", out, 288), "codes must be"),
        (lambda: dequantize("Q4_0", out.view(np.int8), 256), "codes must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "expected"), [("baseline", "baseline"), ("none-such", kernels.available_instruction_sets()[-1])]
)
def test_the_environment_selects_the_instruction_set(name, expected):
    code = "from gemma2tool.quantizers import kernels; print(kernels.current_instruction_set())"
    environment = os.environ | {"GEMMA2TOOL_INSTRUCTION_SET": name}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected


def test_an_unsupported_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'avx1024'"):
        kernels.use_instruction_set("avx1024")
