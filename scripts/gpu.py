"""Compare the forward pass on a GPU with the CPU's, path by path, and print a table. See scripts/gpu.sh.

Logits of the trained fixture and of a random model of the 2B shape, whole and streamed, in float32, bfloat16 and
float16; generation with and without streamed weights; the command line. The float32 limit is that of two float32
implementations on equal weights; the narrower types are held to the KL divergence of the CPU's own float32 logits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gemma2tool import api
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.streaming import StreamedForward

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny-gemma2"
ATOL, RTOL = 5e-4, 1e-4
KL_LIMITS = {"f32": 1e-6, "bf16": 2e-2, "f16": 2e-3}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Table:
    """Rows of the result, printed as they come."""

    def __init__(self) -> None:
        self.failures = 0
        print(f"{'path':44} {'seconds':>8} {'largest':>9} {'mean KL':>9}  verdict", flush=True)

    def row(self, name: str, seconds: float, difference: float, kl: float, *, passed: bool) -> None:
        self.failures += not passed
        verdict = "ok" if passed else "FAILED"
        print(f"{name:44} {seconds:8.2f} {difference:9.1e} {kl:9.1e}  {verdict}", flush=True)


def mean_kl(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """Mean KL(reference || candidate) over all positions, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())


def compare(
    table: Table, name: str, dtype: str, reference: NDArray[np.float32], run: Callable[[], NDArray[np.float32]]
) -> None:
    start = time.perf_counter()
    logits = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    difference = np.abs(logits - reference)
    kl = mean_kl(reference, logits)
    within = bool((difference <= ATOL + RTOL * np.abs(reference)).all()) if dtype == "f32" else True
    table.row(name, seconds, float(difference.max()), kl, passed=within and kl <= KL_LIMITS[dtype])


def logits_paths(table: Table, label: str, checkpoint: Checkpoint, ids: NDArray[np.int64]) -> None:
    """Streamed and whole logits of one checkpoint."""
    start = time.perf_counter()
    reference = StreamedForward(checkpoint, ids).logits()
    table.row(f"{label}, streamed, f32, cpu", time.perf_counter() - start, 0.0, 0.0, passed=True)
    for name, dtype in DTYPES.items():

        def streamed(dtype: torch.dtype = dtype) -> NDArray[np.float32]:
            return StreamedForward(checkpoint, ids, dtype=dtype, device="cuda").logits()

        compare(table, f"{label}, streamed, {name}, cuda", name, reference, streamed)
        compare(table, f"{label}, streamed, {name}, cuda, again", name, reference, streamed)

        def whole(dtype: torch.dtype = dtype) -> NDArray[np.float32]:
            model = Gemma2ForCausalLM.from_checkpoint(checkpoint, dtype=dtype, device="cuda")
            with torch.no_grad():
                return model(torch.from_numpy(ids).cuda()).logits.float().cpu().numpy()

        compare(table, f"{label}, whole, {name}, cuda", name, reference, whole)
        torch.cuda.empty_cache()


def generation_paths(table: Table) -> None:
    """The same greedy tokens on the GPU as on the CPU."""
    for stream_weights in (False, True):
        texts = []
        start = time.perf_counter()
        for device in ("cpu", "cuda"):
            options = api.GenerationOptions(max_new_tokens=24, device=device, stream_weights=stream_weights)
            texts.append(api.generate(TINY, "def main(", options=options).tokens)
        name = "generate, weights streamed" if stream_weights else "generate"
        table.row(name, time.perf_counter() - start, 0.0, 0.0, passed=texts[0] == texts[1])
    options = api.GenerationOptions(max_new_tokens=24, device="cuda", temperature=0.8, top_k=40, seed=7)
    same = api.generate(TINY, "The", options=options).tokens == api.generate(TINY, "The", options=options).tokens
    table.row("generate, sampled twice with one seed", 0.0, 0.0, 0.0, passed=same)


def command_line(table: Table, folder: Path) -> None:
    ids = folder / "ids.npy"
    np.save(ids, np.load(TINY / "heldout.npy")[:1, :64])
    outputs = []
    for device in ("cpu", "cuda"):
        out = folder / f"{device}.npy"
        words = ["logits", str(TINY), "--tokens", str(ids), "--out", str(out), "--device", device, "--quiet"]
        subprocess.run([sys.executable, "-m", "gemma2tool", *words], check=True, cwd=folder)
        outputs.append(np.load(out))
    difference = np.abs(outputs[0] - outputs[1]).max()
    table.row("command line: logits --device cuda", 0.0, float(difference), 0.0, passed=difference <= ATOL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=("2b", "tiny"), default="2b", help="the larger model; tiny: the fixture alone"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was compared")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TF32 {torch.backends.cuda.matmul.allow_tf32}")
    table = Table()
    with tempfile.TemporaryDirectory() as folder, api.open(TINY) as checkpoint:
        logits_paths(table, "fixture", checkpoint, np.load(TINY / "heldout.npy")[:2].astype(np.int64))
        generation_paths(table)
        command_line(table, Path(folder))
    if arguments.size == "2b":
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from synthesize import random_checkpoint

        ids = np.random.default_rng(0).integers(3, 256000, (1, 128))
        logits_paths(table, "2B shape", random_checkpoint("2b"), ids)
    print(f"{table.failures} failed" if table.failures else "all within their limits")
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
