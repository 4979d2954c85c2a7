"""A bill of materials of an output, made from its receipt: CycloneDX 1.6 with a model card (ML-BOM).

It contains nothing that changes from run to run, so equal outputs have equal bills. Source: bom-1.6.schema.json.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma2tool.containers import strict_yaml
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.receipt.document import Receipt

SPEC_VERSION = "1.6"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/gemma2tool/gemma2tool/bom")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)")
"""Where the hub's client keeps a revision of a repository."""
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_MEASURES = {
    "kl_mean": "mean KL divergence from the source",
    "top1_agreement": "share of positions with the source's likeliest token",
    "perplexity_ratio": "perplexity, divided by the source's",
}
_MAX_LICENSE, _MAX_FRONT_MATTER = 200, 1 << 16


@dataclass(frozen=True)
class Origin:
    """What a receipt does not say: the source's repository and commit on a hub, and the licence that it states."""

    group: str | None = None
    name: str | None = None
    commit: str | None = None
    license: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin:
        """From the path of a hub's snapshot, and from a model card or a GGUF's keys."""
        snapshot = _SNAPSHOT.search(checkpoint.path.absolute().as_posix())
        group, name, commit = snapshot.groups() if snapshot else (None, None, None)
        return cls(group, name, commit, _license(checkpoint))


def _license(checkpoint: Checkpoint) -> str | None:
    stated = None
    if "README.md" in checkpoint.assets:
        front = _FRONT_MATTER.match(checkpoint.assets["README.md"].decode("utf-8", "replace"))
        try:
            content = strict_yaml.load(front[1], what="README.md", max_chars=_MAX_FRONT_MATTER) if front else None
        except InputRefused:
            content = None
        stated = content.get("license") if isinstance(content, Mapping) else None
    keys = getattr(checkpoint.metadata.get("gguf"), "kv", {})
    stated = stated or getattr(keys.get("general.license"), "value", None)
    return stated[:_MAX_LICENSE] if isinstance(stated, str) and stated.isprintable() else None


def bill(receipt: Receipt, origin: Origin) -> str:
    """The text of the file: ASCII JSON."""
    content, output = receipt.content, receipt.content["output"]
    serial = uuid.uuid5(_NAMESPACE, "".join(file.sha256 for file in receipt.files))
    source, data = _source(content["source"], origin), list(_data(content["plan"]["options"]))
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool(name, version) for name, version in content["tool"].items()]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "output",
                "name": output["name"],
                **_licenses(origin),
                "pedigree": {"ancestors": [source], "notes": _made(content)},
                "modelCard": _card(receipt, [component["bom-ref"] for component in data]),
                "properties": [
                    *_digests(output["hashes"]),
                    _property("format", output["format"]),
                    _property("verified", content["verification"]["kind"]),
                ],
            },
        },
        "components": [
            *(
                {
                    "type": "file",
                    "bom-ref": f"file-{number}",
                    "name": file.name,
                    "hashes": [{"alg": "SHA-256", "content": file.sha256}],
                    "properties": [_property("bytes", file.nbytes)],
                }
                for number, file in enumerate(receipt.files)
            ),
            *data,
        ],
        "dependencies": [
            {"ref": "output", "dependsOn": [component["bom-ref"] for component in data]},
        ],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _tool(name: str, version: str) -> dict[str, Any]:
    kind = {"gemma2tool": "application", "python": "platform"}.get(name, "library")
    return {"type": kind, "name": name, "version": version}


def _source(source: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": "source", "name": source["name"]}
    if origin.commit:
        component |= {"group": origin.group, "name": origin.name, "version": origin.commit}
        component["purl"] = f"pkg:huggingface/{origin.group}/{origin.name}@{origin.commit}"
    properties = [*_digests(source["hashes"]), _property("format", source["format"])]
    return component | _licenses(origin) | {"properties": properties}


def _licenses(origin: Origin) -> dict[str, Any]:
    return {"licenses": [{"license": {"name": origin.license}}]} if origin.license else {}


def _data(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The texts and matrices that codes were chosen with, by digest."""
    for name, value in options.items():
        if isinstance(value, Mapping) and "sha256" in value:
            yield {
                "type": "data",
                "bom-ref": f"data-{name}",
                "name": value["file"],
                "description": name,
                "hashes": [{"alg": "SHA-256", "content": value["sha256"]}],
                "data": [{"type": "dataset", "name": value["file"]}],
            }


def _card(receipt: Receipt, data: list[str]) -> dict[str, Any]:
    metrics = [
        {"type": _MEASURES[name], "value": f"{value:.6g}"}
        for gate in receipt.content["verification"]["gates"]
        if gate["name"] == "distribution"
        for name, value in gate["metrics"].items()
        if name in _MEASURES and isinstance(value, (int, float))
    ]
    architectures = receipt.content["output"]["config"].get("architectures") or ["Gemma2ForCausalLM"]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": str(architectures[0]),
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
            **({"datasets": [{"ref": ref} for ref in data]} if data else {}),
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        "properties": [
            _property(f"type {entry['type']}", f"{entry['tensors']} tensors, {entry['bytes']} bytes")
            for entry in receipt.content["plan"]["types"]
        ],
    }


def _made(content: Mapping[str, Any]) -> str:
    options = content["plan"]["options"]
    what = f"quantized as {options['type']}" if options.get("type") else "converted"
    return f"{what} by gemma2tool {content['tool']['gemma2tool']} from {content['source']['format']}"


def _digests(hashes: Mapping[str, str | None]) -> list[dict[str, str]]:
    return [
        _property(f"digest {hashes['algorithm']} {name}", hashes[name])
        for name in ("model", "tensors", "config", "tokenizer")
        if hashes[name]
    ]


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": f"gemma2tool:{name}", "value": str(value)}
