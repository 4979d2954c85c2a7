"""Signatures of outputs and their receipts, by the OpenSSF's model-signing: a Sigstore bundle with an in-toto statement
of every file's SHA-256.

``model_signing verify`` accepts what is signed here, and what it signs is accepted here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.model.loaders import config_names_code
from gemma2tool.pipeline.key_files import CURVES, MAX_KEY_BYTES, material_kind, unusable_kind
from gemma2tool.pipeline.report_files import check_reports, replace_report
from gemma2tool.receipt.check import file_findings
from gemma2tool.receipt.document import read_receipt, receipt_path
from gemma2tool.receipt.statement import encode_statement
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.quoting import one_line
from gemma2tool.storage.reading import read_whole
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.result import Side, Verification

SUFFIX = ".sig"
GATE = "signature"


@dataclass(frozen=True, kw_only=True)
class SignRequest:
    """What to sign, and with what.

    ``key``: a private key (PEM, elliptic curve), with its ``password`` where it has one. ``certificate``: the
    certificate of the key, and ``chain``, what leads from it to a root. ``statement``: where to write the receipt as an
    in-toto statement, unsigned. ``force``: replace signatures that exist.
    """

    output: Path
    key: Path | None = None
    password: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    statement: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class SignResult:
    """What was written: the signatures of the output and, where it has one, of its receipt; the receipt's statement."""

    output: Path
    signatures: tuple[Path, ...]
    statement: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {
            "output": str(self.output),
            "signatures": [str(path) for path in self.signatures],
            "statement": None if self.statement is None else str(self.statement),
        }


def signature_path(output: Path) -> Path:
    """Where the signature of an output, or of a receipt, is: ``model.gguf.sig``, ``FOLDER.sig``."""
    return receipt_path(output).with_name(receipt_path(output).name.removesuffix(".receipt.json") + SUFFIX)


def sign(request: SignRequest) -> SignResult:
    """Sign an output and the receipt beside it.

    Raises ``UsageError`` for a request that does nothing or where a signature exists, ``InputRefused`` for a key or
    certificate that cannot be used and for an output that is not what the receipt beside it describes.
    """
    output, receipt = request.output, receipt_path(request.output)
    if not output.exists():
        raise InputRefused("file.missing", f"{output}: no such file")
    if request.key is None and request.statement is None:
        raise UsageError("option.pair", "nothing to sign with", hint="name a private key with --key")
    if (request.certificate or request.chain) and request.key is None:
        raise UsageError("option.pair", "--certificate and --chain need the private key", hint="add --key key.pem")
    signed = [output, *([receipt] if receipt.exists() else [])] if request.key is not None else []
    for path in signed:
        refuse_existing(_beside(path), force=request.force, folder=False)
    if receipt in signed:
        _refuse_undescribed(output, receipt)
    if request.statement is not None:
        check_reports({"--statement": request.statement}, (output, receipt, *signed))
        replace_report(request.statement, encode_statement(read_receipt(receipt)))
    if request.key is not None:
        signer = _signer(request, request.key)
        for path in signed:
            _write_signature(signer, path)
    return SignResult(output, tuple(map(_beside, signed)), request.statement)


def _refuse_undescribed(output: Path, path: Path) -> None:
    """Raise ``InputRefused`` (``signature.receipt``) for an output that is not what its receipt describes: the two
    signatures would say different things.
    """
    receipt = read_receipt(path)
    for finding in file_findings(output, receipt, names_code=config_names_code(receipt.config)):
        if finding.severity == "error":
            raise InputRefused("signature.receipt", f"{output}: not what {path.name} describes: {finding.sentence}")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX) if path.name.endswith(".receipt.json") else signature_path(path)


def _library() -> ModuleType:
    require("OpenSSL", "trust", "signing")  # model-signing imports it and does not declare it
    return require("model_signing", "trust", "signing")


def _signer(request: SignRequest, key: Path) -> Any:
    library = _library()
    files = [key, *([request.certificate] if request.certificate else []), *request.chain]
    for file in files:
        read_whole(file, what="key or certificate", max_bytes=MAX_KEY_BYTES)
    config = library.signing.Config()
    with _key_errors(*files):
        if request.certificate is None and request.password is None:
            return config.use_elliptic_key_signer(private_key=key)
        if request.certificate is None:
            # 1.1 says that it takes text, and needs bytes.
            return config.use_elliptic_key_signer(private_key=key, password=str(request.password).encode())
        return config.use_certificate_signer(
            private_key=key, signing_certificate=request.certificate, certificate_chain=list(request.chain)
        )


@contextmanager
def _key_errors(*files: Path) -> Iterator[None]:
    """What the library raises for a key or certificate that it cannot use."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, InputRefused)):
            raise
        for file in files:
            if (kind := unusable_kind(file)) is not None:
                raise InputRefused("signature.key", f"{file}: holds {kind}; signatures here are {CURVES}") from error
        names, said = ", ".join(map(str, files)), one_line(error) or type(error).__name__
        raise InputRefused("signature.key", f"{names}: cannot be used: {said}") from error


def _write_signature(signer: Any, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gemma2tool-") as folder:
        draft = Path(folder) / "signature"
        with _key_errors(path):
            signer.sign(path, draft)
        replace_report(_beside(path), draft.read_text("utf-8"))


# -- verifying ---------------------------------------------------------------------------------------------------------


def signature_gate(candidate: Path, signer: Path, signature: Path | None, receipt: Path | None) -> GateResult:
    """Whether a candidate, and the receipt that it is held to, are as ``signer`` signed them.

    ``signer``: a public key or a certificate (PEM). ``signature``: default is the one beside the candidate.
    """
    kind, digest = _kind(signer)
    pairs = [(candidate, signature or signature_path(candidate))]
    if receipt is not None:
        pairs.append((receipt, _beside(receipt)))
    findings = []
    for path, its_signature in pairs:
        if not its_signature.is_file():
            findings.append(
                Finding(GATE, "error", path.name, f"has no signature: there is no {its_signature.name} beside it")
            )
        elif (problem := _problem(path, its_signature, signer, kind)) is not None:
            findings.append(Finding(GATE, "error", path.name, problem))
    metrics = {"signer": signer.name, "kind": kind, "sha256": digest}
    if findings:
        return GateResult(GATE, "failed", findings[0].sentence, metrics, tuple(findings))
    names = " and ".join(path.name for path, _ in pairs)
    return GateResult(GATE, "passed", f"{names}: signed with the {kind} {signer.name}, and unchanged since", metrics)


def signature_alone(candidate: Path, gate: GateResult) -> Verification:
    """A verification of nothing but the signature."""
    sides = Side(str(gate.metrics["signer"]), GATE), Side(str(candidate), "file")
    return Verification(*sides, GATE, (gate,))


def _kind(signer: Path) -> tuple[str, str]:
    """ "key" or "certificate", and the SHA-256 of the file."""
    data = read_whole(signer, what="key or certificate", max_bytes=MAX_KEY_BYTES)
    for kind, mark in (("certificate", b"-----BEGIN CERTIFICATE-----"), ("key", b"-----BEGIN PUBLIC KEY-----")):
        if mark in data:
            return kind, hashlib.sha256(data).hexdigest()
    what = "is a private key" if b"PRIVATE KEY-----" in data else "holds neither a public key nor a certificate (PEM)"
    raise InputRefused("signature.key", f"{signer}: {what}", hint="name the signer's public key or certificate")


def _problem(path: Path, signature: Path, signer: Path, kind: str) -> str | None:
    """Why a signature does not hold; None if it does. The library's sentence says which files differ."""
    library = _library()
    config = library.verifying.Config()
    if (other := material_kind(signature)) not in (kind, None):
        article = "an" if other == "identity" else "a"
        return f"its signature {signature.name} was made with {article} {other}, not with the {kind} {signer.name}"
    with _key_errors(signer):
        if kind == "key":
            config.use_elliptic_key_verifier(public_key=signer)
        else:
            config.use_certificate_verifier(certificate_chain=[signer])
    try:
        config.verify(path, signature)
    except Exception as error:
        if isinstance(error, (MemoryError, OSError)):
            raise
        said = one_line(error)
        if said.startswith("Signature mismatch: "):
            return f"differs from what was signed: {said.removeprefix('Signature mismatch: ')}"
        return f"its signature {signature.name} is not one of the {kind} {signer.name}" + (f" ({said})" if said else "")
    return None
