"""Our quantization rate over the libraries', for the integer and 4-bit types of Hugging Face checkpoints, on one core in one run.

    python benchmarks/int.py [--values 2e6] [--repeats 9] [--instruction-set avx2] [--json FILE]

Both sides take the same bfloat16 matrix from memory and leave codes and scales in memory, by turns, on one thread, each once to warm
up and once for the clock; rates are of the least processor time. bitsandbytes is always there; compressed-tensors, GPTQModel (tests/gptqmodel.txt), torchao and mlx take part when
they can be imported. Of GPTQModel its packing is measured, with scales given to both. Exits with 1 when a goal is missed (nf4 and
fp4 10 times bitsandbytes, int8 3 times, compressed-tensors and GPTQ 5 times) or when the two sides' codes differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np
import torch

from gemma2tool.quantizers import bnb, compressed, gptq, groups, kernels, mlx, torchao

COLUMNS = 2304  # a row of the 2B model


@dataclass(frozen=True)
class Line:
    """Millions of weights a second; ``goal`` is the ratio to reach, None where none is set."""

    name: str
    ours: float
    theirs: float
    identical: bool
    goal: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def passed(self) -> bool:
        return self.identical and (self.goal is None or self.ratio >= self.goal)


def by_turns(ours: Callable, theirs: Callable, values: int, repeats: int) -> tuple[float, float]:
    """Rates of both, by turns, each time once for the caches (the pipeline has just read what it encodes) and once for the clock."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, function in enumerate((ours, theirs)):
            function()
            started = time.process_time()
            function()
            times[side].append(time.process_time() - started)
    return tuple(values / min(each) / 1e6 for each in times)


def equal(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    return np.ascontiguousarray(ours).tobytes() == theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bitsandbytes_lines(x: np.ndarray, weight: torch.Tensor, repeats: int) -> list[Line]:
    import bitsandbytes.functional as F

    def four_bit(name: str) -> tuple[Line, Line]:
        packed, absmax = bnb.quantize_4bit(x.reshape(-1), name)
        codes, state = F.quantize_4bit(weight, quant_type=name)
        there = by_turns(
            lambda: bnb.quantize_4bit(x.reshape(-1), name),
            lambda: F.quantize_4bit(weight, quant_type=name),
            x.size,
            repeats,
        )
        back = by_turns(
            lambda: bnb.dequantize_4bit(packed, absmax, name, x.size, x.dtype),
            lambda: F.dequantize_4bit(codes, state),
            x.size,
            repeats,
        )
        values = bnb.dequantize_4bit(packed, absmax, name, x.size, x.dtype)
        same = equal(packed, codes) and equal(absmax, state.absmax)
        return Line(name, *there, same, 10), Line(
            f"{name} back", *back, equal(values, F.dequantize_4bit(codes, state)), None
        )

    def int8() -> tuple[Line, Line]:
        ours = bnb.quantize_int8(x)
        codes, scales, _ = F.int8_vectorwise_quant(weight.to(torch.float16))
        there = by_turns(
            lambda: bnb.quantize_int8(x),
            lambda: F.int8_vectorwise_quant(weight.to(torch.float16)),
            x.size,
            repeats,
        )
        back = by_turns(
            lambda: bnb.dequantize_int8(*ours), lambda: F.int8_vectorwise_dequant(codes, scales), x.size, repeats
        )
        same_back = equal(bnb.dequantize_int8(*ours), F.int8_vectorwise_dequant(codes, scales))
        same = equal(ours[0], codes) and equal(ours[1], scales)
        return Line("int8", *there, same, 3), Line("int8 back", *back, same_back, None)

    return [*four_bit("nf4"), *four_bit("fp4"), *int8()]


def compressed_tensors_lines(x: np.ndarray, weight: torch.Tensor, repeats: int) -> list[Line]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def line(name: str) -> Line:
        scheme = compressed.SCHEMES[name]
        strategy = "group" if scheme.group else "channel"
        arguments = QuantizationArgs(
            num_bits=scheme.bits,
            type=scheme.kind,
            symmetric=scheme.symmetric,
            strategy=strategy,
            group_size=scheme.group,
        )

        def ours() -> np.ndarray:
            codes = compressed.quantize(x, scheme)[0]
            return compressed.pack(codes, scheme.bits) if scheme.packed else codes

        def theirs() -> torch.Tensor:
            grouped = weight.unflatten(-1, (-1, scheme.group or COLUMNS))
            scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
            if scheme.packed:
                state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
                targets = QuantizationScheme(targets=["Linear"], weights=arguments)
                return PackedQuantizationCompressor.compress(state, targets)["weight_packed"]
            return quantize(
                weight, scales, zeros, arguments, dtype=torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
            )

        return Line(name, *by_turns(ours, theirs, x.size, repeats), equal(ours(), theirs()), 5)

    return [line(name) for name, scheme in compressed.SCHEMES.items() if scheme.block_rows == 1]


def gptqmodel_lines(x: np.ndarray, weight: torch.Tensor, repeats: int) -> list[Line]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, columns = x.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.float()
    g_idx = torch.arange(columns, dtype=torch.int32) // gptq.Gptq.group_size

    def line(bits: int) -> Line:
        encoder = gptq.Gptq(bits)
        zeros, scales = gptq.quantize(x, bits, encoder.group_size, symmetric=True)[1:]
        wide = scales.astype(np.float32)
        given = torch.from_numpy(wide), torch.from_numpy(zeros.astype(np.int32))
        theirs = TorchLinear(bits, encoder.group_size, True, False, columns, rows)

        def ours() -> np.ndarray:
            codes = groups.codes(x, encoder.group_size, groups.Rule.ADD_ZERO, wide, zeros, 0, 2**bits - 1)
            return encoder.finish(x.shape, encoder.pack(codes, zeros, scales))["qweight"]

        rates = by_turns(ours, lambda: theirs.pack(linear, *given, g_idx), x.size, repeats)
        return Line(f"gptq-{bits} pack", *rates, equal(ours(), theirs.qweight), 5)

    return [line(4), line(8)]


def torchao_lines(x: np.ndarray, weight: torch.Tensor, repeats: int) -> list[Line]:
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    ours, theirs = lambda: torchao.quantize(x), lambda: Int8Tensor.from_hp(weight, PerRow())
    same = equal(ours()[0], theirs().qdata)
    return [Line("torchao-int8", *by_turns(ours, theirs, x.size, repeats), same, None)]


def mlx_lines(x: np.ndarray, weight: torch.Tensor, repeats: int) -> list[Line]:
    import mlx.core as mx

    array = mx.view(mx.array(x.view(np.uint16)), mx.bfloat16)
    lines = []
    for bits in (4, 8):

        def ours(bits: int = bits) -> np.ndarray:
            codes = mlx.quantize(x, bits)[0]
            return mlx.pack_words(codes, bits)

        def theirs(bits: int = bits) -> np.ndarray:
            parts = mx.quantize(array, group_size=mlx.GROUP_SIZE, bits=bits)
            mx.eval(parts)
            return np.array(parts[0])

        same = ours().tobytes() == theirs().tobytes()
        lines.append(Line(f"mlx-{bits}", *by_turns(ours, theirs, x.size, repeats), same, None))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, default=2e6)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--instruction-set", choices=kernels.available_instruction_sets())
    parser.add_argument("--json", help="write the lines there")
    arguments = parser.parse_args()
    if arguments.instruction_set:
        kernels.use_instruction_set(arguments.instruction_set)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    shape = (max(32, int(arguments.values) // COLUMNS // 32 * 32), COLUMNS)
    x = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    weight = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)

    lines: list[Line] = []
    for library in (bitsandbytes_lines, compressed_tensors_lines, gptqmodel_lines, torchao_lines, mlx_lines):
        try:
            lines += library(x, weight, arguments.repeats)
        except ImportError as error:
            print(f"{library.__name__.removesuffix('_lines')}: left out ({error})", file=sys.stderr)
    print(
        f"{'type':14}{'ours':>9}{'library':>9}{'ratio':>8}   M weights/s, one core, {kernels.current_instruction_set()}"
    )
    for line in lines:
        remark = "" if line.identical else "  CODES DIFFER"
        remark += f"  goal {line.goal:g}" + ("" if line.passed else " MISSED") if line.goal else ""
        print(f"{line.name:14}{line.ours:9.0f}{line.theirs:9.0f}{line.ratio:8.1f}{remark}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(line) | {"ratio": line.ratio} for line in lines], file, indent=2)
    return 0 if all(line.passed for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
