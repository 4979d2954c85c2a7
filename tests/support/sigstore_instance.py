"""A Sigstore on the loopback interface: issuer, certificate authority, both logs, and their roots of trust.

As small as sigstore's client accepts it. Sources: Fulcio's and Rekor's HTTP interfaces, RFC 6962 (signed certificate
timestamps, Merkle trees), Sigstore's client trust configuration 0.1.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from tests.support.servers import Loopback, send, status

SHA256 = ec.ECDSA(hashes.SHA256())
_START = "2026-01-01T00:00:00Z"
_USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
_ISSUER, _TIMESTAMPS = ObjectIdentifier("1.3.6.1.4.1.57264.1.1"), ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Key:
    """A signing key of the instance."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.der = self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.id = hashlib.sha256(self.der).digest()

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data, SHA256)

    def log(self, url: str) -> dict[str, Any]:
        key = {"rawBytes": text(self.der), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": {"start": _START}}
        return {"baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": key, "logId": {"keyId": text(self.id)}}


class SigstoreInstance(Loopback):
    """Certifies whatever identity a token claims. ``issuer`` is what tokens and certificates name."""

    def __init__(self) -> None:
        self.authority, self.certificates, self.entries = Key(), Key(), Key()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"authorization_endpoint": f"{outer.issuer}/auth", "token_endpoint": f"{outer.issuer}/token"}
                send(self, canonical(known), "application/json")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.refuses:
                    status(self, 503)
                elif self.path == "/api/v2/signingCert":
                    send(self, canonical(outer.certify(body, self.headers["Authorization"])), "application/json")
                else:
                    send(self, canonical(outer.record(body)), "application/json", 201)

            def log_message(self, *arguments: object) -> None: ...

        self.refuses = False
        self.start(Handler)
        self.issuer = self.url
        self.root = self._builder("root", self.authority.private.public_key(), ca=True).sign(
            self.authority.private, hashes.SHA256()
        )

    def trust_config(self, path: Path) -> Path:
        """Writes the roots of trust and the addresses of the services."""
        services = [{"url": self.issuer, "majorApiVersion": 1, "validFor": {"start": _START}, "operator": "here"}]
        chain = {"certificates": [{"rawBytes": text(self.root.public_bytes(Encoding.DER))}]}
        authority = {"subject": {"organization": "here", "commonName": "root"}, "uri": self.issuer, "certChain": chain}
        trusted = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self.entries.log(self.issuer)],
            "ctlogs": [self.certificates.log(self.issuer)],
            "certificateAuthorities": [{**authority, "validFor": {"start": _START}}],
        }
        signing = {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": services,
            "oidcUrls": services,
            "rekorTlogUrls": services,
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaConfig": {"selector": "ANY"},
        }
        kind = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
        path.write_bytes(canonical({"mediaType": kind, "trustedRoot": trusted, "signingConfig": signing}))
        return path

    def token(self, name: str, seconds: int = 600) -> str:
        """A token that claims to be ``name``; nobody checks its signature here."""
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": "sigstore", "sub": name, "iat": now, "exp": now + seconds}
        parts = (canonical({"alg": "HS256", "typ": "JWT"}), canonical(claims), b"signature")
        return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)

    def certify(self, body: dict[str, str], authorization: str) -> dict[str, Any]:
        """The authority's answer: a certificate for the token's identity, with the log's timestamp in it."""
        payload = authorization.removeprefix("Bearer ").split(".")[1]
        name = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["sub"]
        request = x509.load_pem_x509_csr(base64.b64decode(body["certificateSigningRequest"]))
        builder = (
            self._builder("", request.public_key(), ca=False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(name)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_ISSUER, self.issuer.encode()), critical=False)
        )
        unlogged = builder.sign(self.authority.private, hashes.SHA256()).tbs_certificate_bytes
        stamps = self._timestamp(unlogged)
        builder = builder.add_extension(x509.UnrecognizedExtension(_TIMESTAMPS, stamps), critical=False)
        leaf = builder.sign(self.authority.private, hashes.SHA256())
        chain = [certificate.public_bytes(Encoding.PEM).decode() for certificate in (leaf, self.root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def _builder(self, name: str, key: Any, *, ca: bool) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        days = 3650 if ca else 0
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []) for name in (name, "root")]
        uses = dict.fromkeys(_USES, False) | {"key_cert_sign" if ca else "digital_signature": True}
        of_authority = self.authority.private.public_key()
        return (
            x509.CertificateBuilder(names[1], names[0], key, 2 if ca else 7)
            .not_valid_before(now - datetime.timedelta(seconds=60))
            .not_valid_after(now + datetime.timedelta(days=days, seconds=600))
            .add_extension(x509.KeyUsage(**uses), critical=True)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(of_authority), critical=False)
        )

    def _timestamp(self, unlogged: bytes) -> bytes:
        """The extension's value: a list of one signed timestamp of RFC 6962, in DER."""
        now = int(time.time() * 1000)
        entry = self.authority.id + len(unlogged).to_bytes(3) + unlogged
        signature = self.certificates.sign(struct.pack("!BBQH", 0, 0, now, 1) + entry + b"\0\0")
        stamp = b"\0" + self.certificates.id + struct.pack("!QHBBH", now, 0, 4, 3, len(signature)) + signature
        stamps = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        return b"\x04" + (bytes([len(stamps)]) if len(stamps) < 128 else b"\x81" + bytes([len(stamps)])) + stamps

    def record(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log's answer: the entry, the only one of its tree, with the proof and the promise that it is there."""
        content = body["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        digests = [
            {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}
            for data in (content["envelope"].encode(), base64.b64decode(envelope["payload"]))
        ]
        signatures = [{"signature": envelope["signatures"][0]["sig"], "verifier": content["verifiers"][0]}]
        spec = {"envelopeHash": digests[0], "payloadHash": digests[1], "signatures": signatures}
        entry = canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        root = hashlib.sha256(b"\0" + entry).digest()
        note = f"here\n1\n{text(root)}\n"
        checkpoint = f"{note}\n\u2014 here {text(self.entries.id[:4] + self.entries.sign(note.encode()))}\n"
        entry_body = {
            "body": text(entry),
            "integratedTime": int(time.time()),
            "logID": self.entries.id.hex(),
            "logIndex": 0,
        }
        proof = {"logIndex": 0, "rootHash": root.hex(), "treeSize": 1, "hashes": [], "checkpoint": checkpoint}
        promise = text(self.entries.sign(canonical(entry_body)))
        return {"0" * 64: {**entry_body, "verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}}
