"""Whether files are as someone signed them: a gate of verifications. See ``signing`` for how they are signed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.formats import registry
from gemma2tool.pipeline import identities
from gemma2tool.pipeline.key_files import Bundle, key_errors, signer_kind
from gemma2tool.pipeline.signing import library, receipt_signature_path, signature_path, special_file
from gemma2tool.storage.quoting import one_line
from gemma2tool.verify.finding import Finding, GateResult, Severity
from gemma2tool.verify.result import Side, Verification

GATE = "signature"
_OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""What model-signing leaves out unless it is told otherwise."""
_HASHES = re.compile(r"Hash mismatch for ('.*'): Expected '.*', Actual '.*'", re.DOTALL)


@dataclass(frozen=True)
class Signer:
    """Whom signatures are held to. ``kind``: "key", "certificate" or "identity". ``metrics``: what reports say of it.
    ``verifier``: makes model-signing's configuration that accepts what it signed.
    """

    kind: str
    name: str
    metrics: dict[str, str]
    verifier: Callable[[ModuleType], Any]


def named_signer(text: str, issuer: str | None = None, trust_config: Path | None = None) -> Signer:
    """The signer that a user names: a file with a public key or a certificate (PEM), or an identity that ``issuer``
    vouches for.

    Raises ``UsageError`` for an identity without an issuer and for what only identities need beside a file,
    ``InputRefused`` for a file that holds neither.
    """
    if identities.is_identity(text):
        identity = identities.checked_identity(text, issuer, trust_config)
        metrics = {"signer": text, "kind": "identity", "issuer": identity.issuer}
        return Signer("identity", text, metrics, lambda library: identities.verifier(library, identity))
    identities.refuse_of_identities(issuer, trust_config)
    path = Path(text)
    kind, digest = signer_kind(path)
    metrics = {"signer": path.name, "kind": kind, "sha256": digest}
    return Signer(kind, path.name, metrics, lambda library: _file_verifier(library, kind, path))


def _file_verifier(library: ModuleType, kind: str, path: Path) -> Any:
    config = library.verifying.Config()
    with key_errors(path):
        if kind == "key":
            return config.use_elliptic_key_verifier(public_key=path)
        return config.use_certificate_verifier(certificate_chain=[path])


def signature_gate(candidate: Path, signer: Signer, signature: Path | None, receipt: Path | None) -> GateResult:
    """Whether a candidate, and the receipt that it is held to, are as ``signer`` signed them. What the signature
    leaves out of a folder is a warning, or a note if it is Git's; so is what is read with a single file. Another shard
    of it is an error: sign and verify the folder of all.

    ``signature``: default is the one beside the candidate. Raises ``InputRefused`` for a candidate that is not there.
    """
    if not candidate.exists():
        raise InputRefused("file.missing", f"{candidate}: no such file")
    pairs = [(candidate, signature or signature_path(candidate))]
    if receipt is not None:
        pairs.append((receipt, receipt_signature_path(receipt)))
    verifier = signer.verifier(library())
    findings, subjects = list(_unsigned_files(candidate)) if receipt is None else [], list[str]()
    for path, its_signature in pairs:
        try:
            bundle = _verified(path, its_signature, signer, verifier)
        except _Invalid as error:
            findings.append(Finding(GATE, "error", path.name, str(error)))
            continue
        subjects += [bundle.subject] if signer.kind == "certificate" and bundle.subject else []
        for name in _left_out(path, bundle):
            message = f"is not covered by the signature {its_signature.name}, which leaves it out"
            findings.append(Finding(GATE, "note" if name in _OF_GIT else "warning", name, message))
    failures = [finding for finding in findings if finding.severity == "error"]
    if failures:
        return GateResult(GATE, "failed", failures[0].sentence, signer.metrics, tuple(findings))
    names = " and ".join(path.name for path, _ in pairs)
    whose = f"{signer.name} ({', '.join(dict.fromkeys(subjects))})" if subjects else signer.name
    summary = f"{names}: signed with the {signer.kind} {whose}, and unchanged since"
    metrics = {**signer.metrics, "subject": subjects[0]} if subjects else signer.metrics
    return GateResult(GATE, "passed", summary, metrics, tuple(findings))


def signature_alone(candidate: Path, gate: GateResult) -> Verification:
    """A verification of nothing but the signature."""
    sides = Side(str(gate.metrics["signer"]), GATE), Side(str(candidate), "file")
    return Verification(*sides, GATE, (gate,))


class _Invalid(Exception):
    """Why a signature does not hold."""


def _verified(path: Path, signature: Path, signer: Signer, verifier: Any) -> Bundle:
    """The bundle of a signature that holds. The library's sentence says which files differ."""
    if not signature.is_file():
        raise _Invalid(f"has no signature: there is no {signature.name} beside it")
    try:
        bundle = Bundle(signature)  # which is bounded, and the library's reader is not
    except InputRefused as error:
        raise _Invalid(f"its signature cannot be read: {error.message}") from error
    if (other := bundle.material) not in (signer.kind, None):
        article = "an" if other == "identity" else "a"
        made = f"its signature {signature.name} was made with {article} {other}"
        raise _Invalid(f"{made}, not with the {signer.kind} {signer.name}")
    try:
        verifier.verify(path, signature)
    except Exception as error:
        if isinstance(error, (MemoryError, OSError)):
            raise
        if differences := _differences(str(error)):
            raise _Invalid(f"differs from what was signed: {differences}") from error
        reason = one_line(error)
        if (odd := special_file(path)) is not None and str(odd) in str(error):
            raise _Invalid(f"holds {odd.name}, which is not a plain file and was not signed") from error
        whose = f"its signature {signature.name} is not one of the {signer.kind} {signer.name}"
        raise _Invalid(whose + (f" ({reason})" if reason else "")) from error
    return bundle


def _differences(message: str) -> str:
    """The library's list of what differs, as a sentence; empty for its other messages."""
    _, mismatch, listed = message.partition("Signature mismatch: ")
    try:
        parts = [str(part) for part in ast.literal_eval(listed)] if mismatch else []
    except (ValueError, SyntaxError, TypeError):
        parts = [listed]
    listed = "; ".join(_HASHES.sub(r"\1 has other bytes", part) for part in parts)
    return one_line(listed.replace("'.' has", "it has"))


def _unsigned_files(candidate: Path) -> Iterator[Finding]:
    """What is read with a single file, which a signature of that file says nothing about: other shards, a config."""
    try:
        with registry.open_checkpoint(candidate) as checkpoint:
            files = [] if candidate.is_dir() else [file for file in checkpoint.files if file.name != candidate.name]
    except ToolError:
        return
    for file in files:
        severity: Severity = "error" if file.suffix == candidate.suffix else "warning"
        message = f"is read with {candidate.name}, and the signature is not of it"
        yield Finding(GATE, severity, file.name, message)


def _left_out(path: Path, bundle: Bundle) -> list[str]:
    """What directly in a folder holds files that its signature says nothing about."""
    if not path.is_dir() or bundle.files is None:
        return []
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted({file.parts[0] for file in files if file.as_posix() not in bundle.files})
