"""All checks of one checkpoint, in one pass over its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.progress import Progress, progress_or_null
from gemma2tool.model.tensors import HEADS
from gemma2tool.pipeline.checks import speech
from gemma2tool.pipeline.checks.files import check_files
from gemma2tool.pipeline.checks.finding import SEVERITIES, CheckFinding, CheckResult
from gemma2tool.pipeline.checks.fit import check_fit
from gemma2tool.pipeline.checks.norms import check_norms, check_scales
from gemma2tool.pipeline.checks.provenance import check_config, check_writer
from gemma2tool.pipeline.checks.quantization import check_blocks, check_quantization
from gemma2tool.pipeline.checks.statistics import TensorStatistics, measure_tensors
from gemma2tool.pipeline.checks.template import check_templates
from gemma2tool.pipeline.checks.tensors import TensorCheck
from gemma2tool.pipeline.checks.tokenizer import check_tokenizer
from gemma2tool.pipeline.inputs import read_prompts
from gemma2tool.pipeline.opening import opened
from gemma2tool.pipeline.requests import default_threads
from gemma2tool.verify.prompts import built_in_prompt

_HEADERS: dict[str, Callable[[Checkpoint], Iterable[CheckFinding]]] = {
    "files": check_files,
    "config": check_config,
    "tokenizer": check_tokenizer,
    "template": check_templates,
    "quantization": check_quantization,
    "provenance": check_writer,
}
"""Areas that need headers and small files alone."""


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check.

    - ``source``: a path, or a checkpoint that is already open.
    - ``perplexity``: run the forward pass over ``text``, a file of UTF-8 text; None: the built-in text.
    - ``sample``: let the model answer a question.
    - ``config``: the config of weights that come without one.
    """

    source: Path | str | Checkpoint
    perplexity: bool = False
    text: Path | None = None
    sample: bool = False
    config: Gemma2Config | Path | str | None = None
    threads: int = field(default_factory=default_threads)


def check(request: CheckRequest, progress: Progress | None = None) -> CheckResult:
    """Check a checkpoint without its source.

    Raises ``InputRefused`` for a file that cannot be read; its message says what it is instead, where that can be seen.
    """
    with opened(request.source, request.config, warn=False) as checkpoint:
        findings = [finding for area in _HEADERS.values() for finding in area(checkpoint)]
        findings += _weights(checkpoint, request.threads, progress)
        skipped: dict[str, str] = {}
        value = text = None
        if request.perplexity or request.text is not None:
            value, more = _perplexity(checkpoint, request, skipped, progress)
            findings += more
        if request.sample and _can_speak(checkpoint, skipped):
            text, more = speech.sample(checkpoint, threads=request.threads)
            findings += more
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        return CheckResult(
            path=checkpoint.known_as,
            format=checkpoint.format,
            parameters=checkpoint.parameters,
            stored=tuple(Counter(tensor.stored for tensor in checkpoint.tensors.values()).most_common()),
            findings=tuple(dict.fromkeys(findings)),
            areas=("files", "tensors", "norms", *(area for area in _HEADERS if area != "files")),
            skipped=skipped,
            perplexity=value,
            sample=text,
        )


def _weights(checkpoint: Checkpoint, threads: int, progress: Progress | None) -> list[CheckFinding]:
    specs = checkpoint.specs
    tensors = {name: checkpoint.tensors[name] for name in specs}
    check, kept = TensorCheck(specs), dict[str, TensorStatistics]()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with progress_or_null(progress, nbytes, "checking tensors") as bar:
        for name, tensor in measure_tensors(tensors, threads=threads, advance=bar.advance):
            check.add(name, tensor)
            tensor.row_hashes = tensor.row_hashes[:0]  # so that memory stays small
            kept[name] = tensor
    findings = [*check.findings(), *check_norms(kept)]
    damaged = any(finding.severity != "note" for finding in findings)
    findings += check_fit(kept, checkpoint.config, damaged=damaged)
    return [*findings, *check_scales(kept, checkpoint.config), *check_blocks(kept)]


def _perplexity(
    checkpoint: Checkpoint, request: CheckRequest, skipped: dict[str, str], progress: Progress | None
) -> tuple[float | None, list[CheckFinding]]:
    if not _is_causal(checkpoint, skipped):
        return None, []
    ids = read_prompts(None, request.text, checkpoint)
    if ids is None:
        ids = built_in_prompt(checkpoint.config, checkpoint)
    if ids is None:
        skipped["perplexity"] = "no tokenizer that fits the model"
        return None, []
    return speech.perplexity(checkpoint, ids, threads=request.threads, progress=progress)


def _can_speak(checkpoint: Checkpoint, skipped: dict[str, str]) -> bool:
    if not _is_causal(checkpoint, skipped):
        return False
    if built_in_prompt(checkpoint.config, checkpoint) is None:
        skipped["sample"] = "no tokenizer that fits the model"
        return False
    return True


def _is_causal(checkpoint: Checkpoint, skipped: dict[str, str]) -> bool:
    if checkpoint.config.use_bidirectional_attention or any(name in checkpoint.tensors for name in HEADS):
        skipped["speech"] = "the model does not predict text"
        return False
    return True
