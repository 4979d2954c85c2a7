"""The receipt: what was written, of what, how it was checked, and enough to check it again without its source.

``OUTPUT.receipt.json`` lies beside the output it describes. Its schema is ``receipt.schema.json``, explained in
docs/receipt.md. It holds nothing that changes from one run to the next: no times, no folders, no host.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT_DTYPES
from gemma2tool.receipt.files import FileDigest
from gemma2tool.receipt.schema import fault, schema
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.verify.compare.reference_logits import ReferenceLogits
from gemma2tool.verify.digest import Hashes, config_digest, model_digest, tensors_digest
from gemma2tool.verify.gates import loosest
from gemma2tool.verify.json_values import json_value
from gemma2tool.verify.result import Verification
from gemma2tool.version import __version__

SCHEMA_VERSION = 1
SUFFIX = ".receipt.json"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 64 << 20, 1_000_000, 24

_BEGINS = re.compile(rb'\s*\{\s*"schema"\s*:\s*"gemma2tool\.receipt"')
_LIBRARIES = ("numpy", "ml_dtypes", "torch", "sentencepiece")


def receipt_path(output: Path) -> Path:
    """Where the receipt of ``output`` belongs: ``model.gguf.receipt.json``, ``FOLDER.receipt.json``."""
    whole = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    return whole.with_name(whole.name + SUFFIX)


def looks_like_one(path: Path) -> bool:
    """Whether a file begins as our receipts do."""
    try:
        with open_for_reading(path) as reader:
            return _BEGINS.match(reader.pread(0, min(reader.size, 256))) is not None
    except ToolError:
        return False


def build(
    source: Checkpoint,
    output: Checkpoint,
    files: Sequence[FileDigest],
    plan: Mapping[str, Any],
    verification: Verification,
) -> dict[str, Any]:
    """The receipt of ``output``, whose ``files`` were made of ``source`` as ``plan`` says, and for which ``verification`` vouches.

    ``verification`` must have compared all tensors. ``plan``: the object of that name in the schema.
    """
    measured = verification.measurements
    compared = [each.comparison for each in measured.tensors]
    reference = measured.reference
    return {
        "schema": "gemma2tool.receipt",
        "schema_version": SCHEMA_VERSION,
        "tool": _versions(),
        "source": {
            "name": Path(os.path.abspath(source.path)).name,
            "format": source.format,
            "hashes": Hashes.of(
                {each.name: each.source_digest for each in compared}, source.config, source.assets
            ).to_json(),
        },
        "output": {
            "name": Path(os.path.abspath(output.path)).name,
            "format": output.format,
            "bytes": sum(file.nbytes for file in files),
            "hashes": Hashes.of(
                {each.name: each.candidate_digest for each in compared}, output.config, output.assets
            ).to_json(),
            "config": json_value(output.config.to_hf()),
            "files": [file.to_json() for file in files],
        },
        "plan": json_value(plan),
        "tensors": {each.name: _tensor(each.to_json()) for each in sorted(compared, key=lambda each: each.name)},
        "verification": _verdict(verification),
        "logits": None if reference is None else _logits(*reference),
    }


def _versions() -> dict[str, str]:
    found = {"gemma2tool": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _tensor(compared: Mapping[str, Any]) -> dict[str, Any]:
    names = {"candidate_type": "output_type", "candidate_digest": "output_digest"}
    return json_value({names.get(name, name): value for name, value in compared.items() if name != "ok"})


def _verdict(verification: Verification) -> dict[str, Any]:
    """The gates without what stands elsewhere in the receipt, and without paths."""
    content = verification.to_json()
    for gate in content["gates"]:
        if gate["name"] == "tensors":
            gate["metrics"].pop("tensors", None)
    return {name: content[name] for name in ("passed", "kind", "gates", "causes")}


def _logits(source: ReferenceLogits, output: ReferenceLogits) -> dict[str, Any]:
    return {
        "ids": source.ids.tolist(),
        "source": {"window": source.window, **source.to_json()},
        "output": {"window": output.window, **output.to_json()},
    }


def encode(receipt: Mapping[str, Any]) -> bytes:
    """The receipt as the bytes of its file: ASCII, the same for the same receipt."""
    return json.dumps(receipt, indent=1, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class Receipt:
    """A receipt that was read: what a check needs of it. ``content`` is the whole."""

    path: Path
    content: Mapping[str, Any]
    format: str
    hashes: Mapping[str, str | None]
    config: Gemma2Config
    files: tuple[FileDigest, ...]
    shapes: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, str]
    kind: str
    source_logits: ReferenceLogits | None
    logits: ReferenceLogits | None

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        return sum(file.nbytes for file in self.files)


def read(path: Path) -> Receipt:
    """Read a receipt, which may come from anyone.

    Raises ``InputRefused``: ``receipt.version`` for one of another version, ``receipt.schema`` for what is none, and
    ``receipt.contradiction`` for one whose own parts disagree or whose output failed its verification.
    """
    content = _content(path)
    if not isinstance(content, dict) or content.get("schema") != "gemma2tool.receipt":
        raise InputRefused(
            "receipt.schema", f"{path}: not a receipt", hint="give the file that gemma2tool wrote beside the output"
        )
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputRefused(
            "receipt.version",
            f"{path}: a receipt of a version other than {SCHEMA_VERSION}, the one this gemma2tool knows",
            hint="use the gemma2tool that wrote it, or a newer one",
        )
    wrong = fault(content, schema())
    if wrong:
        raise InputRefused(
            "receipt.schema", f"{path}: {wrong}", hint="write the receipt again: convert the output anew"
        )
    output, tensors, logits = content["output"], content["tensors"], content["logits"]
    receipt = Receipt(
        path=path,
        content=content,
        format=output["format"],
        hashes=output["hashes"],
        config=_config(output["config"], path),
        files=tuple(FileDigest(each["name"], each["bytes"], each["sha256"]) for each in output["files"]),
        shapes={name: tuple(each["shape"]) for name, each in tensors.items()},
        digests={name: each["output_digest"] for name, each in tensors.items()},
        kind=content["verification"]["kind"],
        source_logits=_reference(logits, "source", path),
        logits=_reference(logits, "output", path),
    )
    _check(receipt)
    return receipt


def _content(path: Path) -> Any:
    try:
        return strict_json.load(path, what="receipt", max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    except InputRefused as refused:
        hint = refused.hint or "give the file that gemma2tool wrote beside the output, whole and as it was"
        raise InputRefused(refused.id, refused.message, hint=hint) from refused


def _config(content: Mapping[str, Any], path: Path) -> Gemma2Config:
    try:
        return Gemma2Config.from_hf(content)
    except InputRefused as refused:
        raise InputRefused(refused.id, f"{path}: output.{refused.message}", hint="write the receipt again") from refused


def _reference(logits: Mapping[str, Any] | None, side: str, path: Path) -> ReferenceLogits | None:
    if logits is None:
        return None
    content = logits[side]
    width = len(content["tokens"][0])
    rows = [*content["tokens"], *content["logits"]]
    heights = {len(content[name]) for name in ("tokens", "logits", "log_sum")}
    if any(len(row) != width for row in rows) or len(heights) != 1 or max(heights) > len(logits["ids"]):
        raise InputRefused(
            "receipt.schema", f"{path}: logits.{side}: lists of different lengths", hint="write the receipt again"
        )
    return ReferenceLogits.from_json(logits["ids"], content["window"], content)


def _kind(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """The kind that follows from the tensors' entries, as ``tensors.kind_of`` has it from the tensors."""
    kinds = set()
    for each in tensors.values():
        stored, lost = each["output_type"], each["max_abs_error"] != 0
        if lost and each["rule"] == "expected" and stored in FLOAT_DTYPES:
            kinds.add("convention" if stored == "f32" else stored)
        elif lost and each["rule"] != "exact":
            kinds.add(stored)
    return loosest(kinds)


def _check(receipt: Receipt) -> None:
    """A receipt that was edited, or damaged in transit, contradicts itself."""
    hashes, content = receipt.hashes, receipt.content

    def refuse(what: str) -> None:
        hint = "the receipt was changed after it was written: get it again, or write it anew"
        raise InputRefused("receipt.contradiction", f"{receipt.path}: {what}", hint=hint)

    if not content["verification"]["passed"]:
        refuse("the output failed its verification")
    if failed := [gate["name"] for gate in content["verification"]["gates"] if gate["status"] == "failed"]:
        refuse(f"verification.passed is true, but its gate {quoted(failed[0])} failed")
    if (kind := _kind(content["tensors"])) != receipt.kind:
        refuse(f"verification.kind is {quoted(receipt.kind)}, but what it says of its tensors is {kind}")
    if config_digest(receipt.config) != hashes["config"]:
        refuse("output.config is not what output.hashes.config is the digest of")
    for side, digests in (
        ("source", {name: each["source_digest"] for name, each in content["tensors"].items()}),
        ("output", receipt.digests),
    ):
        said = content[side]["hashes"]
        if tensors_digest(digests) != said["tensors"]:
            refuse(f"the tensors' digests are not what {side}.hashes.tensors is the digest of")
        if model_digest(said["tensors"], said["config"]) != said["model"]:
            refuse(f"{side}.hashes.model is not the digest of its parts")
    vocabulary = receipt.config.vocab_size
    for logits in (receipt.logits, receipt.source_logits):
        if logits is not None and max(int(logits.ids.max()), int(logits.tokens.max())) >= vocabulary:
            refuse(f"logits: a token id outside the vocabulary of {vocabulary}")
    if receipt.logits is not None and len(receipt.logits.ids) > receipt.config.max_position_embeddings:
        refuse("logits: a prompt longer than the model's positions")
