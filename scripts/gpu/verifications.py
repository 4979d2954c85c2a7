"""Verification and quality on the GPU: the CPU's verdicts, planted faults, bitsandbytes' own codes, and the time of a
released shape.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from forwards import TINY
from synthesize import random_checkpoint
from table import Table

from gemma2tool import api
from gemma2tool.pipeline.conversion import save
from gemma2tool.quantizers import bnb
from gemma2tool.verify.result import Verification

LARGE = {"2b": "9b", "tiny": "tiny"}
"""The shape whose verification is timed."""


def verification_paths(table: Table, size: str, folder: Path) -> None:
    out = folder / "verified.gguf"
    run = api.RunOptions(device=table.device)
    written = api.quantize(TINY / "model.ckpt", out, type="q4_k_m", run=run)
    assert written.verification is not None
    table.row("quantize q4_k_m, verified", written.seconds, "passed", passed=written.verification.passed)
    values: dict[int, Verification] = {}
    for number, device in enumerate(("cpu", table.device)):
        start = time.perf_counter()
        result = api.verify(out, reference=TINY / "model.ckpt", device=device)
        values[number] = result
        table.row(
            f"verify --reference, {device}", time.perf_counter() - start, result.verdict[:34], passed=result.passed
        )
    kl = [_kl(values[number]) for number in (0, 1)]
    table.row("KL of both", None, f"{kl[0]:.6f}, {kl[1]:.6f}", passed=abs(kl[1] / kl[0] - 1) < 1e-3)
    start = time.perf_counter()
    result = api.verify(out, device=table.device)
    table.row("verify by the receipt", time.perf_counter() - start, result.verdict[:34], passed=result.passed)
    lossless = api.convert(TINY / "model.ckpt", folder / "lossless", to="hf", run=run)
    assert lossless.verification is not None
    table.row("convert to hf, verified", lossless.seconds, "passed", passed=lossless.verification.passed)
    config = folder / "lossless" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "query_pre_attn_scalar": 33}))
    fault = api.verify(folder / "lossless", reference=TINY / "model.ckpt", device=table.device)
    named = any("query_pre_attn_scalar" in str(cause.to_json()) for cause in fault.causes)
    table.row("a planted fault", None, "named" if named else "not named", passed=not fault.passed and named)
    texts = (("held out", TINY / "heldout.txt"),)
    estimates = []
    for device in ("cpu", table.device):
        request = api.QualityRequest(files=(out,), texts=texts, windows=4, device=device)
        estimates.append(api.quality(TINY, request).points[0].kl["held out"].mean)
    table.row(
        "quality",
        None,
        f"KL {estimates[0]:.6f}, {estimates[1]:.6f}",
        passed=abs(estimates[1] / estimates[0] - 1) < 1e-3,
    )


def _kl(result: Verification) -> float:
    (kl,) = [gate.metrics["kl_mean"] for gate in result.gates if gate.name == "distribution"]
    return float(kl)


def library_paths(table: Table, size: str, folder: Path) -> None:
    """bitsandbytes' kernels on the device: their codes beside ours, for the same bfloat16 weight."""
    import bitsandbytes.functional as library

    tensors = random_checkpoint(size).tensors
    values = tensors["model.layers.0.mlp.up_proj.weight"].load()
    weight = torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16).to(table.device)
    for kind in ("nf4", "fp4"):
        theirs, state = library.quantize_4bit(weight, blocksize=64, quant_type=kind)
        codes, absmax = bnb.quantize_4bit(values.reshape(-1), kind)
        same = float((theirs.cpu().numpy().reshape(-1) == np.asarray(codes).reshape(-1)).mean())
        scales = np.array_equal(state.absmax.cpu().numpy().reshape(-1), np.asarray(absmax).reshape(-1))
        result = f"{same:.5%} of codes, absmax {'equal' if scales else 'differ'}"
        table.row(f"{kind}, {values.size / 1e6:.1f} M values", None, result, passed=same > 0.99999 and scales)
    theirs, _, _ = library.int8_vectorwise_quant(weight.half())
    codes, absmax = bnb.quantize_int8(values.astype(np.float16))
    same = float((theirs.cpu().numpy() == codes).mean())
    table.row("int8", None, f"{same:.6%} of codes", passed=same > 0.9999)


def time_verification(table: Table, size: str, folder: Path) -> None:
    """All gates of a q4_k_m against its source, 128 tokens: on the device, and on the CPU."""
    shape = LARGE[size]
    source, out = folder / f"{shape}-source", folder / f"{shape}.gguf"
    start = time.perf_counter()
    save(random_checkpoint(shape), source, api.WriteOptions(dtype="bf16"), to="hf", threads=api.default_threads())
    table.row(f"{shape} shape, written in bfloat16", time.perf_counter() - start, "")
    start = time.perf_counter()
    api.quantize(source, out, type="q4_k_m", verify=False)
    table.row("quantize q4_k_m --no-verify", time.perf_counter() - start, "")
    tokens = folder / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(3, random_checkpoint(shape).config.vocab_size, 128))
    for device in (table.device, "cpu"):
        start = time.perf_counter()
        result = api.verify(out, reference=source, tokens=tokens, device=device)
        seconds = time.perf_counter() - start
        limited = device != "cpu" and table.device != "cpu" and shape == "9b"
        # Random weights have no language to lose: the verdict on quality is not what is asked here.
        table.row(f"verify --device {device}", seconds, result.verdict[:34], passed=not limited or seconds < 60)
