"""Verifies a checkpoint against a receipt: is it what was verified when the receipt was written? The source is not
needed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint, unchanged
from gemma2tool.model.digest import ALGORITHM, Hashes, hash_tensors, tokenizer_digest
from gemma2tool.model.loaders import config_names_code, files_acted_on
from gemma2tool.model.progress import Advance, Progress, progress_or_null
from gemma2tool.receipt.chat import chat_gate
from gemma2tool.receipt.document import Receipt
from gemma2tool.receipt.files import FileDigest, digest_files, file_names, file_path
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.reference_logits import ReferenceLogits, recompute
from gemma2tool.verify.compare.tensors import read_through
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES
from gemma2tool.verify.json_values import significant
from gemma2tool.verify.result import Side, Verification

_HARMLESS = re.compile(r"\.(?:git|cache)(?:/|$)|\.git[a-z]+$|\.DS_Store$")
"""What git, the hub's client and file managers leave in a folder."""

LEVELS = ("completeness", "config", "tokenizer", "chat", "files", "tensors", "logits")


def check_against_receipt(
    candidate: Checkpoint,
    receipt: Receipt,
    *,
    levels: Sequence[str] = LEVELS,
    threads: int = 1,
    progress: Progress | None = None,
) -> Verification:
    """Compare ``candidate`` with the output that ``receipt`` describes.

    Compared are the bytes of the files (if the format is the receipt's), the tensors' digests, the config, the
    tokenizer, chat templates and stop tokens, and the reference logits. Never raises for a difference, only for what
    cannot be read or run, or changes meanwhile. ``levels``: which of ``LEVELS`` to compare.
    """
    results: list[GateResult] = []
    seconds: dict[str, float] = {}

    def run_level(level: str, nbytes: int, gate: Callable[[Advance], GateResult]) -> None:
        if level in levels:
            start = time.perf_counter()
            with unchanged(candidate), progress_or_null(progress if nbytes else None, nbytes, level) as bar:
                results.append(gate(bar.advance))
            seconds[level] = time.perf_counter() - start

    nbytes = sum(tensor.nbytes for tensor in candidate.tensors.values())
    run_level("completeness", 0, lambda _: _names_gate(candidate, receipt))
    run_level("config", 0, lambda _: compare_configs(receipt.config, candidate.config))
    run_level("tokenizer", 0, lambda _: _tokenizer_gate(candidate, receipt))
    chat = receipt.content["output"].get("chat")
    run_level("chat", 0, lambda _: chat_gate(candidate, chat))
    run_level("files", receipt.nbytes, lambda advance: _files_gate(candidate, receipt, threads, advance))
    run_level("tensors", nbytes, lambda advance: _tensors_gate(candidate, receipt, threads, advance))
    run_level("logits", nbytes, lambda advance: _logits_gate(candidate, receipt, threads, advance))
    source = Side(str(receipt.path), "receipt")
    return Verification(source, Side.of(candidate), receipt.kind, tuple(results), seconds)


def _names_gate(candidate: Checkpoint, receipt: Receipt) -> GateResult:
    gate = "completeness"
    findings = []
    for name, shape in receipt.shapes.items():
        if name not in candidate.tensors:
            findings.append(Finding(gate, "error", name, "is in the receipt, but missing from the candidate"))
        elif (actual := tuple(candidate.tensors[name].shape)) != shape:
            message = f"has shape {shape} in the receipt, {actual} in the candidate"
            findings.append(Finding(gate, "error", name, message))
    extra = sorted(candidate.tensors.keys() - receipt.shapes.keys())
    findings += [Finding(gate, "error", name, "is in the candidate, but not in the receipt") for name in extra]
    metrics = {"receipt_tensors": len(receipt.shapes), "candidate_tensors": len(candidate.tensors)}
    summary = f"all {len(receipt.shapes)} tensors of the receipt are there, with the same shapes"
    return _result(gate, summary, metrics, findings)


def _tokenizer_gate(candidate: Checkpoint, receipt: Receipt) -> GateResult:
    gate, recorded = "tokenizer", receipt.hashes["tokenizer"]
    digest = tokenizer_digest(candidate)
    metrics = {"digest": digest}
    if recorded is None:
        return GateResult(gate, "skipped", "the receipt has no tokenizer", metrics)
    findings = []
    if digest != recorded:
        message = (
            "the tokenizer.model differs from the receipt's"
            if digest
            else "the tokenizer.model is missing or cannot be loaded"
        )
        findings.append(Finding(gate, "error", "tokenizer.model", message))
    return _result(gate, "pieces, scores and types are those of the receipt", metrics, findings)


def _files_gate(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate = "files"
    if candidate.format != receipt.format:
        formats = f"the receipt is for {receipt.format}, the candidate is {candidate.format}"
        return GateResult(gate, "skipped", f"{formats}: values are compared, bytes are not")
    findings = file_findings(
        candidate.path,
        receipt,
        names_code=config_names_code(candidate.config),
        digest=partial(digest_files, threads=threads, advance=advance),
    )
    metrics = {"files": len(receipt.files), "bytes": receipt.nbytes}
    summary = f"the bytes of {len(receipt.files)} file{'s' * (len(receipt.files) != 1)} are those that were written"
    return _result(gate, summary, metrics, findings)


def file_findings(
    path: Path,
    receipt: Receipt,
    *,
    names_code: bool = False,
    digest: Callable[[Path, list[str]], list[FileDigest]] = digest_files,
) -> list[Finding]:
    """Where the files at ``path`` are not those of the receipt: missing, changed, or added.

    ``names_code``: whether the config names Python files for loaders to run. ``digest``: hashes files of an output.
    """
    gate = "files"
    output, recorded = _recorded_files(path, receipt)
    paths = {name: file_path(output, name) for name in recorded}
    present = [name for name, file in paths.items() if file is not None and file.is_file()]
    findings = [
        Finding(gate, "error", name, "is in the receipt, but missing") for name in recorded.keys() - set(present)
    ]
    for actual in digest(output, present):
        expected = recorded[actual.name]
        if actual.sha256 != expected.sha256:
            sizes = "" if actual.nbytes == expected.nbytes else f", {expected.nbytes} bytes then, {actual.nbytes} now"
            digests = f"SHA-256 {expected.sha256[:16]}... then, {actual.sha256[:16]}... now"
            message = f"its bytes differ from those that were written ({digests}{sizes})"
            findings.append(Finding(gate, "error", actual.name, message))
    findings.sort(key=lambda finding: str(finding.subject))
    if output == path:
        findings += _added_files(path, receipt.format, recorded.keys(), names_code=names_code)
    return findings


def _added_files(path: Path, format_name: str, recorded: Set[str], *, names_code: bool) -> Iterator[Finding]:
    """Files that the receipt does not list: an error if a loader acts on them, else a note."""
    present = set(file_names(path))
    added = {name for name in present - recorded if not _HARMLESS.match(name)}
    for files in files_acted_on(format_name, present, added, names_code=names_code):
        for name in files.names:
            message = f"was not there when the receipt was written, and {files.sentence}"
            yield Finding("files", "error", name, message)
        added -= set(files.names)
    for name in sorted(added):
        yield Finding("files", "note", name, "was not there when the receipt was written")


def _recorded_files(path: Path, receipt: Receipt) -> tuple[Path, dict[str, FileDigest]]:
    """The output to look for files in, and the receipt's files by their names there."""
    recorded = {file.name: file for file in receipt.files}
    if path.is_dir():
        return path, recorded
    if len(recorded) == 1:  # a single file may have been renamed
        return path, {path.name: next(iter(recorded.values()))}
    return path.parent, recorded  # the path is one file of a folder, such as a shard


def _tensors_gate(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate = "tensors"
    digests = hash_tensors(candidate.tensors, threads=threads, advance=advance)
    read_through(candidate.buffers.values())
    names: dict[str, str] = {}
    for name, recorded in receipt.digests.items():
        names.setdefault(recorded, name)
    findings = []
    for name, recorded in receipt.digests.items():
        digest = digests.get(name, recorded)
        if digest != recorded:
            now = f"they are those of {names[digest]}" if digest in names else f"{digest[:16]}... now"
            message = f"its values differ from those that were verified (digest {recorded[:16]}... then, {now})"
            findings.append(Finding(gate, "error", name, message))
    hashes = Hashes.of(digests, candidate).to_json()
    metrics: dict[str, Any] = {"count": len(digests), "hashes": hashes}
    summary = f"the values of {len(digests)} tensors have the digests of the receipt ({ALGORITHM})"
    return _result(gate, summary, metrics, findings)


def _logits_gate(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate, reference = "logits", receipt.logits
    if reference is None:
        return GateResult(gate, "skipped", "the receipt has no logits")
    shapes = {name: tuple(tensor.shape) for name, tensor in candidate.tensors.items()}
    if shapes != receipt.shapes or candidate.config.vocab_size != receipt.config.vocab_size:
        reason = "the tensors are not those of the receipt, so no forward pass can be compared"
        return GateResult(gate, "skipped", reason)
    limits = GATES["lossless"]
    atol, rtol = limits.logits or 0.0, limits.logits_rtol or 0.0
    recomputed = recompute(candidate, reference, threads=threads, advance=advance)
    difference, beyond = _compare_logits(recomputed, reference, atol, rtol)
    positions, count = reference.tokens.shape
    metrics = {
        "positions": positions,
        "tokens": count,
        "max_abs_difference": significant(difference),
        "beyond_limit": beyond,
        "limits": {"logits": limits.logits, "logits_rtol": limits.logits_rtol},
    }
    findings = []
    if beyond:
        message = (
            f"{beyond} of {positions * (count + 1)} reference values differ from the receipt's by more than {atol:g} +"
            f" {rtol:g} x |value|; the largest difference is {difference:.4g}"
        )
        findings.append(Finding(gate, "error", None, message))
    compared = f"{count} tokens at {positions} positions, and their sums"
    return _result(gate, f"largest difference {difference:.3g} from the receipt's ({compared})", metrics, findings)


def _compare_logits(actual: ReferenceLogits, expected: ReferenceLogits, atol: float, rtol: float) -> tuple[float, int]:
    """The largest difference, infinite where a value is not finite, and the number of values beyond the limit."""
    now, then = (np.concatenate([side.logits.ravel(), side.log_sum]).astype(np.float64) for side in (actual, expected))
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isfinite(now) & np.isfinite(then), np.abs(now - then), np.inf)
        return float(difference.max()), int(np.count_nonzero(~(difference <= atol + rtol * np.abs(then))))


def _result(gate: str, summary: str, metrics: dict[str, Any], findings: list[Finding]) -> GateResult:
    """The gate's result; ``summary`` is used if there is no error."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return GateResult(gate, "passed", summary, metrics, tuple(findings))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return GateResult(gate, "failed", f"{errors[0].sentence}{more}", metrics, tuple(findings))
