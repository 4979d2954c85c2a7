"""A bill of materials of an output, made from its receipt: CycloneDX 1.6 with a model card (ML-BOM).

It contains no times and no random numbers: equal receipts and origins give equal bytes. Source: bom-1.6.schema.json.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.containers.model_card import front_matter
from gemma2tool.errors import InputRefused
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.receipt.document import Receipt

SPEC_VERSION = "1.6"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/gemma2tool/gemma2tool/bom")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)")
"""Where the hub's client keeps a revision of a repository."""
_ADDRESS = re.compile(r"hf://([^/@]+)/([^/@]+)@([0-9a-f]{40})(?:/|$)")
"""How a receipt names one."""
_MEASURES = {
    "kl_mean": "mean KL divergence from the source",
    "top1_agreement": "share of positions with the source's likeliest token",
    "perplexity_ratio": "perplexity, divided by the source's",
}
_MAX_LICENSE = 200


@dataclass(frozen=True)
class Revision:
    """A commit of a repository on the Hugging Face hub."""

    group: str
    name: str
    commit: str

    @classmethod
    def of_receipt(cls, receipt: Receipt) -> Revision | None:
        """What the source was read from, if that was the hub."""
        address = _ADDRESS.match(receipt.content["source"].get("address", ""))
        return cls(*address.groups()) if address else None

    @classmethod
    def of_snapshot(cls, path: Path) -> Revision | None:
        """What a folder of the hub's cache, or a file in it, is."""
        snapshot = _SNAPSHOT.search(path.absolute().as_posix())
        return cls(*snapshot.groups()) if snapshot else None


@dataclass(frozen=True)
class Origin:
    """What a bill says and a receipt may not: the licence, and the ``revision`` of a source that was read from the
    hub's cache. None: not known.
    """

    license: str | None = None
    revision: Revision | None = None


def license_of(checkpoint: Checkpoint) -> str | None:
    """The licence that a checkpoint states, in its model card or a GGUF's keys."""
    stated = None
    with suppress(InputRefused):
        stated = front_matter(checkpoint.assets.get("README.md", b"")).get("license")
    keys = getattr(checkpoint.metadata.get("gguf"), "kv", {})
    stated = stated or getattr(keys.get("general.license"), "value", None)
    return stated[:_MAX_LICENSE] if isinstance(stated, str) and stated.isprintable() else None


def bill(receipt: Receipt, origin: Origin) -> str:
    """The text of the file: ASCII JSON."""
    content, output = receipt.content, receipt.content["output"]
    serial = uuid.uuid5(_NAMESPACE, "".join(file.sha256 for file in receipt.files))
    source, data = _source(receipt, origin), list(_data(content["plan"]["options"]))
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


def _source(receipt: Receipt, origin: Origin) -> dict[str, Any]:
    source: Mapping[str, Any] = receipt.content["source"]
    component: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": "source", "name": source["name"]}
    properties = [*_digests(source["hashes"]), _property("format", source["format"])]
    if (revision := Revision.of_receipt(receipt) or origin.revision) is not None:
        component |= {"group": revision.group, "name": revision.name, "version": revision.commit}
        component["purl"] = f"pkg:huggingface/{revision.group}/{revision.name}@{revision.commit}"
    elif "address" in source:
        properties.append(_property("address", source["address"]))
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
