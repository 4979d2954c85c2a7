"""What keys, certificates and signatures hold, as far as messages need to say it: signing itself is model-signing's.

Sources: RFC 7468 (PEM), RFC 8017, RFC 8410 and RFC 5480 (identifiers of algorithms), Sigstore's bundle format 0.3.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.errors.extras import require
from gemma2tool.storage.quoting import one_line
from gemma2tool.storage.reading import read_whole

CURVES = "made with elliptic curves: P-256, P-384 or P-521"
MAX_KEY_BYTES, MAX_BUNDLE_BYTES = 1 << 20, 64 << 20

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]*?) ?(?:PRIVATE KEY|PUBLIC KEY)-----([A-Za-z0-9+/=\s]*)-----END")
_ALGORITHMS = {
    bytes.fromhex("2a864886f70d0101"): "an RSA key",
    bytes.fromhex("2a8648ce3804"): "a DSA key",
    bytes.fromhex("06032b6570"): "an Ed25519 key",
    bytes.fromhex("06032b6571"): "an Ed448 key",
    bytes.fromhex("06052b8104000a"): "a key of the curve secp256k1",
}
"""By the identifier at the beginning of a key in DER."""
_HEAD_BYTES = 64
_MATERIALS = {"publicKey": "key", "x509CertificateChain": "certificate", "certificate": "identity"}


def unusable_kind(path: Path) -> str | None:
    """What key a PEM file holds if it is one that cannot sign a model: "an RSA key"; None if that cannot be seen."""
    try:
        match = _PEM.search(read_whole(path, what="key", max_bytes=MAX_KEY_BYTES))
        der = b"" if match is None else base64.b64decode(b"".join(match[2].split()))
    except (InputRefused, ValueError):
        return None
    if match is not None and match[1] == b"RSA":
        return "an RSA key"
    return next((kind for mark, kind in _ALGORITHMS.items() if mark in der[:_HEAD_BYTES]), None)


class Bundle:
    """A Sigstore bundle, as far as reports name what is in it. Whether its signature holds is model-signing's to say.

    Raises ``InputRefused`` for a file that is too long or not JSON.
    """

    def __init__(self, path: Path) -> None:
        content = strict_json.load(path, what="signature", max_bytes=MAX_BUNDLE_BYTES)
        self._content = content if isinstance(content, dict) else {}

    def _part(self, *names: str) -> Any:
        part: Any = self._content
        for name in names:
            part = part.get(name) if isinstance(part, dict) else None
        return part

    @property
    def material(self) -> str | None:
        """What it was signed with: "key", "certificate" or "identity"; None if it does not say."""
        held = self._part("verificationMaterial")
        if not isinstance(held, dict):
            return None
        if held.get("x509CertificateChain") and held.get("tlogEntries"):
            return "identity"  # bundles before 0.3; certificates that sign models are in no log
        return next((kind for name, kind in _MATERIALS.items() if held.get(name)), None)

    @property
    def subject(self) -> str | None:
        """Whose certificate signed it, for one that says so."""
        x509 = require("cryptography.x509", "trust", "reading a certificate")
        chain = self._part("verificationMaterial", "x509CertificateChain", "certificates")
        try:
            der = base64.b64decode(chain[0]["rawBytes"])
            return str(x509.load_der_x509_certificate(der).subject.rfc4514_string())
        except (LookupError, TypeError, ValueError):
            return None

    @property
    def files(self) -> frozenset[str] | None:
        """The names of the files that the signature is of; None if it is of parts of files, or does not say."""
        try:
            statement = strict_json.load(
                base64.b64decode(self._part("dsseEnvelope", "payload")), what="signature", max_bytes=MAX_BUNDLE_BYTES
            )
            predicate = statement["predicate"]
            if predicate["serialization"]["method"] != "files":
                return None
            return frozenset(str(resource["name"]) for resource in predicate["resources"])
        except (InputRefused, LookupError, TypeError, ValueError):
            return None


def signer_kind(signer: Path) -> tuple[str, str]:
    """ "key" or "certificate", whichever public one a PEM file holds, and the SHA-256 of the file."""
    data = read_whole(signer, what="key or certificate", max_bytes=MAX_KEY_BYTES)
    for kind, mark in (("certificate", b"-----BEGIN CERTIFICATE-----"), ("key", b"-----BEGIN PUBLIC KEY-----")):
        if mark in data:
            return kind, hashlib.sha256(data).hexdigest()
    what = "is a private key" if b"PRIVATE KEY-----" in data else "holds neither a public key nor a certificate (PEM)"
    raise InputRefused("signature.key", f"{signer}: {what}", hint="name the signer's public key or certificate")


@contextmanager
def key_errors(*files: Path) -> Iterator[None]:
    """What model-signing raises for a key or certificate that it cannot use, as ``InputRefused``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, InputRefused)):
            raise
        for file in files:
            if (kind := unusable_kind(file)) is not None:
                raise InputRefused("signature.key", f"{file}: holds {kind}; signatures here are {CURVES}") from error
        names, reason = ", ".join(map(str, files)), one_line(error) or type(error).__name__
        raise InputRefused("signature.key", f"{names}: cannot be used: {reason}") from error
