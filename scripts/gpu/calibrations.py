"""Importance matrices and calibrated types on the GPU: against the CPU's, and their time on a released shape."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from forwards import TINY
from synthesize import CONFIGS, PoolTensor, random_checkpoint, random_pool
from table import Table, timed

from gemma2tool import api
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import use_device
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import row_ranges
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.sensitivity.measured import window_divergence
from gemma2tool.quantizers import gptq
from gemma2tool.quantizers.calibration import rounding
from gemma2tool.quantizers.calibration.grid import grid_of
from gemma2tool.quantizers.calibration.hessian import Factor, Hessian, inverse_factors
from gemma2tool.reference.readahead import one_thread_each

TYPES = {"q4_k_m": "gguf", "gptq-4": "hf", "awq-4": "hf"}
SAMPLES = {"2b": (128, 2048), "tiny": (8, 64)}
LAYERS = {"2b": 4, "tiny": 2}
"""Of the model whose calibration is timed; the rest is like them."""


def importance_paths(table: Table, size: str, folder: Path) -> None:
    """Sums of squares on both devices, from the fixture's held-out text."""
    matrices, text = [], TINY / "heldout.txt"
    for number, device in enumerate(("cpu", table.device)):
        out = folder / f"imatrix-{number}.gguf"
        options = api.ImatrixOptions(chunk_size=128, max_chunks=16, output_weights=True, device=device)
        start = time.perf_counter()
        api.imatrix(TINY, out, text=text, options=options)
        matrices.append(_arrays(out))
        table.row(f"imatrix of the fixture, {device}", time.perf_counter() - start, "")
    largest = max(float(np.abs(matrices[1][name] / value - 1).max()) for name, value in matrices[0].items())
    table.row("imatrix, both", None, f"largest relative {largest:.1e}", passed=largest < 1e-4)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {tensor.name: np.array(tensor.data, np.float64) for tensor in GGUFReader(path).tensors}


def calibration_paths(table: Table, size: str, folder: Path) -> None:
    """The same type calibrated on both devices: how many bytes are equal, and the quality of both files."""
    ids = np.load(TINY / "heldout.npy")[-8:].astype(np.int64)
    for type, suffix in TYPES.items():
        divergences, contents = [], []
        for number, device in enumerate(("cpu", table.device)):
            out = folder / f"{type}-{number}{'.gguf' if suffix == 'gguf' else ''}"
            calibration = api.Calibration(text=TINY / "heldout.txt", samples=8, length=128)
            run = api.RunOptions(device=device, receipt=False)
            start = time.perf_counter()
            result = api.quantize(TINY, out, type=type, calibration=calibration, run=run)
            seconds = time.perf_counter() - start
            with api.open(TINY) as source, api.open(out) as candidate, use_device(device):
                divergences.append(float(window_divergence(source, candidate, ids).mean()))
            files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
            contents.append(np.concatenate([np.fromfile(file, np.uint8) for file in files]))
            passed = result.verification is not None and result.verification.passed
            table.row(f"{type}, {device}", seconds, f"KL {divergences[-1]:.4f}", passed=passed)
        equal = float((contents[0] == contents[1]).mean()) if len(contents[0]) == len(contents[1]) else 0.0
        ratio = divergences[1] / divergences[0]
        table.row(f"{type}, both", None, f"{equal:.1%} of bytes, KL ratio {ratio:.3f}", passed=0.9 < ratio < 1.1)


def time_calibration(table: Table, size: str, folder: Path) -> None:
    """The seconds of a layer and of the head, and what they come to for all layers."""
    samples, length = SAMPLES[size]
    config = dataclasses.replace(CONFIGS[size], num_hidden_layers=LAYERS[size], layer_types=())
    text = folder / "calibration.npy"
    np.save(text, np.random.default_rng(1).integers(3, config.vocab_size, (samples, length)))
    for type, hessian in (("gptq-4", None), ("q4_k_m", "layer"), ("q4_k_m", "model")):
        out = folder / f"timed-{type}-{hessian}{'.gguf' if hessian else ''}"
        calibration = api.Calibration(text=text, samples=samples, length=length)
        if hessian is not None:
            calibration = dataclasses.replace(calibration, hessian=hessian)
        seconds, in_layers = _timed_quantization(table, _model(config), out, type, calibration)
        whole = seconds + in_layers * (CONFIGS[size].num_hidden_layers / LAYERS[size] - 1)
        table.row(
            f"{type}{f', --hessian {hessian}' if hessian else ''}, {samples} x {length}, {LAYERS[size]} layers",
            seconds,
            f"{CONFIGS[size].num_hidden_layers} layers: about {whole:.0f} s",
        )
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            table.row("  peak of the GPU's memory", None, f"{peak:.1f} GiB")
            torch.cuda.reset_peak_memory_stats()


def _timed_quantization(
    table: Table, source: Checkpoint, out: Path, type: str, calibration: api.Calibration
) -> tuple[float, float]:
    """Seconds in all, and until the last tensor of a layer was written."""
    start = time.perf_counter()
    layers = [0.0]

    def progress(event: api.ProgressEvent) -> None:
        if ".layers." in event.name or "blk." in event.name:
            layers[0] = time.perf_counter() - start

    run = api.RunOptions(device=table.device, force=True)
    api.quantize(source, out, type=type, calibration=calibration, verify=False, run=run, progress=progress)
    return time.perf_counter() - start, layers[0]


def _model(config: api.Gemma2Config) -> Checkpoint:
    pool = random_pool()
    specs = tensor_specs(config).items()
    tensors = {name: PoolTensor(name, spec.shape, pool) for name, spec in specs if spec.required}
    return Checkpoint(Path("random"), FormatFacts("random"), config, tensors)


def peer_paths(table: Table, size: str, folder: Path) -> None:
    """Hessians and GPTQ of the matrices of one layer, int4 in groups of 128, beside llm-compressor's own function on
    the same inputs. It sums a Hessian for each matrix, gemma2tool one for each input.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    samples, length = SAMPLES[size]
    layer, inputs, tokens = _layer(size), {}, samples * length
    step = min(tokens, 8192)
    for columns in {weight.shape[1] for weight in layer.values()}:
        generator = torch.Generator().manual_seed(columns)
        mixing = torch.eye(columns) + 0.02 * torch.randn(columns, columns, generator=generator)
        inputs[columns] = (torch.randn(step, columns, generator=generator) @ mixing).to(table.device)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    losses: dict[str, dict[str, float]] = {"llm-compressor": {}, "gemma2tool": {}}

    def theirs() -> None:
        for name, weight in layer.items():
            x = inputs[weight.shape[1]]
            hessian = torch.zeros(weight.shape[1], weight.shape[1], device=table.device)
            for _ in range(tokens // step):
                hessian += 2 * x.T @ x
            on_device = weight.to(table.device)
            groups = on_device.view(len(weight), -1, 128)
            scale = groups.abs().amax(-1) / 7.5
            zeros = torch.zeros_like(scale, dtype=torch.int8)
            rounded, _, _ = quantize_weight(
                on_device.clone()[None], hessian[None] / tokens, scale[None], zeros[None], None, arguments
            )
            losses["llm-compressor"][name] = _loss(on_device - rounded[0], x)

    def ours() -> None:
        with ThreadPoolExecutor(api.default_threads()) as pool, one_thread_each():
            factors = {}
            for columns, x in inputs.items():
                hessian = Hessian(columns, device=table.device)
                for _ in range(tokens // step):
                    hessian.add(x, pool.map)
                factors[columns] = inverse_factors(hessian, 0.01, act_order=False)
            for name, weight in layer.items():
                values = _rounded(weight, factors[weight.shape[1]], pool)
                losses["gemma2tool"][name] = _loss((weight - values).to(table.device), inputs[weight.shape[1]])

    for name, work in (("llm-compressor", theirs), ("gemma2tool", ours)):
        seconds = min(timed(work) for _ in range(2))
        table.row(f"{name}, one layer, {samples} x {length}", seconds, f"loss {sum(losses[name].values()):.4g}")
    ratio = sum(losses["gemma2tool"].values()) / sum(losses["llm-compressor"].values())
    table.row("loss, gemma2tool over llm-compressor", None, f"{ratio:.3f}", passed=ratio < 1)


def _rounded(weight: torch.Tensor, factors: list[Factor], pool: ThreadPoolExecutor) -> torch.Tensor:
    """The values of a matrix (O, I) after GPTQ."""
    rows, columns = weight.shape
    grid = grid_of(gptq.Gptq(4, 128, symmetric=True), columns)
    assert grid is not None
    groups = rounding.group_of_column(factors, columns, grid.group_size)
    spans = row_ranges(rows, 1, rounding.ROWS)
    pieces = pool.map(lambda span: grid.round_rows(weight.numpy()[slice(*span)], factors), spans)
    return torch.from_numpy(grid.values(np.concatenate(list(pieces)), groups))


def _layer(size: str) -> dict[str, torch.Tensor]:
    """The matrices of a layer, float32."""
    tensors = random_checkpoint(size).tensors
    names = [name for name in tensors if name.startswith("model.layers.0.") and "_proj" in name]
    return {name: torch.from_numpy(tensors[name].load().astype(np.float32)) for name in names}


def _loss(error: torch.Tensor, x: torch.Tensor) -> float:
    """The mean square of what an error (O, I) changes of the outputs for inputs (T, I)."""
    return float((x[:1024] @ error.T).square().mean())
