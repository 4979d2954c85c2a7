"""Quantization rates of gemma2tool over the libraries', for the types of Hugging Face checkpoints, on one core.

    python benchmarks/int.py [--values 2e6] [--repeats 9] [--instruction-set avx2] [--libraries LIST] [--json FILE]

Both take the same bfloat16 matrix from memory and leave codes and scales in memory, alternating, on one thread. Each
call runs once to warm up and once timed; rates are of the median processor time. compressed-tensors, GPTQModel
(tests/gptqmodel.txt), torchao and mlx are measured if they can be imported. Of GPTQModel only its packing is, with the
scales given to both. Exits with 1 if codes differ or a goal is missed: nf4 and fp4 10 times bitsandbytes, int8 3
times, compressed-tensors, GPTQ, nvfp4 and mxfp4 5 times. ``--no-goals`` checks the codes alone, for runs too short to
time. ggml's side of NVFP4 and MXFP4 is in kernels.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from processes import argument_parser

from gemma2tool.model.lazy import Array, ArrayTensor
from gemma2tool.quantizers import bnb, compressed, compressed_floats, gptq, groups, kernels, mlx, torchao

COLUMNS = 2304  # a row of the 2B model


@dataclass(frozen=True)
class Rates:
    """Millions of weights a second of both sides."""

    gemma2tool: float
    library: float

    @property
    def ratio(self) -> float:
        return self.gemma2tool / self.library


@dataclass(frozen=True)
class Line:
    """One line of the table; ``goal`` is the ratio to reach, None where there is none."""

    name: str
    rates: Rates
    identical: bool
    goal: float | None

    @property
    def reaches_goal(self) -> bool:
        return self.goal is None or self.rates.ratio >= self.goal


def alternating_rates(
    gemma2tool: Callable[[], object], library: Callable[[], object], values: int, repeats: int
) -> Rates:
    """Rates of both functions, called in turn.

    Each call runs once to fill the caches, because the pipeline has just read what it encodes, and once timed.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((gemma2tool, library), times, strict=True):
            function()
            started = time.process_time()
            function()
            seconds.append(time.process_time() - started)
    return Rates(*(values / statistics.median(seconds) / 1e6 for seconds in times))


def is_identical(array: Array, tensor: torch.Tensor) -> bool:
    """Whether both hold the same bytes."""
    expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes() == expected.tobytes()


def bitsandbytes_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    from bitsandbytes import functional

    def four_bit(name: str) -> tuple[Line, Line]:
        packed, absmax = bnb.quantize_4bit(x.reshape(-1), name)
        codes, state = functional.quantize_4bit(weight, quant_type=name)
        quantize_rates = alternating_rates(
            lambda: bnb.quantize_4bit(x.reshape(-1), name),
            lambda: functional.quantize_4bit(weight, quant_type=name),
            x.size,
            repeats,
        )
        dequantize_rates = alternating_rates(
            lambda: bnb.dequantize_4bit(packed, absmax, name, x.size, x.dtype),
            lambda: functional.dequantize_4bit(codes, state),
            x.size,
            repeats,
        )
        values = bnb.dequantize_4bit(packed, absmax, name, x.size, x.dtype)
        same_codes = is_identical(packed, codes) and is_identical(absmax, state.absmax)
        same_values = is_identical(values, functional.dequantize_4bit(codes, state))
        return Line(name, quantize_rates, same_codes, 10), Line(f"{name} back", dequantize_rates, same_values, None)

    def int8() -> tuple[Line, Line]:
        quantized = bnb.quantize_int8(x)
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        quantize_rates = alternating_rates(
            lambda: bnb.quantize_int8(x),
            lambda: functional.int8_vectorwise_quant(weight.to(torch.float16)),
            x.size,
            repeats,
        )
        dequantize_rates = alternating_rates(
            lambda: bnb.dequantize_int8(*quantized),
            lambda: functional.int8_vectorwise_dequant(codes, scales),
            x.size,
            repeats,
        )
        same_codes = is_identical(quantized[0], codes) and is_identical(quantized[1], scales)
        same_values = is_identical(bnb.dequantize_int8(*quantized), functional.int8_vectorwise_dequant(codes, scales))
        return Line("int8", quantize_rates, same_codes, 3), Line("int8 back", dequantize_rates, same_values, None)

    return [*four_bit("nf4"), *four_bit("fp4"), *int8()]


def compressed_tensors_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def line(name: str) -> Line:
        scheme = compressed.SCHEMES[name]
        strategy = "group" if scheme.group_size else "channel"
        arguments = QuantizationArgs(
            num_bits=scheme.bits,
            type=scheme.kind,
            symmetric=scheme.symmetric,
            strategy=strategy,
            group_size=scheme.group_size,
        )

        def gemma2tool() -> Array:
            codes = compressed.quantize(x, scheme)[0]
            return compressed.pack(codes, scheme.bits) if scheme.packed else codes

        def library() -> torch.Tensor:
            grouped = weight.unflatten(-1, (-1, scheme.group_size or COLUMNS))
            scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
            if scheme.packed:
                state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
                targets = QuantizationScheme(targets=["Linear"], weights=arguments)
                return PackedQuantizationCompressor.compress(state, targets)["weight_packed"]
            return quantize(
                weight, scales, zeros, arguments, dtype=torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
            )

        rates = alternating_rates(gemma2tool, library, x.size, repeats)
        return Line(name, rates, is_identical(gemma2tool(), library()), 5)

    return [line(name) for name, scheme in compressed.SCHEMES.items() if scheme.block_rows == 1]


def compressed_floats_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    from gemma2tool.formats.packings.compressed_floats import config_group

    def line(name: str) -> Line:
        scheme = preset_name_to_scheme(name.upper(), ["Linear"])
        compressor = BaseCompressor.get_value_from_registry(str(config_group(name)["format"]))

        def gemma2tool() -> Array:
            parts = compressed_floats.CompressedFloats(name, x.dtype).surveyed(ArrayTensor(x)).encode(x)
            return parts.get("weight_packed", parts.get(""))

        def library() -> torch.Tensor:
            grouped = weight.unflatten(-1, (-1, scheme.weights.group_size))
            low, high = grouped.amin(-1), grouped.amax(-1)
            state = {"weight": weight}
            if compressed_floats.FLOAT_SCHEMES[name].has_tensor_scale:
                state["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
            state["weight_scale"], _ = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
            parts = compressor.compress(state, scheme)
            return parts["weight_packed"] if "weight_packed" in parts else parts["weight"]

        rates = alternating_rates(gemma2tool, library, x.size, repeats)
        return Line(name, rates, is_identical(gemma2tool(), library()), 5)

    return [line(name) for name in compressed_floats.FLOAT_SCHEMES]


def gptqmodel_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, columns = x.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight.float()
    g_idx = torch.arange(columns, dtype=torch.int32) // gptq.Gptq.group_size

    def line(bits: int) -> Line:
        encoder = gptq.Gptq(bits)
        zeros, scales = gptq.quantize(x, bits, encoder.group_size, symmetric=True)[1:]
        wide = scales.astype(np.float32)
        inputs = torch.from_numpy(wide), torch.from_numpy(zeros.astype(np.int32))
        packer = TorchLinear(bits, encoder.group_size, True, False, columns, rows)

        def gemma2tool() -> Array:
            codes = groups.quantize_groups(
                x, groups.GroupScales(encoder.group_size, wide, zeros), groups.Rule.ADD_ZERO, 0, 2**bits - 1
            )
            return encoder.finish(x.shape, encoder.pack(codes, zeros, scales))["qweight"]

        rates = alternating_rates(gemma2tool, lambda: packer.pack(linear, *inputs, g_idx), x.size, repeats)
        return Line(f"gptq-{bits} pack", rates, is_identical(gemma2tool(), packer.qweight), 5)

    return [line(4), line(8)]


def torchao_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    rates = alternating_rates(
        lambda: torchao.quantize(x), lambda: Int8Tensor.from_hp(weight, PerRow()), x.size, repeats
    )
    same = is_identical(torchao.quantize(x)[0], Int8Tensor.from_hp(weight, PerRow()).qdata)
    return [Line("torchao-int8", rates, same, None)]


def mlx_lines(x: Array, weight: torch.Tensor, repeats: int) -> list[Line]:
    import mlx.core as mx

    array = mx.view(mx.array(x.view(np.uint16)), mx.bfloat16)

    def line(name: str, encoder: mlx.Affine | mlx.Floats, goal: float | None, **options: object) -> Line:
        def library() -> Array:
            parts = mx.quantize(array, **options)
            mx.eval(parts)
            return np.array(parts[0])

        same = encoder.encode(x)[""].tobytes() == library().tobytes()
        return Line(name, alternating_rates(lambda: encoder.encode(x), library, x.size, repeats), same, goal)

    with mx.stream(mx.cpu):
        affine = [line(f"mlx-{bits}", mlx.Affine(bits), None, group_size=mlx.GROUP_SIZE, bits=bits) for bits in (4, 8)]
        goals = {"mxfp4": 5, "nvfp4": 5}
        return affine + [line(f"mlx-{mode}", mlx.Floats(mode), goals.get(mode), mode=mode) for mode in mlx.FLOAT_MODES]


LIBRARIES = {
    "bitsandbytes": bitsandbytes_lines,
    "compressed-tensors": compressed_tensors_lines,
    "compressed-tensors-floats": compressed_floats_lines,
    "gptqmodel": gptqmodel_lines,
    "torchao": torchao_lines,
    "mlx": mlx_lines,
}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--values", type=float, default=2e6, help="weights per measurement")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--instruction-set", choices=kernels.available_instruction_sets())
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="which ones, with commas")
    parser.add_argument("--json", type=Path, help="also write the lines here")
    parser.add_argument("--no-goals", action="store_true", help="do not fail on a missed goal")
    arguments = parser.parse_args()
    if arguments.instruction_set:
        kernels.use_instruction_set(arguments.instruction_set)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    shape = (max(32, int(arguments.values) // COLUMNS // 32 * 32), COLUMNS)
    x = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    weight = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)

    lines: list[Line] = []
    for library in arguments.libraries.split(","):
        try:
            lines += LIBRARIES[library](x, weight, arguments.repeats)
        except ImportError as error:
            print(f"{library}: left out ({error})", file=sys.stderr)
    header = f"{'type':14}{'gemma2tool':>11}{'library':>9}{'ratio':>8}"
    print(f"{header}   M weights/s, one core, {kernels.current_instruction_set()}")
    for line in lines:
        remark = "" if line.identical else "  CODES DIFFER"
        remark += f"  goal {line.goal:g}" + ("" if line.reaches_goal else " MISSED") if line.goal else ""
        rates = line.rates
        print(f"{line.name:14}{rates.gemma2tool:11.0f}{rates.library:9.0f}{rates.ratio:8.1f}{remark}")
    if arguments.json:
        rows = [asdict(line) | {"ratio": line.rates.ratio} for line in lines]
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0 if all(line.identical and (line.reaches_goal or arguments.no_goals) for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
