"""What keys, certificates and signatures hold, as far as messages need to say it: signing itself is model-signing's.

Sources: RFC 7468 (PEM), RFC 8017, RFC 8410 and RFC 5480 (identifiers of algorithms), Sigstore's bundle format 0.3.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
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


def material_kind(signature: Path) -> str | None:
    """What a Sigstore bundle was signed with: "key", "certificate" or "identity"; None if it does not say."""
    try:
        content = strict_json.load(signature, what="signature", max_bytes=MAX_BUNDLE_BYTES)
    except InputRefused:
        return None
    material = content.get("verificationMaterial") if isinstance(content, dict) else None
    held = material if isinstance(material, dict) else {}
    return next((kind for name, kind in _MATERIALS.items() if held.get(name)), None)
