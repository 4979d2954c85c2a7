"""The Python interface to what makes a file trustworthy; ``gemma2tool.api`` has these functions, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2tool.api.arguments import PathLike, as_path
from gemma2tool.pipeline import signing
from gemma2tool.pipeline.scan import run
from gemma2tool.pipeline.scan.finding import ScanFinding, ScanResult
from gemma2tool.pipeline.signing import SignResult

__all__ = ["ScanFinding", "ScanResult", "SignResult", "scan", "sign"]


def scan(path: PathLike, *, sarif: PathLike | None = None) -> ScanResult:
    """Report what the files at ``path`` would do to those who use them: pickles that run code, Keras's Lambda layers,
    hostile chat templates, hidden characters, remote code. Nothing is loaded or run. docs/scan.md lists the checks.

    ``sarif``: also write the result to this file, as SARIF 2.1.0. Raises ``InputRefused`` if ``path`` does not exist.
    """
    return run.scan(run.ScanRequest(path=Path(path), sarif=as_path(sarif)))


def sign(
    output: PathLike,
    *,
    key: PathLike | None = None,
    password: str | None = None,
    certificate: PathLike | None = None,
    chain: Sequence[PathLike] = (),
    keyless: bool = False,
    identity_token: str | None = None,
    interactive: bool = False,
    trust_config: PathLike | None = None,
    statement: PathLike | None = None,
    force: bool = False,
) -> SignResult:
    """Sign an output and the receipt beside it, in the format that ``model_signing verify`` accepts
    (``model.gguf.sig``).

    ``key``, ``password``: a private key (PEM, elliptic curve) and its password. ``certificate``, ``chain``: the key's
    certificate and the certificates that lead to a root. ``keyless``: sign with the identity of ``identity_token``, of
    the CI job or, if ``interactive``, of the person who logs in with a browser; the public Sigstore shows the identity
    in its log. ``trust_config``: use a Sigstore other than the public one. ``statement``: also write the receipt as an
    in-toto statement. ``force``: replace existing signatures.
    """
    request = signing.SignRequest(
        output=Path(output),
        key=as_path(key),
        password=password,
        certificate=as_path(certificate),
        chain=tuple(map(Path, chain)),
        keyless=keyless,
        identity_token=identity_token,
        interactive=interactive,
        trust_config=as_path(trust_config),
        statement=as_path(statement),
        force=force,
    )
    return signing.sign(request)
