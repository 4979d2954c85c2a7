"""Signatures of outputs and their receipts, by the OpenSSF's model-signing: a Sigstore bundle with an in-toto statement
of every file's SHA-256, signed with a key, with a key and its certificate, or with an identity.

``model_signing verify`` accepts what is signed here, and what it signs is accepted here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.model.loaders import config_names_code
from gemma2tool.pipeline import identities
from gemma2tool.pipeline.key_files import MAX_KEY_BYTES, key_errors
from gemma2tool.pipeline.report_files import check_reports, replace_report
from gemma2tool.receipt.check import file_findings
from gemma2tool.receipt.document import read_receipt, receipt_path
from gemma2tool.receipt.statement import encode_statement
from gemma2tool.storage.paths import refuse_existing
from gemma2tool.storage.reading import read_whole

SUFFIX = ".sig"


@dataclass(frozen=True, kw_only=True)
class SignRequest:
    """What to sign, and with what.

    ``key``: a private key (PEM, elliptic curve), with its ``password`` where it has one. ``certificate``: the
    certificate of the key, and ``chain``, what leads from it to a root. ``keyless``: instead of a key, the identity of
    ``identity_token``, of the CI service, or, if ``interactive``, of who logs in with a browser; ``trust_config``: of
    another Sigstore than the public one. ``statement``: where to write the receipt as an in-toto statement, unsigned.
    ``force``: replace signatures that exist.
    """

    output: Path
    key: Path | None = None
    password: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    keyless: bool = False
    identity_token: str | None = None
    interactive: bool = False
    trust_config: Path | None = None
    statement: Path | None = None
    force: bool = False

    @property
    def signs(self) -> bool:
        """Whether there is something to sign with."""
        return self.keyless or self.key is not None

    def check(self) -> None:
        """Raise ``UsageError`` for options that do nothing, or not together."""
        if not self.signs and self.statement is None:
            hint = "name a private key with --key, or sign with an identity: --keyless"
            raise UsageError("option.pair", "nothing to sign with", hint=hint)
        if self.keyless and self.key is not None:
            raise UsageError("option.pair", "--key and --keyless are two ways to sign", hint="choose one of them")
        if (self.certificate or self.chain) and self.key is None:
            raise UsageError("option.pair", "--certificate and --chain need the private key", hint="add --key key.pem")
        if self.trust_config and not self.keyless:
            raise UsageError("option.ignored", "--trust-config applies to signatures by identity", hint="add --keyless")


@dataclass(frozen=True)
class SignResult:
    """What was written: the signatures of the output and of its receipt, if it has one, and the receipt's in-toto
    statement.
    """

    output: Path
    signatures: tuple[Path, ...]
    statement: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as ``--json`` prints it."""
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
    request.check()
    signed = [output, *([receipt] if receipt.exists() else [])] if request.signs else []
    for path in signed:
        refuse_existing(_beside(path), force=request.force, folder=False)
    if signed and (odd := special_file(output)) is not None:
        raise InputRefused("signature.files", f"{odd}: is not a plain file, and signatures are of plain files")
    if receipt in signed:
        _refuse_undescribed(output, receipt)
    if request.statement is not None:
        check_reports({"--statement": request.statement}, (output, receipt, *signed))
        replace_report(request.statement, encode_statement(read_receipt(receipt)))
    if signed:
        signer = _identity_signer(request) if request.key is None else _key_signer(request, request.key)
        for path in signed:
            _write_signature(signer, path)
    return SignResult(output, tuple(map(_beside, signed)), request.statement)


def special_file(output: Path) -> Path | None:
    """A link or a special file at or below a path; model-signing follows none. None if all are plain files."""
    below = sorted(output.rglob("*")) if output.is_dir() else ()
    return next((path for path in (output, *below) if path.is_symlink() or not (path.is_file() or path.is_dir())), None)


def _refuse_undescribed(output: Path, path: Path) -> None:
    """Raise ``InputRefused`` (``signature.receipt``) for an output that is not what its receipt describes: the two
    signatures would say different things.
    """
    receipt = read_receipt(path)
    for finding in file_findings(output, receipt, names_code=config_names_code(receipt.config)):
        if finding.severity == "error":
            raise InputRefused("signature.receipt", f"{output}: not what {path.name} describes: {finding.sentence}")


def receipt_signature_path(receipt: Path) -> Path:
    """Where the signature of a receipt is: ``model.gguf.receipt.json.sig``."""
    return receipt.with_name(receipt.name + SUFFIX)


def _beside(path: Path) -> Path:
    return receipt_signature_path(path) if path.name.endswith(".receipt.json") else signature_path(path)


def library() -> ModuleType:
    require("OpenSSL", "trust", "signing")  # model-signing imports it and does not declare it
    return require("model_signing", "trust", "signing")


@dataclass(frozen=True)
class _Signer:
    """model-signing with what signs. ``errors``: what it raises, as errors of this program; takes what is signed."""

    config: Any
    errors: Callable[[Path], AbstractContextManager[None]]


def _identity_signer(request: SignRequest) -> _Signer:
    trust = request.trust_config
    config = identities.signer(library(), request.identity_token, trust, interactive=request.interactive)
    return _Signer(config, lambda path: identities.sigstore_errors(trust))


def _key_signer(request: SignRequest, key: Path) -> _Signer:
    return _Signer(_key_config(request, key), key_errors)


def _key_config(request: SignRequest, key: Path) -> Any:
    model_signing = library()
    files = [key, *([request.certificate] if request.certificate else []), *request.chain]
    for file in files:
        read_whole(file, what="key or certificate", max_bytes=MAX_KEY_BYTES)
    config = model_signing.signing.Config()
    with key_errors(*files):
        if request.certificate is None and request.password is None:
            return config.use_elliptic_key_signer(private_key=key)
        if request.certificate is None:
            # 1.1 says that it takes text, and needs bytes.
            return config.use_elliptic_key_signer(private_key=key, password=str(request.password).encode())
        return config.use_certificate_signer(
            private_key=key, signing_certificate=request.certificate, certificate_chain=list(request.chain)
        )


def _write_signature(signer: _Signer, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gemma2tool-") as folder:
        draft = Path(folder) / "signature"
        with signer.errors(path):
            signer.config.sign(path, draft)
        replace_report(_beside(path), draft.read_text("utf-8"))
