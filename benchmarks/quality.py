"""What each type costs in quality on the trained fixture: a Markdown table of size, KL divergence, top-1 agreement and perplexity.

    python benchmarks/quality.py                        # the types the README quotes
    python benchmarks/quality.py --types all            # every type; those that need an importance matrix get one
    python benchmarks/quality.py --types q4_k_m,iq4_xs
    python benchmarks/quality.py --calibrated           # GPTQ and AWQ beside the same types rounded to nearest

Every type is made by the tool from fixtures/tiny-gemma2/model.ckpt, read back from its file and run, dequantized, by the built-in
float32 forward pass over the held-out tokens. KL is KL(source || type) in nats, mean over positions; perplexity with its standard error.
Calibration text is Python's language topics, without those of the held-out text.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma2tool.formats import registry
from gemma2tool.formats.options import Calibration, GGUFOptions, PackingOptions, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.conversion import save
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.compare.logits import compare_logits
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "tiny-gemma2"
FOLDER_TYPES = ("nf4", "nf4 double", "fp4", "fp4 double", "int8")
QUOTED = ("q8_0", "q4_0", "nf4", "int8")

CALIBRATED: tuple[tuple[str, str, PackingOptions, Calibration], ...] = (
    ("gptq-4", "groups of 32", PackingOptions(group_size=32), Calibration()),
    ("gptq-4", "groups of 128", PackingOptions(group_size=128), Calibration()),
    ("gptq-4", "groups of 128, act-order", PackingOptions(group_size=128), Calibration(act_order=True)),
    ("gptq-4", "groups of 128, asymmetric", PackingOptions(group_size=128, symmetric=False), Calibration()),
    ("gptq-4", "groups of 128, Hessian blocks of 256", PackingOptions(group_size=128), Calibration(hessian_block=256)),
    ("gptq-4", "whole rows", PackingOptions(group_size=-1), Calibration()),
    ("gptq-8", "groups of 128", PackingOptions(group_size=128), Calibration()),
    ("w4a16", "groups of 128", PackingOptions(group_size=128), Calibration()),
    ("w4a16-asym", "groups of 128", PackingOptions(group_size=128), Calibration()),
    ("awq-4", "groups of 32", PackingOptions(group_size=32), Calibration()),
    ("awq-4", "groups of 64", PackingOptions(group_size=64), Calibration()),
    ("awq-4", "groups of 128", PackingOptions(group_size=128), Calibration()),
)
DRAWS = 4000


def make(source: Checkpoint, folder: Path, kind: str) -> Path:
    """Write the fixture in ``kind``; returns the path. "q4_k_m im": with an importance matrix, "nf4 double": double quantization."""
    name, _, how = kind.partition(" ")
    path = folder / (kind.replace(" ", "-") + ("" if kind in FOLDER_TYPES else ".gguf"))
    gguf = GGUFOptions(imatrix=calibrate(source, folder)) if how == "im" else GGUFOptions()
    packing = PackingOptions(double_quant=how == "double")
    save(source, path, WriteOptions(type=name, gguf=gguf, packing=packing))
    return path


def weights_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(QUOTED))
    parser.add_argument("--calibrated", nargs="?", const="", metavar="TYPES", help="all of them, or these")
    parser.add_argument("--tokens", type=Path, default=FIXTURE / "heldout.npy")
    arguments = parser.parse_args()
    kinds = list(FOLDER_TYPES) + gguf_types() if arguments.types == "all" else arguments.types.split(",")
    ids = np.atleast_2d(np.load(arguments.tokens))
    with registry.open_checkpoint(FIXTURE / "model.ckpt") as source, tempfile.TemporaryDirectory() as folder:
        parameters = sum(tensor.size for tensor in source.tensors.values())
        scored = ids.shape[0] * (ids.shape[1] - 1)
        print(f"{scored:,} predicted tokens in {ids.shape[0]} windows of {ids.shape[1]}\n")
        if arguments.calibrated is not None:
            wanted = arguments.calibrated.split(",") if arguments.calibrated else [kind for kind, *_ in CALIBRATED]
            beside_nearest(source, Path(folder), ids, parameters, wanted)
            return
        print("| type | bits per weight | MB | mean KL | p99 KL | same top-1 | perplexity |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        size = (FIXTURE / "model.ckpt").stat().st_size
        for number, kind in enumerate(kinds):
            path = make(source, Path(folder), kind)
            with registry.open_checkpoint(path) as candidate:
                metrics = compare_logits(source, candidate, ids).metrics
            said = metrics.prediction()
            if number == 0:
                value, error = said["perplexity_source"], said["perplexity_source_se"]
                print(f"| bf16 (source) | 16.00 | {size / 1e6:.2f} | 0 | 0 | 100 % | {value:.3f} ± {error:.3f} |")
            value, error = said["perplexity_candidate"], said["perplexity_candidate_se"]
            size = weights_bytes(path)
            print(
                f"| {kind} | {8 * size / parameters:.2f} | {size / 1e6:.2f} | {metrics.mean_kl:.5f} |"
                f" {metrics.kl_percentile(99):.4f} | {100 * metrics.top1:.2f} % | {value:.3f} ± {error:.3f} |",
                flush=True,
            )


def beside_nearest(source: Checkpoint, folder: Path, ids: np.ndarray, parameters: int, wanted: Sequence[str]) -> None:
    """The table of calibrated types: each figure rounded to nearest, then calibrated; the difference of KL with its 95 % interval."""
    chosen = {"text": text(folder), "length": ids.shape[1], "samples": 64}
    true = StreamedForward(source, ids).logits().reshape(ids.size, -1)

    @functools.cache
    def measured(kind: str, packing: PackingOptions, calibration: Calibration) -> tuple[LogitMetrics, int]:
        path = folder / "out"
        save(source, path, WriteOptions(type=kind, packing=packing, calibration=calibration), force=True)
        with registry.open_checkpoint(path) as candidate:
            logits = StreamedForward(candidate, ids).logits().reshape(ids.size, -1)
        compared = LogitComparison(ids.size, np.append(ids[:, 1:], np.full((len(ids), 1), -1), 1).reshape(-1))
        compared.add(0, true, logits)
        return compared.finish(), weights_bytes(path)

    print(
        "| type | | bits per weight | KL nearest | calibrated | difference, 95 % interval | same top-1 | perplexity |"
    )
    print("|---|---|---:|---:|---:|---|---:|---:|")
    for kind, words, packing, calibration in CALIBRATED:
        if kind not in wanted:
            continue
        nearest, _ = measured(kind, packing, Calibration())
        better, size = measured(kind, packing, replace(calibration, **chosen))
        kl = [side.kl.reshape(ids.shape).mean(1) for side in (nearest, better)]
        low, high = interval(kl[1] - kl[0])
        perplexity = [side.prediction()["perplexity_candidate"] for side in (nearest, better)]
        print(
            f"| {kind} | {words} | {8 * size / parameters:.2f} | {kl[0].mean():.5f} | {kl[1].mean():.5f} |"
            f" {(kl[1] - kl[0]).mean():+.5f} ({low:+.5f} to {high:+.5f}) | {nearest.top1:.2%}, {better.top1:.2%} |"
            f" {perplexity[0]:.3f}, {perplexity[1]:.3f} |",
            flush=True,
        )


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of ``difference`` (windows,), by drawing windows with replacement: both sides see the same windows."""
    drawn = np.random.default_rng(0).integers(0, len(difference), (DRAWS, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def gguf_types() -> list[str]:
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    needs_matrix = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xs", "iq3_xxs", "q2_k_s"}
    return [f"{name} im" if name in needs_matrix else name for name in FILE_TYPES]


def calibrate(source: Checkpoint, folder: Path) -> Path:
    """An importance matrix from 64 chunks of 256 tokens of ``text``."""
    from gemma2tool.pipeline import importance
    from gemma2tool.pipeline.prompt import Tokenizer

    path = folder / "importance.gguf"
    if not path.exists():
        ids = Tokenizer(source).encode(text(folder).read_text())
        chunks = importance.chunks_of(ids, 256, source.config.bos_token_id, 64)
        sums = importance.collect(source, chunks, threads=2)
        importance.write(path, source, sums, dataset="pydoc topics", chunks=chunks, force=False)
    return path


def text(folder: Path) -> Path:
    """A file of Python's language topics, without those of the held-out text."""
    from pydoc_data.topics import topics

    sys.path.insert(0, str(FIXTURE.parent))
    from corpus import split_of

    path = folder / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics) if split_of(f"topics/{name}") == "train"))
    return path


if __name__ == "__main__":
    main()
