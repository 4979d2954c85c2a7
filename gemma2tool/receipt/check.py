"""A checkpoint against a receipt: is it, still, what was verified when the receipt was written? No source needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.progress import Advance, Progress, progress_or_null
from gemma2tool.receipt.document import Receipt
from gemma2tool.receipt.files import digest_files, names_in, place
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.reference_logits import ReferenceLogits, recompute
from gemma2tool.verify.compare.tensors import read_through
from gemma2tool.verify.digest import ALGORITHM, Hashes, hash_tensors, tokenizer_digest
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.gates import GATES
from gemma2tool.verify.json_values import significant
from gemma2tool.verify.result import Side, Verification
from gemma2tool.verify.run import side_of

_AGAIN = "what was verified when the receipt was written"


LEVELS = ("completeness", "config", "tokenizer", "files", "tensors", "logits")


def check(
    candidate: Checkpoint,
    receipt: Receipt,
    *,
    levels: Sequence[str] = LEVELS,
    threads: int = 1,
    progress: Progress | None = None,
) -> Verification:
    """``candidate`` against the output that ``receipt`` describes: its files' bytes (where it is of the same format), tensors,
    config, tokenizer and reference logits. Never raises for a difference, only for what cannot be read or run.

    ``levels``: which questions to ask, of ``LEVELS``.
    """
    results: list[GateResult] = []
    seconds: dict[str, float] = {}

    def ask(level: str, nbytes: int, question: Callable[[Advance], GateResult]) -> None:
        if level in levels:
            start = time.perf_counter()
            with progress_or_null(progress if nbytes else None, nbytes, level) as bar:
                results.append(question(bar.advance))
            seconds[level] = time.perf_counter() - start

    values = sum(tensor.nbytes for tensor in candidate.tensors.values())
    ask("completeness", 0, lambda _: _names(candidate, receipt))
    ask("config", 0, lambda _: compare_configs(receipt.config, candidate.config))
    ask("tokenizer", 0, lambda _: _tokenizer(candidate, receipt))
    ask("files", receipt.nbytes, lambda advance: _files(candidate, receipt, threads, advance))
    ask("tensors", values, lambda advance: _tensors(candidate, receipt, threads, advance))
    ask("logits", values, lambda advance: _logits(candidate, receipt, threads, advance))
    source = Side(str(receipt.path), "receipt")
    return Verification(source, side_of(candidate), receipt.kind, tuple(results), seconds)


def _names(candidate: Checkpoint, receipt: Receipt) -> GateResult:
    gate, findings = "completeness", []
    for name, shape in receipt.shapes.items():
        if name not in candidate.tensors:
            findings.append(Finding(gate, "error", name, "is in the receipt, but missing from the candidate"))
        elif (found := tuple(candidate.tensors[name].shape)) != shape:
            findings.append(Finding(gate, "error", name, f"has shape {shape} in the receipt, {found} in the candidate"))
    for name in sorted(candidate.tensors.keys() - receipt.shapes.keys()):
        findings.append(Finding(gate, "error", name, "is in the candidate, but not in the receipt"))
    metrics = {"receipt_tensors": len(receipt.shapes), "candidate_tensors": len(candidate.tensors)}
    return _result(gate, f"all {len(receipt.shapes)} tensors of the receipt, each in its shape", metrics, findings)


def _tokenizer(candidate: Checkpoint, receipt: Receipt) -> GateResult:
    gate, recorded = "tokenizer", receipt.hashes["tokenizer"]
    found = tokenizer_digest(candidate.assets)
    metrics = {"digest": found}
    if recorded is None:
        return GateResult(gate, "skipped", "the receipt has no tokenizer", metrics)
    findings = []
    if found != recorded:
        said = "the tokenizer.model is another" if found else "the tokenizer.model is missing or cannot be loaded"
        findings.append(Finding(gate, "error", "tokenizer.model", f"{said} than in the receipt" if found else said))
    return _result(gate, "pieces, scores and kinds are those of the receipt", metrics, findings)


def _files(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate = "files"
    if candidate.format != receipt.format:
        said = f"the receipt is of a {receipt.format}, this is a {candidate.format}: values are compared, bytes are not"
        return GateResult(gate, "skipped", said)
    path, findings = candidate.path, []
    recorded = {file.name: file for file in receipt.files}
    if not path.is_dir() and len(recorded) == 1:  # a single file may be called otherwise
        recorded = {path.name: next(iter(recorded.values()))}
    elif not path.is_dir():  # one file of a folder, such as a shard
        path = path.parent
    there = [name for name in recorded if (file := place(path, name)) is not None and file.is_file()]
    for name in recorded.keys() - set(there):
        findings.append(Finding(gate, "error", name, "is in the receipt, but missing"))
    for file in digest_files(path, there, threads=threads, advance=advance):
        was = recorded[file.name]
        if file.sha256 != was.sha256:
            size = "" if file.nbytes == was.nbytes else f", {was.nbytes} bytes then, {file.nbytes} now"
            said = f"its bytes are not those that were written (SHA-256 {was.sha256[:16]}... then, {file.sha256[:16]}... now{size})"
            findings.append(Finding(gate, "error", file.name, said))
    findings.sort(key=lambda finding: str(finding.subject))
    strangers = (
        [name for name in names_in(path) if name not in recorded and not name.startswith(".")]
        if path == candidate.path
        else []
    )
    findings += [Finding(gate, "note", name, "was not there when the receipt was written") for name in strangers]
    metrics = {"files": len(recorded), "bytes": sum(file.nbytes for file in recorded.values())}
    return _result(
        gate,
        f"the bytes of {len(recorded)} file{'s' * (len(recorded) != 1)} are those that were written",
        metrics,
        findings,
    )


def _tensors(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate = "tensors"
    each = hash_tensors(candidate.tensors, threads=threads, advance=advance)
    read_through(candidate.buffers.values())
    owners: dict[str, str] = {}
    for name, digest in receipt.digests.items():
        owners.setdefault(digest, name)
    findings = []
    for name, digest in receipt.digests.items():
        if name in each and each[name] != digest:
            now = (
                f"they are those of {owners[each[name]]}"
                if each[name] in owners
                else f"digest {each[name][:16]}... now"
            )
            said = f"its values are not {_AGAIN} (digest {digest[:16]}... then, {now})"
            findings.append(Finding(gate, "error", name, said))
    hashes = Hashes.of(each, candidate.config, candidate.assets).to_json()
    metrics: dict[str, Any] = {"count": len(each), "hashes": hashes}
    return _result(
        gate, f"the values of {len(each)} tensors have the digests of the receipt ({ALGORITHM})", metrics, findings
    )


def _logits(candidate: Checkpoint, receipt: Receipt, threads: int, advance: Advance) -> GateResult:
    gate, reference = "logits", receipt.logits
    if reference is None:
        return GateResult(gate, "skipped", "the receipt has no logits")
    names = {name: tuple(tensor.shape) for name, tensor in candidate.tensors.items()}
    if names != receipt.shapes or candidate.config.vocab_size != receipt.config.vocab_size:
        return GateResult(
            gate, "skipped", "the tensors are not those of the receipt, so no forward pass can be compared"
        )
    found = recompute(candidate, reference, threads=threads, advance=advance)
    limits = GATES["lossless"]
    apart, beyond = _apart(found, reference, limits.logits, limits.logits_rtol)
    positions, count = reference.tokens.shape
    metrics = {
        "positions": positions,
        "tokens": count,
        "max_abs_difference": significant(apart),
        "beyond_limit": beyond,
        "limits": {"logits": limits.logits, "logits_rtol": limits.logits_rtol},
    }
    findings = []
    if beyond:
        said = (
            f"{beyond} of {positions * (count + 1)} reference values differ from the receipt's by more than {limits.logits:g} +"
            f" {limits.logits_rtol:g} x |value|; the largest difference is {apart:.4g}"
        )
        findings.append(Finding(gate, "error", None, said))
    good = (
        f"largest difference {apart:.3g} from the receipt's ({count} tokens at {positions} positions, and their sums)"
    )
    return _result(gate, good, metrics, findings)


def _apart(found: ReferenceLogits, reference: ReferenceLogits, atol: float, rtol: float) -> tuple[float, int]:
    """The largest difference, infinite where something is not finite, and how many are beyond the limit."""
    now = np.concatenate([found.logits.ravel(), found.log_sum]).astype(np.float64)
    then = np.concatenate([reference.logits.ravel(), reference.log_sum]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(np.isfinite(now) & np.isfinite(then), np.abs(now - then), np.inf)
        return float(apart.max()), int(np.count_nonzero(~(apart <= atol + rtol * np.abs(then))))


def _result(gate: str, good: str, metrics: dict[str, Any], findings: list[Finding]) -> GateResult:
    wrong = [finding for finding in findings if finding.severity == "error"]
    if not wrong:
        return GateResult(gate, "passed", good, metrics, tuple(findings))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return GateResult(gate, "failed", f"{wrong[0].sentence}{more}", metrics, tuple(findings))
