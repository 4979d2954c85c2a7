"""Logits and generation: whole and streamed, in three dtypes, beside transformers."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from synthesize import random_checkpoint
from table import Table

from gemma2tool import api
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.conversion import save
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.streaming import StreamedForward

TINY = Path(__file__).resolve().parent.parent.parent / "fixtures" / "tiny-gemma2"
ATOL, RTOL = 5e-4, 1e-4
KL_LIMITS = {"f32": 1e-6, "bf16": 2e-2, "f16": 2e-3}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

Logits = NDArray[np.float32]


def mean_kl(reference: Logits, candidate: Logits) -> float:
    """Mean KL(reference || candidate) over all positions, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())


def compare(table: Table, name: str, dtype: str, reference: Logits, run: Callable[[], Logits]) -> None:
    start = time.perf_counter()
    logits = run()
    seconds = time.perf_counter() - start
    difference, kl = np.abs(logits - reference), mean_kl(reference, logits)
    within = bool((difference <= ATOL + RTOL * np.abs(reference)).all()) if dtype == "f32" else True
    result = f"largest {difference.max():.1e}, KL {kl:.1e}"
    table.row(name, seconds, result, passed=within and kl <= KL_LIMITS[dtype])


def logits_paths(table: Table, size: str, folder: Path) -> None:
    with api.open(TINY) as checkpoint:
        _logits_of(table, "fixture", checkpoint, np.load(TINY / "heldout.npy")[:2].astype(np.int64))
    checkpoint = random_checkpoint(size)
    ids = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, (1, 128))
    _logits_of(table, f"{size} shape", checkpoint, ids)


def _logits_of(table: Table, label: str, checkpoint: Checkpoint, ids: NDArray[np.int64]) -> None:
    start = time.perf_counter()
    reference = StreamedForward(checkpoint, ids, device="cpu").logits()
    table.row(f"{label}, streamed, f32, cpu", time.perf_counter() - start, "")
    for name, dtype in DTYPES.items():

        def streamed(dtype: torch.dtype = dtype) -> Logits:
            return StreamedForward(checkpoint, ids, dtype=dtype, device=table.device).logits()

        compare(table, f"{label}, streamed, {name}", name, reference, streamed)
        if name == "f32":
            same = np.array_equal(streamed(), streamed())
            table.row(f"{label}, streamed, {name}, twice", None, "bits equal" if same else "bits differ", passed=same)

        def whole(dtype: torch.dtype = dtype) -> Logits:
            model = Gemma2ForCausalLM.from_checkpoint(checkpoint, dtype=dtype, device=table.device)
            with torch.no_grad():
                values: Logits = model(torch.from_numpy(ids).to(table.device)).logits.float().cpu().numpy()
            return values

        compare(table, f"{label}, whole, {name}", name, reference, whole)
        _free()


def generation_paths(table: Table, size: str, folder: Path) -> None:
    """The same greedy tokens on the GPU as on the CPU."""
    for stream_weights in (False, True):
        texts = []
        start = time.perf_counter()
        for device in ("cpu", table.device):
            options = api.GenerationOptions(max_new_tokens=24, device=device, stream_weights=stream_weights)
            texts.append(api.generate(TINY, "def main(", options=options).tokens)
        name = "greedy, weights streamed" if stream_weights else "greedy"
        table.row(name, time.perf_counter() - start, "tokens as the CPU's", passed=texts[0] == texts[1])
    options = api.GenerationOptions(max_new_tokens=24, device=table.device, temperature=0.8, top_k=40, seed=7)
    same = api.generate(TINY, "The", options=options).tokens == api.generate(TINY, "The", options=options).tokens
    table.row("sampled twice with one seed", None, "the same tokens", passed=same)


def command_line(table: Table, size: str, folder: Path) -> None:
    ids = folder / "ids.npy"
    np.save(ids, np.load(TINY / "heldout.npy")[:1, :64])
    outputs = []
    for device in ("cpu", table.device):
        out = folder / f"{device}-{len(outputs)}.npy"
        words = ["logits", str(TINY), "--tokens", str(ids), "--out", str(out), "--device", device, "--quiet"]
        subprocess.run([sys.executable, "-m", "gemma2tool", *words], check=True, cwd=folder)
        outputs.append(np.load(out))
    difference = float(np.abs(outputs[0] - outputs[1]).max())
    table.row("gemma2tool logits --device", None, f"largest {difference:.1e}", passed=difference <= ATOL)


def transformers_paths(table: Table, size: str, folder: Path) -> None:
    """Logits beside transformers' on the same device, from the same folder in bfloat16, computed in float32."""
    from transformers import AutoModelForCausalLM

    path = folder / f"{size}-hf"
    save(random_checkpoint(size), path, api.WriteOptions(dtype="bf16"), to="hf")
    for tokens in (128, 2048 if size != "tiny" else 256):
        ids = np.random.default_rng(0).integers(3, random_checkpoint(size).config.vocab_size, (1, tokens))
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        model.to(table.device).eval()
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids).to(table.device)).logits.float().cpu().numpy()
        table.row(f"transformers, load and {tokens} tokens", time.perf_counter() - start, "")
        del model
        _free()
        with api.open(path) as checkpoint:
            compare(
                table,
                f"gemma2tool, streamed, {tokens} tokens",
                "f32",
                theirs,
                lambda opened=checkpoint, ids=ids: StreamedForward(opened, ids, device=table.device).logits(),  # type: ignore[misc]
            )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
