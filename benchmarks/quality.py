"""What each type costs in quality on the trained fixture: size, KL divergence, top-1 agreement, perplexity.

    python benchmarks/quality.py                        # the types that the README quotes
    python benchmarks/quality.py --types all            # every type; those that need an importance matrix get one
    python benchmarks/quality.py --types q4_k_m,iq4_xs
    python benchmarks/quality.py --calibrated           # folders' types, calibrated, beside rounded to nearest
    python benchmarks/quality.py --calibrated-gguf      # GGUF's types, calibrated, beside an importance matrix
    python benchmarks/quality.py --calibrated-gguf --witness llama.cpp   # measured by llama.cpp, too
    python benchmarks/quality.py --hessians             # GGUF's types, calibrated with both kinds of Hessian
    python benchmarks/quality.py --norms iq2_xxs        # GGUF's types, calibrated, with and without tuned norms
    python benchmarks/quality.py --model FOLDER --cross q4_k_m   # calibrated on one kind of text, judged on each

Prints a Markdown table. Every type is written by gemma2tool from fixtures/tiny-gemma2/model.ckpt, read back from its
file and run, dequantized, by the built-in float32 forward pass over the held-out tokens. KL is KL(source || type) in
nats, mean over positions; perplexity with its standard error. The calibration text is Python's language topics, without
those of the held-out text. ``--windows`` and ``--samples`` use less of both texts, ``--every`` spreads the windows,
``--length`` shortens them.
``--model`` measures another model, such as second_model.py's, with the texts beside it.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from llama_cpp_logits import llama_cpp_logits
from numpy.typing import NDArray
from processes import argument_parser

from gemma2tool.formats import registry
from gemma2tool.formats.options import GGUFOptions, PackingOptions, WriteOptions
from gemma2tool.formats.options_calibration import HESSIANS, Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.importance import ImatrixOptions, collect_imatrix
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.compare.logits import compare_logits
from gemma2tool.verify.compare.metrics import LogitComparison, LogitMetrics

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "tiny-gemma2"
FOLDER_TYPES = ("nf4", "nf4 double", "fp4", "fp4 double", "int8")
QUOTED = ("q8_0", "q4_0", "nf4", "int8")

PLAIN, TEXTBOOK = Calibration(), Calibration(method="textbook")
CALIBRATED: tuple[tuple[str, str, PackingOptions, Calibration], ...] = (
    ("nf4", "", PackingOptions(), PLAIN),
    ("nf4", "double quantization", PackingOptions(double_quant=True), PLAIN),
    ("fp4", "", PackingOptions(), PLAIN),
    ("int8", "", PackingOptions(), PLAIN),
    *((f"mlx-{bits}", "", PackingOptions(), PLAIN) for bits in (2, 3, 4, 5, 6, 8)),
    *((f"mlx-mixed-{bits}", "", PackingOptions(), PLAIN) for bits in ("2-6", "3-4", "3-6", "4-6")),
    ("w4a16", "groups of 128", PackingOptions(), PLAIN),
    ("w4a16-asym", "groups of 128", PackingOptions(), PLAIN),
    ("w8a16", "groups of 128", PackingOptions(), PLAIN),
    ("w8a8-int8", "", PackingOptions(), PLAIN),
    ("fp8-dynamic", "", PackingOptions(), PLAIN),
    ("fp8-block", "", PackingOptions(), PLAIN),
    ("torchao-int8", "", PackingOptions(), PLAIN),
    ("gptq-4", "groups of 32", PackingOptions(group_size=32), PLAIN),
    ("gptq-4", "groups of 128", PackingOptions(), PLAIN),
    ("gptq-4", "groups of 128, textbook", PackingOptions(), TEXTBOOK),
    ("gptq-4", "groups of 128, act-order", PackingOptions(), Calibration(act_order=True)),
    ("gptq-4", "groups of 128, asymmetric", PackingOptions(symmetric=False), PLAIN),
    ("gptq-4", "groups of 128, Hessian blocks of 256", PackingOptions(), Calibration(hessian_block=256)),
    ("gptq-4", "whole rows", PackingOptions(group_size=-1), PLAIN),
    ("gptq-8", "groups of 128", PackingOptions(), PLAIN),
    ("awq-4", "groups of 32", PackingOptions(group_size=32), PLAIN),
    ("awq-4", "groups of 64", PackingOptions(group_size=64), PLAIN),
    ("awq-4", "groups of 128", PackingOptions(), PLAIN),
    ("awq-4", "groups of 128, textbook (AWQ)", PackingOptions(), TEXTBOOK),
)
"""Type, description, and the options of the packing and of the calibration."""
CALIBRATED_GGUF = ("q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "q4_0", "iq4_xs", "q3_k_m", "q3_k_s", "iq3_m",
                   "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs")  # fmt: skip
BOOTSTRAP_DRAWS = 4000
JUDGING_WINDOWS = 12
"""Of each kind of text, for ``--cross``."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--types", default=",".join(QUOTED))
    parser.add_argument("--calibrated", nargs="?", const="all", metavar="TYPES", help="all of them, or these")
    parser.add_argument("--calibrated-gguf", nargs="?", const=",".join(CALIBRATED_GGUF), metavar="TYPES")
    parser.add_argument("--witness", choices=["llama.cpp"], help="for --calibrated-gguf: also measured by this engine")
    parser.add_argument("--hessians", nargs="?", const=",".join(CALIBRATED_GGUF), metavar="TYPES")
    parser.add_argument("--norms", metavar="TYPES")
    parser.add_argument("--cross", metavar="TYPES", help="GGUF types, on the kinds of text of --model")
    parser.add_argument("--model", type=Path, default=FIXTURE, help="a folder with model.ckpt and heldout.npy")
    parser.add_argument("--tokens", type=Path, help="held-out tokens; default: those of the model")
    parser.add_argument("--windows", type=int, help="use only the first windows of the held-out tokens")
    parser.add_argument("--every", type=int, default=1, help="use every N-th window only")
    parser.add_argument("--length", type=int, help="use only the first tokens of each window")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration text")
    arguments = parser.parse_args()
    tokens = np.load(arguments.tokens or arguments.model / "heldout.npy")
    ids = np.atleast_2d(tokens).astype(np.int64)[:: arguments.every, : arguments.length][: arguments.windows]
    print(f"{ids.shape[0] * (ids.shape[1] - 1):,} predicted tokens in {ids.shape[0]} windows of {ids.shape[1]}\n")
    text = arguments.model / "calibration.txt"
    with registry.open_checkpoint(arguments.model / "model.ckpt") as source, tempfile.TemporaryDirectory() as folder:
        run = Run(source, Path(folder), ids, arguments.samples, text if text.exists() else None)
        if arguments.cross:
            compare_texts(run, arguments.model, arguments.cross.split(","))
        elif arguments.norms:
            compare_norms(run, arguments.norms.split(","))
        elif arguments.hessians:
            compare_hessians(run, arguments.hessians.split(","))
        elif arguments.calibrated_gguf:
            compare_with_matrix(run, arguments.calibrated_gguf.split(","), has_witness=arguments.witness is not None)
        elif arguments.calibrated:
            all_types = [type for type, *_ in CALIBRATED]
            compare_with_nearest(run, all_types if arguments.calibrated == "all" else arguments.calibrated.split(","))
        else:
            all_types = [*FOLDER_TYPES, *gguf_types()]
            print_types(run, all_types if arguments.types == "all" else arguments.types.split(","))
    return 0


@dataclass(frozen=True)
class Run:
    """A model, a temporary folder, the held-out ids, (windows, T), the number of windows of calibration text, and the
    text; None: ``topics``.
    """

    source: Checkpoint
    folder: Path
    ids: NDArray[np.int64]
    samples: int
    text: Path | None = None

    @functools.cached_property
    def source_logits(self) -> NDArray[np.float32]:
        """(windows * T, V)"""
        return StreamedForward(self.source, self.ids).logits().reshape(self.ids.size, -1)

    @property
    def calibration_text(self) -> Path:
        return self.text or self.topics

    @functools.cached_property
    def topics(self) -> Path:
        """A file of Python's language topics, without those of the held-out text."""
        from pydoc_data.topics import topics

        sys.path.insert(0, str(FIXTURE.parent))
        from corpus import split_of

        path = self.folder / "topics.txt"
        training = (name for name in sorted(topics) if split_of(f"topics/{name}") == "train")
        path.write_text("\n\n".join(topics[name] for name in training))
        return path

    @functools.cached_property
    def importance_matrix(self) -> Path:
        """An importance matrix from chunks of 256 tokens of the calibration text."""
        options = ImatrixOptions(chunk_size=256, max_chunks=self.samples, threads=2)
        return collect_imatrix(self.source, self.calibration_text, self.folder / "importance.gguf", options).out

    def write(self, type: str) -> Path:
        """Write the fixture as ``type``: " im" adds an importance matrix, " double" adds double quantization."""
        name, _, variant = type.partition(" ")
        path = self.folder / (type.replace(" ", "-") + ("" if type in FOLDER_TYPES else ".gguf"))
        gguf = GGUFOptions(imatrix=self.importance_matrix if variant == "im" else None)
        packing = PackingOptions(double_quant=variant == "double")
        save(self.source, path, WriteOptions(type=name, gguf=gguf, packing=packing))
        return path

    def write_calibrated(self, type: str, **changes: bool) -> Path:
        """Write a GGUF of this type, calibrated."""
        path = self.folder / "calibrated.gguf"
        text = Calibration(text=self.calibration_text, length=self.ids.shape[1], samples=self.samples, **changes)
        result = save(self.source, path, WriteOptions(type=type, calibration=text), force=True, threads=2)
        if result.norm_tuning is not None:
            print(f"{type}: norms {result.norm_tuning.sentence()}", file=sys.stderr)
        return path

    def window_kl(self, path: Path, *, by_llama_cpp: bool = False) -> NDArray[np.float64]:
        """The mean KL of each window of a file, (windows,): run by the built-in forward pass, or by llama.cpp."""
        metrics = self._metrics(llama_cpp_logits(path, self.ids)) if by_llama_cpp else self.text_metrics(path)
        kl: NDArray[np.float64] = metrics.kl.reshape(self.ids.shape).mean(1)
        return kl

    def text_metrics(self, path: Path) -> LogitMetrics:
        """The metrics of a file's logits against the source's, each model with its own attention windows."""
        with registry.open_checkpoint(path) as candidate:
            return self._metrics(StreamedForward(candidate, self.ids).logits().reshape(self.ids.size, -1))

    def _metrics(self, logits: NDArray[np.float32]) -> LogitMetrics:
        """The metrics of logits (windows * T, V) against the source's."""
        following = np.append(self.ids[:, 1:], np.full((len(self.ids), 1), -1), 1).reshape(-1)
        comparison = LogitComparison(self.ids.size, following)
        comparison.add(0, self.source_logits, logits)
        return comparison.finish()

    def bits_per_weight(self, path: Path) -> float:
        return 8 * weights_bytes(path) / self.source.parameters


def print_types(run: Run, types: Sequence[str]) -> None:
    """The table of types, with the source in its first line."""
    print("| type | bits per weight | MB | mean KL | p99 KL | same top-1 | perplexity |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for number, type in enumerate(types):
        path = run.write(type)
        with registry.open_checkpoint(path) as candidate:
            metrics = compare_logits(run.source, candidate, run.ids).metrics
        prediction = metrics.prediction()
        if number == 0:
            value, error = prediction["perplexity_source"], prediction["perplexity_source_se"]
            megabytes = (FIXTURE / "model.ckpt").stat().st_size / 1e6
            print(f"| bf16 (source) | 16.00 | {megabytes:.2f} | 0 | 0 | 100 % | {value:.3f} ± {error:.3f} |")
        value, error = prediction["perplexity_candidate"], prediction["perplexity_candidate_se"]
        print(
            f"| {type} | {run.bits_per_weight(path):.2f} | {weights_bytes(path) / 1e6:.2f} | {metrics.mean_kl:.5f} |"
            f" {metrics.kl_percentile(99):.4f} | {100 * metrics.top1:.2f} % | {value:.3f} ± {error:.3f} |",
            flush=True,
        )


def compare_with_nearest(run: Run, types: Sequence[str]) -> None:
    """The table of calibrated types: rounded to nearest beside calibrated, with a 95 % interval of the ratio of their
    KL.
    """

    @functools.cache
    def measure(type: str, packing: PackingOptions, calibration: Calibration) -> tuple[LogitMetrics, float]:
        path = run.folder / "out"
        save(run.source, path, WriteOptions(type=type, packing=packing, calibration=calibration), force=True)
        return run.text_metrics(path), run.bits_per_weight(path)

    print("| type | | bits per weight | KL nearest | calibrated | ratio, 95 % interval | same top-1 | perplexity |")
    print("|---|---|---:|---:|---:|---|---:|---:|")
    for type, description, packing, calibration in CALIBRATED:
        if type not in types:
            continue
        calibration = replace(calibration, text=run.calibration_text, length=run.ids.shape[1], samples=run.samples)
        nearest, _ = measure(type, packing, Calibration())
        calibrated, bits_per_weight = measure(type, packing, calibration)
        kl_nearest, kl_calibrated = (side.kl.reshape(run.ids.shape).mean(1) for side in (nearest, calibrated))
        perplexity = [side.prediction()["perplexity_candidate"] for side in (nearest, calibrated)]
        print(
            f"| {type} | {description} | {bits_per_weight:.2f} | {kl_nearest.mean():.6f} | {kl_calibrated.mean():.6f} |"
            f" {ratio(kl_nearest, kl_calibrated)} |"
            f" {nearest.top1:.2%}, {calibrated.top1:.2%} | {perplexity[0]:.3f}, {perplexity[1]:.3f} |",
            flush=True,
        )


def compare_with_matrix(run: Run, types: Sequence[str], *, has_witness: bool = False) -> None:
    """The table of GGUF types: with an importance matrix beside calibrated, from the same text, with a 95 % interval of
    the ratio of their KL. ``has_witness``: the same by llama.cpp in another three columns.
    """
    columns = "KL importance matrix | calibrated | ratio, 95 % interval |"
    print(f"| type | bytes | {columns}{f' by llama.cpp: {columns}' if has_witness else ''}")
    print(f"|---|---:|{'---:|---:|---|' * (1 + has_witness)}")
    for type in types:
        files = run.write(f"{type} im"), run.write_calibrated(type)
        sizes = sorted({path.stat().st_size for path in files})
        cells = [" and ".join(f"{size:,}" for size in sizes)]
        for by_llama_cpp in (False, True)[: 1 + has_witness]:
            first, second = (run.window_kl(path, by_llama_cpp=by_llama_cpp) for path in files)
            cells += [f"{first.mean():.5f}", f"{second.mean():.5f}", ratio(first, second)]
        print(f"| {type} | {' | '.join(cells)} |", flush=True)


def compare_norms(run: Run, types: Sequence[str]) -> None:
    """The table of calibrated GGUF types with the source's norms and with tuned ones, with a 95 % interval of the ratio
    of their KL.
    """
    print("| type | KL calibrated | norms tuned | ratio, 95 % interval |")
    print("|---|---:|---:|---|")
    for type in types:
        first, second = (run.window_kl(run.write_calibrated(type, tune_norms=tunes)) for tunes in (False, True))
        print(f"| {type} | {first.mean():.5f} | {second.mean():.5f} | {ratio(first, second)} |", flush=True)


def compare_texts(run: Run, model: Path, types: Sequence[str]) -> None:
    """The table of GGUF types for which each kind of text beside ``model`` chooses the codes, and each one judges: the
    ratio of the calibrated file's KL to that with an importance matrix from the same text.
    """
    kinds = {path.stem.partition("-")[2]: path for path in sorted(model.glob("calibration-*.txt"))}
    print(f"| type | calibrated on | judged on: {' | '.join(kinds)} |")
    print(f"|---|---|{'---|' * len(kinds)}")
    sides = {kind: replace(run, text=text, folder=run.folder / kind) for kind, text in kinds.items()}
    for side in sides.values():
        side.folder.mkdir()
    for type in types:
        for kind, side in sides.items():
            ratios = []
            files = side.write(f"{type} im"), side.write_calibrated(type)
            for judge in kinds:
                ids = np.load(model / f"heldout-{judge}.npy").astype(np.int64)
                judged = replace(run, ids=ids[:: max(1, len(ids) // JUDGING_WINDOWS)])
                ratios.append(ratio(*(judged.window_kl(path) for path in files)))
            print(f"| {type} | {kind} | {' | '.join(ratios)} |", flush=True)


def compare_hessians(run: Run, types: Sequence[str]) -> None:
    """The table of GGUF types, calibrated: errors weighed by the layer beside errors weighed by the model, with a 95 %
    interval of the ratio of their KL, and the processor time of both.
    """
    print("| type | KL by layer | by model | ratio, 95 % interval | processor time |")
    print("|---|---:|---:|---|---:|")
    for type in types:
        kl, seconds = [], []
        for hessian in HESSIANS[::-1]:
            path, begin = run.folder / "out.gguf", time.process_time()
            text = Calibration(text=run.calibration_text, length=run.ids.shape[1], samples=run.samples, hessian=hessian)
            save(run.source, path, WriteOptions(type=type, calibration=text), force=True, threads=2)
            seconds.append(time.process_time() - begin)
            kl.append(run.text_metrics(path).kl.reshape(run.ids.shape).mean(1))
        means = " | ".join(f"{side.mean():.5f}" for side in kl)
        print(f"| {type} | {means} | {ratio(*kl)} | {seconds[0]:.0f} s, {seconds[1]:.0f} s |", flush=True)


def ratio(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """The ratio of the means, second over first, with its 95 % interval by bootstrap over windows; (windows,) each."""
    drawn = np.random.default_rng(0).integers(0, len(first), (BOOTSTRAP_DRAWS, len(first)))
    low, high = np.quantile(second[drawn].mean(1) / first[drawn].mean(1), [0.025, 0.975])
    return f"{second.mean() / first.mean():.3f} ({low:.3f} to {high:.3f})"


def weights_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def gguf_types() -> list[str]:
    """Every GGUF type, "im" behind those that need an importance matrix."""
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    needs_matrix = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xs", "iq3_xxs", "q2_k_s"}
    return [f"{name} im" if name in needs_matrix else name for name in FILE_TYPES]


if __name__ == "__main__":
    sys.exit(main())
