"""Targets: what is scanned and what says who made a file."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
import zipfile
import zlib
from datetime import datetime
from pathlib import Path

from tests.fuzz.base import JsonTarget, MemoryFile, Target


class PickleScan(Target):
    name = "pickle-scan"
    tokens = (
        b"\x80\x04", b"\x80\x02", b"cos\nsystem\n", b"(S'id'\no", b"ios\nsystem\n", b"\x93", b"\x94", b"h\0", b"R",
        b".",
        b"\x8c\2os", b"(", b"t", b"\x85", b"b", b"\x81", b"}", b"]", b"X\2\0\0\0id", b"0", b"2", b"\x82\1",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.pipeline.scan.catalog import Place
        from gemma2tool.pipeline.scan.pickles import scan_pickle

        self.scan, self.here = scan_pickle, Place("x.pkl")

    def seeds(self) -> list[bytes]:
        value = {"a": [1, 2.5, None, b"x", "y"], "nested": pickle.dumps({"b": (1, 2)})}
        hostile = b"\x80\4\x8c\2os\x94\x8c\6system\x940h\0h\1\x93\x8c\2id\x85R."
        return [*(pickle.dumps(value, protocol) for protocol in range(6)), hostile, pickle.dumps([hostile], 2)]

    def run(self, data: bytes) -> object:
        return tuple(sorted({finding.id for finding in self.scan(data, self.here)}))


class ArchiveScan(Target):
    name = "archive-scan"
    tokens = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"ustar", b"\x1f\x8b\x08", b"x\x9c", b"../", b"\x80\2cos\nsystem\n.")

    def prepare(self) -> None:
        from gemma2tool.pipeline.scan.archives import Content, Unpacked
        from gemma2tool.pipeline.scan.catalog import Place
        from gemma2tool.pipeline.scan.contents import scan_content

        self.content, self.unpacked, self.scan, self.here = Content, Unpacked, scan_content, Place("x.bin")

    def seeds(self) -> list[bytes]:
        hostile = b"\x80\2cos\nsystem\n(X\2\0\0\0idtR."
        zipped, tarred = io.BytesIO(), io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.writestr("a/data.pkl", hostile)
            archive.writestr("a/version", "3")
        with tarfile.open(fileobj=tarred, mode="w") as tar:
            member = tarfile.TarInfo("a.pkl")
            member.size = len(hostile)
            tar.addfile(member, io.BytesIO(hostile))
        compressed = zlib.compress(tarred.getvalue())
        return [zipped.getvalue(), tarred.getvalue(), compressed, zlib.compress(zipped.getvalue())]

    def run(self, data: bytes) -> object:
        content = self.content("x.bin", io.BytesIO(data), len(data), len(data), self.unpacked.of_file(len(data)))
        return tuple(sorted({finding.id for finding in self.scan(content, self.here)}))


class TemplateTree(Target):
    """What is asked of a template's syntax tree; rendering has limits of its own."""

    name = "template"
    imports = True
    tokens = (
        b"{% for m in messages %}", b"{% endfor %}", b"{% if ", b" %}", b"{% endif %}", b"{{ ", b" }}", b"{% set a = ",
        b"{% macro a(b) %}", b"{% endmacro %}", b"messages", b".content", b"['content']", b" in ", b" == ", b" | ",
        b"~", b"'x'", b"namespace(", b"join", b"replace(", b".split(", b"[0]", b"[::-1]", b"{% call a() %}", b"loop",
        b"{% endcall %}", b"{% endset %}", b"selectattr(", b"__class__", b"attr(", b"range(", b"*", b"%",
    )  # fmt: skip

    def prepare(self) -> None:
        from jinja2.exceptions import TemplateError

        from gemma2tool.pipeline.scan.jinja_constants import Unknown
        from gemma2tool.pipeline.scan.jinja_tree import tree_findings
        from gemma2tool.pipeline.scan.triggers import triggers
        from gemma2tool.pipeline.template import PYTHON_ERRORS, environment

        self.parse, self.errors = environment().parse, (TemplateError, *PYTHON_ERRORS)
        self.tree_findings, self.triggers, self.unknown = tree_findings, triggers, Unknown

    def seeds(self) -> list[bytes]:
        from tests.pipeline.scan import templates

        texts = [*templates.HONEST.values(), *templates.TRIGGERS.values(), *list(templates.HOSTILE.values())[:20]]
        return [text.encode() for text in texts]

    def run(self, data: bytes) -> object:
        try:
            tree = self.parse(data[: 1 << 14].decode("utf-8", "replace"))
        except self.errors:
            return None
        try:
            looks_for = bool(list(self.triggers(tree)))
        except self.unknown:
            return "entangled"
        return looks_for, tuple(sorted({finding.id for finding in self.tree_findings(tree)}))


class YamlTags(Target):
    name = "yaml-tags"
    tokens = (b"%TAG ", b"!!", b"!<", b">", b"tag:yaml.org,2002:", b"python/", b"%70", b"\n---\n", b"!p!", b"object")

    def prepare(self) -> None:
        from gemma2tool.pipeline.scan.catalog import Place
        from gemma2tool.pipeline.scan.yaml_tags import scan_yaml

        self.scan, self.here = scan_yaml, Place("x.yaml")

    def seeds(self) -> list[bytes]:
        return [
            b"a: !!python/object/apply:os.system ['id']",
            b"%TAG !p! tag:yaml.org,2002:pyth\n---\n!p!on/a b",
            b"a: 1",
        ]

    def run(self, data: bytes) -> object:
        return len(list(self.scan(data.decode("utf-8", "replace"), self.here)))


class Recipe(Target):
    """Recipes of ``gemma2tool run``: YAML from anyone."""

    name = "recipe"
    imports = True
    tokens = (
        b"source: ",
        b"outputs:\n",
        b"- ",
        b"type: ",
        b"calibration: ",
        b"\n  ",
        b"{",
        b"}",
        b"&a",
        b"*a",
        b"!!str ",
    )

    def prepare(self) -> None:
        from gemma2tool.pipeline.recipe.document import read_document

        self.read, self.file = read_document, MemoryFile()

    def seeds(self) -> list[bytes]:
        text = b"source: a\ntext: [b.txt]\noutputs:\n- path: x.gguf\n  type: q4_k_m\n- path: y\n  type: nf4\n"
        return [text, b"runs:\n- " + text.replace(b"\n", b"\n  "), b"source: a\noutputs: [{path: b, to: hf}]\n"]

    def run(self, data: bytes) -> object:
        return len(self.read(Path(self.file.hold(data))))


class Bundle(JsonTarget):
    """What a signature says that it was made with, by whom and of what."""

    name = "bundle"
    names = (
        "verificationMaterial", "publicKey", "x509CertificateChain", "certificate", "certificates", "rawBytes", "hint",
        "tlogEntries", "dsseEnvelope", "payload",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.pipeline.key_files import Bundle, unusable_kind

        self.read, self.key, self.file = Bundle, unusable_kind, MemoryFile()

    def seeds(self) -> list[bytes]:
        pem = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA" + b"A" * 43 + b"=\n-----END PUBLIC KEY-----\n"
        resources = [{"name": "a", "algorithm": "sha256", "digest": "0" * 64}]
        predicate = {"serialization": {"method": "files", "ignore_paths": [".git"]}, "resources": resources}
        envelope = {"payload": base64.b64encode(json.dumps({"predicate": predicate}).encode()).decode()}
        chain = {"certificates": [{"rawBytes": base64.b64encode(self._certificate()).decode()}]}
        materials = ({"publicKey": {"hint": "a"}}, {"x509CertificateChain": chain}, {"certificate": {}})
        bundles = [{"verificationMaterial": material, "dsseEnvelope": envelope} for material in materials]
        return [pem, b"{}", *(json.dumps(bundle).encode() for bundle in bundles)]

    def _certificate(self) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding

        key, name, begin = Ed25519PrivateKey.from_private_bytes(b"k" * 32), "CN=leaf,O=here", datetime(2026, 1, 1)
        names = x509.Name.from_rfc4514_string(name)
        builder = x509.CertificateBuilder(names, names, key.public_key(), 7, begin, begin.replace(year=2050))
        return builder.sign(key, None).public_bytes(Encoding.DER)

    def run(self, data: bytes) -> object:
        path = Path(self.file.hold(data))
        key, bundle = self.key(path), self.read(path)
        return key, bundle.material, bundle.subject is None, bundle.files is None
