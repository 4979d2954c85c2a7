"""The Python interface. Import it as ``gemma2tool``: this module is loaded when one of its names is first used.

    import gemma2tool

    result = gemma2tool.quantize("model.ckpt", "model.gguf", type="q4_k_m")
    assert result.passed

Paths are strings or ``pathlib.Path``. A checkpoint is given by its path, by an address ("hf://ORG/NAME", see
docs/sources.md), or as an object that ``open`` returned. Sizes are in bytes, times in seconds, KL divergences in nats
per token. Errors are the exceptions of ``gemma2tool.errors``. Warnings and notes go to the logger "gemma2tool".
``progress`` is called with a ``ProgressEvent`` from time to time, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2tool.api.arguments import Config, PathLike, Source, as_path
from gemma2tool.api.elsewhere import ELSEWHERE
from gemma2tool.api.publishing import plan_release, publish, release
from gemma2tool.api.recipes import read_recipe, run_on_ray
from gemma2tool.api.texts import (
    calibrate,
    imatrix,
    merge,
    plan_imatrix,
    plan_quality,
    plan_sensitivity,
    quality,
    sensitivity,
    text_label,
)
from gemma2tool.formats.option_info import parse_size
from gemma2tool.formats.options import Adapter, GGUFOptions, PackingOptions, SplitOptions, WriteOptions
from gemma2tool.formats.options_budget import Budget, parse_candidates
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline import conversion
from gemma2tool.pipeline.events import ProgressCallback, ProgressEvent, as_progress
from gemma2tool.pipeline.opening import log_warnings, open_source, opened
from gemma2tool.pipeline.plan import PlanSummary, TensorSummary
from gemma2tool.pipeline.receipts import outputs_with_receipts
from gemma2tool.pipeline.report_files import ReportFiles
from gemma2tool.pipeline.requests import Checks, ConversionRequest, OutputRequest, RunOptions, default_threads
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.verification import DiffRequest, VerifyRequest
from gemma2tool.verify.gates import gate_names, parse_gates

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gemma2tool.api.adapters import convert_adapter, is_adapter_conversion
    from gemma2tool.api.trust import ScanFinding, ScanResult, SignResult, scan, sign
    from gemma2tool.api.verifying import candidates, diff, verify, verify_request, verify_several
    from gemma2tool.formats.catalog import FormatEntry
    from gemma2tool.model.digest import Hashes
    from gemma2tool.pipeline.adapters import AdapterRequest, AdapterResult
    from gemma2tool.pipeline.budget.choice import BudgetChoice, BudgetOutcome
    from gemma2tool.pipeline.candidates import CandidateResult
    from gemma2tool.pipeline.checks.finding import CheckFinding, CheckResult
    from gemma2tool.pipeline.checks.run import CheckRequest
    from gemma2tool.pipeline.doctor import Diagnosis, Fact, doctor
    from gemma2tool.pipeline.generation import Generation, GenerationOptions
    from gemma2tool.pipeline.hessians.run import HessiansOptions, HessiansResult
    from gemma2tool.pipeline.importance import ImatrixOptions, ImatrixResult
    from gemma2tool.pipeline.inspection import Inspection
    from gemma2tool.pipeline.leftovers import Leftover
    from gemma2tool.pipeline.needs.needs import Needs
    from gemma2tool.pipeline.quality.files import QualityFiles
    from gemma2tool.pipeline.quality.request import QualityRequest
    from gemma2tool.pipeline.quality.result import Estimate, QualityPoint, QualityResult
    from gemma2tool.pipeline.ranks.together import rank_of_torchrun
    from gemma2tool.pipeline.recipe.run import RecipeRun
    from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
    from gemma2tool.pipeline.sensitivity.run import SensitivityResult
    from gemma2tool.pipeline.sensitivity.table import SensitivityTable
    from gemma2tool.pipeline.sharding.merge import MergeResult
    from gemma2tool.pipeline.sharding.shard import Shard, parse_shard, shard_from_environment
    from gemma2tool.publish.estimate import ReleasePlan
    from gemma2tool.publish.request import CardOptions, PublishRequest, ReleaseRequest, ReleaseResult
    from gemma2tool.verify.diagnosis.cause import Cause
    from gemma2tool.verify.difference import Difference
    from gemma2tool.verify.finding import Finding, GateResult
    from gemma2tool.verify.result import Failure, Verification

__all__ = [
    "Adapter", "AdapterRequest", "AdapterResult", "Budget", "BudgetChoice", "BudgetOutcome", "Calibration",
    "CandidateResult", "CardOptions", "Cause", "CheckFinding", "CheckRequest", "CheckResult", "Checkpoint", "Checks",
    "ConversionRequest", "ConversionResult", "Diagnosis", "DiffRequest", "Difference", "Estimate", "Fact", "Failure",
    "Finding", "FormatEntry", "GGUFOptions", "GateResult", "Gemma2Config", "Generation", "GenerationOptions", "Hashes",
    "HessiansOptions", "HessiansResult", "ImatrixOptions", "ImatrixResult", "Inspection", "Leftover", "MergeResult",
    "Needs", "OutputRequest", "PackingOptions", "PlanSummary", "ProgressEvent", "PublishRequest", "QualityFiles",
    "QualityPoint", "QualityRequest", "QualityResult", "RecipeRun", "ReleasePlan", "ReleaseRequest", "ReleaseResult",
    "ReportFiles", "RunOptions", "ScanFinding", "ScanResult", "SensitivityOptions", "SensitivityResult",
    "SensitivityTable", "ServerRequest", "Shard", "SignResult", "SplitOptions", "TensorSummary", "Verification",
    "VerifyRequest", "WriteOptions", "calibrate", "candidates", "check", "clean", "convert", "convert_adapter",
    "default_threads", "diff", "doctor", "formats", "gate_names", "generate", "hash", "imatrix", "inspect",
    "is_adapter_conversion", "log_warnings", "logits", "merge", "open", "outputs_with_receipts", "parse_candidates",
    "parse_gates", "parse_shard", "plan", "plan_imatrix", "plan_quality", "plan_release", "plan_sensitivity", "publish",
    "quality", "quantize", "rank_of_torchrun", "read_recipe", "release", "run", "run_on_ray", "scan", "sensitivity",
    "shard_from_environment", "sign", "text_label", "verify", "verify_request", "verify_several",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gemma2tool.{ELSEWHERE[name]}"), name)


def open(path: PathLike, *, config: Config | None = None, format: str | None = None) -> Checkpoint:
    """Open a checkpoint of any format. Headers are read now, tensors when they are requested.

    ``config``: for weights that come without a config: a ``Gemma2Config``, the path of a config.json, or "2b", "9b" or
    "27b", with "-it" for the instruction-tuned models. ``format``: read the files as this format instead of detecting
    it.

    The result is a context manager. ``checkpoint.tensors[name].load()`` returns an array of shape (out, in);
    ``load_rows(first, last)`` returns only those rows. Names are Hugging Face's; quantized tensors are dequantized.

    Raises ``InputRefused`` for files that are damaged, incomplete, hostile or not Gemma 2.
    """
    return open_source(path, config, format=format)


def convert(
    source: Source,
    destination: PathLike,
    *,
    to: str | None = None,
    dtype: str | None = None,
    config: Config | None = None,
    adapters: Sequence[PathLike | Adapter] = (),
    split: SplitOptions | None = None,
    max_shard_size: int | str = WriteOptions.max_shard_size,
    verify: bool = True,
    tokens: PathLike | None = None,
    text: PathLike | None = None,
    gates: Mapping[str, float] | None = None,
    sample: int = 0,
    allow_mismatch: bool = False,
    run: RunOptions | None = None,
    force: bool = False,
    reports: ReportFiles | None = None,
    progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Write the same values in another format, verify the output, and move it to the destination.

    ``to``: the target format; default: determined by the destination's name (.gguf, .ckpt, .sbs, otherwise a Hugging
    Face folder). ``dtype``: "f32", "f16" or "bf16"; default: the source's. ``adapters``: LoRA adapters to merge, in
    order. ``tokens``, ``text``: the input of the verification's forward passes. ``gates``: limits that replace the
    defaults, such as ``{"kl": 0.02}``. ``sample``: how many tokens the source and the output each add to the prompt,
    for people to compare. ``force``: replace an existing destination. ``run``: threads, memory and other settings.

    If the verification fails, nothing is written at the destination: ``result.written`` is False and
    ``result.verification`` gives the reason. Raises ``UsageError``, ``InputRefused`` or ``ResourceError``; in each case
    the destination is left unchanged.
    """
    request = ConversionRequest(
        source=source,
        destination=Path(destination),
        to=to,
        options=WriteOptions(
            dtype=dtype,
            max_shard_size=parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size,
            allow_mismatch=allow_mismatch,
            split=split or SplitOptions(),
            adapters=tuple(map(Adapter.of, adapters)),
        ),
        config=config,
        checks=Checks.of(tokens, text, gates, sample) if verify else None,
        run=(run or RunOptions()).with_force(force),
        reports=reports or ReportFiles(),
    )
    return conversion.convert(request, as_progress(progress))[0]


def quantize(
    source: Source,
    destination: PathLike,
    *,
    type: str | None = None,
    budget: Budget | None = None,
    to: str | None = None,
    dtype: str | None = None,
    config: Config | None = None,
    adapters: Sequence[PathLike | Adapter] = (),
    gguf: GGUFOptions | None = None,
    packing: PackingOptions | None = None,
    calibration: Calibration | None = None,
    split: SplitOptions | None = None,
    verify: bool = True,
    tokens: PathLike | None = None,
    text: PathLike | None = None,
    gates: Mapping[str, float] | None = None,
    sample: int = 0,
    allow_mismatch: bool = False,
    allow_requantize: bool = False,
    run: RunOptions | None = None,
    force: bool = False,
    reports: ReportFiles | None = None,
    progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Quantize a checkpoint of any format, verify the output, and move it to the destination.

    ``type``: "q4_k_m", "nf4", "w4a16", ...; ``formats()`` lists them. ``budget``: used instead of a type, for the best
    mixture of types for a size, a number of bits per weight or a KL divergence. ``gguf``, ``packing``: options for
    llama.cpp's types and for quantized folders. ``calibration``: choose codes by what the model computes on a text.
    ``allow_requantize``: accept a source that is already quantized. The other arguments, the result and the errors are
    those of ``convert``.
    """
    request = ConversionRequest(
        source=source,
        destination=Path(destination),
        types=() if type is None else (type.lower(),),
        budget=budget or Budget(),
        to=to,
        options=WriteOptions(
            dtype=dtype,
            allow_mismatch=allow_mismatch,
            allow_requantize=allow_requantize,
            split=split or SplitOptions(),
            gguf=gguf or GGUFOptions(),
            packing=packing or PackingOptions(),
            calibration=calibration or Calibration(),
            adapters=tuple(map(Adapter.of, adapters)),
        ),
        config=config,
        checks=Checks.of(tokens, text, gates, sample) if verify else None,
        run=(run or RunOptions()).with_force(force),
        reports=reports or ReportFiles(),
    )
    return conversion.convert(request, as_progress(progress))[0]


def run(
    request: ConversionRequest | RecipeRun | PathLike, *, progress: ProgressCallback | None = None
) -> tuple[ConversionResult, ...]:
    """Carry out a request, with one output for each type, in one pass over the source. ``request`` may also be the path
    of a recipe (docs/recipes.md) or one of the runs that ``read_recipe`` returned.
    """
    if isinstance(request, ConversionRequest):
        return conversion.convert(request, as_progress(progress))
    runs = read_recipe(request) if isinstance(request, (str, Path)) else (request,)
    return tuple(result for one in runs for result in one.carry_out(as_progress(progress)))


def plan(request: ConversionRequest | RecipeRun | PathLike) -> tuple[PlanSummary, ...]:
    """Return what a request or a recipe would write: files with their exact sizes, types, warnings and costs. Only
    headers are read.
    """
    if isinstance(request, ConversionRequest):
        return conversion.summarize(request)
    runs = read_recipe(request) if isinstance(request, (str, Path)) else (request,)
    return tuple(summary for one in runs for summary in one.summarize())


def check(
    source: Source,
    *,
    perplexity: bool = False,
    text: PathLike | None = None,
    sample: bool = False,
    config: Config | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> CheckResult:
    """Check whether a checkpoint is sane, without its source. ``result.sane`` is the verdict; ``result.findings`` gives
    the reasons. docs/check.md lists the checks. Raises ``InputRefused`` for a file that cannot be read.

    ``perplexity``: also run the forward pass over the built-in text. ``text``: run it over this file instead.
    ``sample``: also let the model answer a question.
    """
    from gemma2tool.pipeline.checks import run as checks

    threads = threads or default_threads()
    request = checks.CheckRequest(
        source=source, perplexity=perplexity, text=as_path(text), sample=sample, config=config, threads=threads
    )
    return checks.check(request, as_progress(progress))


def hash(
    source: Source,
    *,
    config: Config | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Hashes:
    """Return digests of a checkpoint's values. They are equal for the same model in any format, type, layout or number
    of files.
    """
    from gemma2tool.model.digest import hash_checkpoint

    with opened(source, config) as checkpoint:
        return hash_checkpoint(checkpoint, threads=threads or default_threads(), progress=as_progress(progress))


def logits(
    source: Source,
    tokens: PathLike | NDArray[np.integer],
    *,
    out: PathLike | None = None,
    config: Config | None = None,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
) -> NDArray[np.float32]:
    """Return float32 logits (B, T, V) for every position of ``tokens``, ids of shape (T,) or (B, T). Only one layer is
    in memory at a time.

    ``out``: also write the logits to this .npy file; the result is then a read-only memory map of the file.
    """
    from gemma2tool.pipeline.logits import compute_logits

    with opened(source, config) as checkpoint:
        threads = threads or default_threads()
        return compute_logits(checkpoint, tokens, as_path(out), force=force, threads=threads, device=device)


def generate(
    source: Source,
    prompt: str,
    *,
    config: Config | None = None,
    options: GenerationOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate text, with the chat template if the checkpoint has one. ``on_text`` receives each piece of text."""
    from gemma2tool.pipeline import generation

    with opened(source, config) as checkpoint:
        return generation.generate(checkpoint, prompt, options or generation.GenerationOptions(), on_text)


def inspect(source: Source, *, config: Config | None = None) -> Inspection:
    """Return a checkpoint's format, config, tensors and types. Only headers are read."""
    from gemma2tool.pipeline import inspection

    with opened(source, config, warn=False) as checkpoint:
        return inspection.inspect(checkpoint)


def formats() -> tuple[FormatEntry, ...]:
    """Return the formats that can be read or written, with their types."""
    from gemma2tool.formats import catalog

    return catalog.format_entries()


def clean(path: PathLike, *, dry_run: bool = False) -> list[Leftover]:
    """Remove what interrupted runs left beside ``path`` and, if ``path`` is a folder, directly inside it."""
    from gemma2tool.pipeline import leftovers

    return leftovers.remove_leftovers(Path(path), dry_run=dry_run)
