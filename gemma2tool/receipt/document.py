"""The receipt: what was written, from what, how it was verified, and enough to verify it again without its source.

``OUTPUT.receipt.json`` is beside the output that it describes. Its schema is ``receipt.schema.json``, explained in
docs/receipt.md. It contains nothing that changes from run to run: no times, no folders, no host names.
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
from typing import Any, NoReturn

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.digest import Hashes, config_digest, model_digest, tensors_digest
from gemma2tool.model.lazy import FLOAT_DTYPES
from gemma2tool.receipt.chat import chat_entry
from gemma2tool.receipt.files import FileDigest
from gemma2tool.receipt.schema import schema, violation
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading
from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.reference_logits import ReferenceLogits
from gemma2tool.verify.gates import loosest
from gemma2tool.verify.json_values import json_value
from gemma2tool.verify.result import Verification
from gemma2tool.version import __version__

SCHEMA_VERSION = 1
SUFFIX = ".receipt.json"
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 64 << 20, 1_000_000, 24

_BEGINNING = re.compile(rb'\s*\{\s*"schema"\s*:\s*"gemma2tool\.receipt"')
_LIBRARIES = ("numpy", "ml_dtypes", "torch", "sentencepiece")


def receipt_path(output: Path) -> Path:
    """The path of the receipt of ``output``: ``model.gguf.receipt.json``, ``FOLDER.receipt.json``."""
    absolute = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    return absolute.with_name(absolute.name + SUFFIX)


def is_receipt(path: Path) -> bool:
    """Whether a file starts like a receipt of gemma2tool."""
    try:
        with open_for_reading(path) as reader:
            return _BEGINNING.match(reader.pread(0, min(reader.size, 256))) is not None
    except ToolError:
        return False


# -- writing -----------------------------------------------------------------------------------------------------------


def build_receipt(
    source: Checkpoint,
    output: Checkpoint,
    files: Sequence[FileDigest],
    plan: Mapping[str, Any],
    verification: Verification,
) -> dict[str, Any]:
    """The receipt of ``output``, whose ``files`` were made from ``source`` and passed ``verification``.

    ``verification`` must have compared all tensors. ``plan``: the object of that name in the schema.
    """
    measurements = verification.measurements
    assert measurements is not None and measurements.tensors is not None, "the tensors were not compared"
    comparisons = sorted((error.comparison for error in measurements.tensors), key=lambda comparison: comparison.name)
    source_digests = {comparison.name: comparison.source_digest for comparison in comparisons}
    output_digests = {comparison.name: comparison.candidate_digest for comparison in comparisons}
    reference = measurements.reference
    return {
        "schema": "gemma2tool.receipt",
        "schema_version": SCHEMA_VERSION,
        "tool": _versions(),
        "source": {
            "name": Path(os.path.abspath(source.path)).name,
            **({} if source.pinned is None else {"address": source.pinned}),
            "format": source.format,
            "hashes": Hashes.of(source_digests, source).to_json(),
        },
        "output": {
            "name": Path(os.path.abspath(output.path)).name,
            "format": output.format,
            "bytes": sum(file.nbytes for file in files),
            "hashes": Hashes.of(output_digests, output).to_json(),
            "config": json_value(output.config.to_hf()),
            "files": [file.to_json() for file in files],
            "chat": chat_entry(output),
        },
        "plan": json_value(plan),
        "tensors": {comparison.name: _tensor_entry(comparison) for comparison in comparisons},
        "verification": _verification_entry(verification),
        "logits": None if reference is None else _logits_entry(*reference),
    }


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"gemma2tool": __version__, "python": platform.python_version(), **libraries}


def _tensor_entry(comparison: TensorComparison) -> dict[str, Any]:
    names = {"candidate_type": "output_type", "candidate_digest": "output_digest"}
    content = {names.get(name, name): value for name, value in comparison.to_json().items() if name != "ok"}
    entry: dict[str, Any] = json_value(content)
    return entry


def _verification_entry(verification: Verification) -> dict[str, Any]:
    """The gates without what is elsewhere in the receipt, and without paths."""
    content = verification.to_json()
    for gate in content["gates"]:
        if gate["name"] == "tensors":
            gate["metrics"].pop("tensors", None)
    return {name: content[name] for name in ("passed", "kind", "gates", "causes")}


def _logits_entry(source: ReferenceLogits, output: ReferenceLogits) -> dict[str, Any]:
    return {
        "ids": source.ids.tolist(),
        "source": {"window": source.window, **source.to_json()},
        "output": {"window": output.window, **output.to_json()},
    }


def encode_receipt(receipt: Mapping[str, Any]) -> bytes:
    """The receipt as the bytes of its file: ASCII, equal for equal receipts."""
    return json.dumps(receipt, indent=1, allow_nan=False).encode() + b"\n"


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Receipt:
    """A receipt that was read, with the parts that a check needs. ``content`` is all of it."""

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
        """The size of all files together."""
        return sum(file.nbytes for file in self.files)


def read_receipt(path: Path) -> Receipt:
    """Read a receipt, which may come from anyone.

    Raises ``InputRefused``: ``receipt.version`` for another version, ``receipt.schema`` for something that is not a
    receipt, and ``receipt.contradiction`` for one whose parts contradict each other or whose output failed its
    verification.
    """
    content = _content(path)
    if not isinstance(content, dict) or content.get("schema") != "gemma2tool.receipt":
        raise InputRefused(
            "receipt.schema", f"{path}: not a receipt", hint="pass the file that gemma2tool wrote beside the output"
        )
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputRefused(
            "receipt.version",
            f"{path}: a receipt of a version other than {SCHEMA_VERSION}, which this gemma2tool supports",
            hint="use the version of gemma2tool that wrote it, or a newer one",
        )
    if wrong := violation(content, schema()):
        raise InputRefused(
            "receipt.schema", f"{path}: {wrong}", hint="write the receipt again: repeat the conversion of the output"
        )
    output, tensors, logits = content["output"], content["tensors"], content["logits"]
    receipt = Receipt(
        path=path,
        content=content,
        format=output["format"],
        hashes=output["hashes"],
        config=_config(output["config"], path),
        files=tuple(FileDigest(file["name"], file["bytes"], file["sha256"]) for file in output["files"]),
        shapes={name: tuple(tensor["shape"]) for name, tensor in tensors.items()},
        digests={name: tensor["output_digest"] for name, tensor in tensors.items()},
        kind=content["verification"]["kind"],
        source_logits=_reference_logits(logits, "source", path),
        logits=_reference_logits(logits, "output", path),
    )
    _check_consistency(receipt)
    return receipt


def _content(path: Path) -> Any:
    try:
        return strict_json.load(path, what="receipt", max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    except InputRefused as refused:
        hint = refused.hint or "pass the file that gemma2tool wrote beside the output, complete and unchanged"
        raise InputRefused(refused.id, refused.message, hint=hint) from refused


def _config(content: Mapping[str, Any], path: Path) -> Gemma2Config:
    try:
        return Gemma2Config.from_hf(content)
    except InputRefused as refused:
        raise InputRefused(refused.id, f"{path}: output.{refused.message}", hint="write the receipt again") from refused


def _reference_logits(logits: Mapping[str, Any] | None, side: str, path: Path) -> ReferenceLogits | None:
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
    """The kind that follows from the tensors' entries, by the rules of ``tensors.kind_of``."""
    kinds = set()
    for tensor in tensors.values():
        stored, lossy = tensor["output_type"], tensor["max_abs_error"] != 0
        if lossy and tensor["rule"] == "expected" and stored in FLOAT_DTYPES:
            kinds.add("convention" if stored == "f32" else stored)
        elif lossy and tensor["rule"] != "exact":
            kinds.add(stored)
    return loosest(kinds)


def _check_consistency(receipt: Receipt) -> None:
    """Refuse a receipt that contradicts itself, because it was edited or damaged."""
    hashes, content = receipt.hashes, receipt.content

    def refuse(what: str) -> NoReturn:
        hint = "the receipt was changed after it was written: download it again, or write it again"
        raise InputRefused("receipt.contradiction", f"{receipt.path}: {what}", hint=hint)

    if not content["verification"]["passed"]:
        refuse("the output failed its verification")
    statuses = {gate["name"]: gate["status"] for gate in content["verification"]["gates"]}
    if failed := [name for name, status in statuses.items() if status == "failed"]:
        refuse(f"verification.passed is true, but its gate {quoted(failed[0])} failed")
    for gate in ("tensors", *(["logits"] if receipt.logits is not None else [])):
        if statuses.get(gate, "skipped") == "skipped":
            refuse(f"verification.passed is true, but its gates have no result of {quoted(gate)}")
    if (kind := _kind(content["tensors"])) != receipt.kind:
        refuse(f"verification.kind is {quoted(receipt.kind)}, but {kind} follows from its tensors")
    if config_digest(receipt.config) != hashes["config"]:
        refuse("output.hashes.config is not the digest of output.config")
    for side, digests in (
        ("source", {name: tensor["source_digest"] for name, tensor in content["tensors"].items()}),
        ("output", receipt.digests),
    ):
        recorded = content[side]["hashes"]
        if tensors_digest(digests) != recorded["tensors"]:
            refuse(f"{side}.hashes.tensors is not the digest of the tensors' digests")
        if model_digest(recorded["tensors"], recorded["config"]) != recorded["model"]:
            refuse(f"{side}.hashes.model is not the digest of its parts")
    if receipt.kind == "lossless":
        for name, tensor in content["tensors"].items():
            # Values beyond float32 are compared in float32: float64 sources, and GGUF's w + 1 of a norm w.
            of_gguf_norm = content["source"]["format"] == "gguf" and len(tensor["shape"]) == 1
            is_wide = of_gguf_norm or tensor["source_type"] == "f64"
            if tensor["rule"] == "exact" and not is_wide and tensor["source_digest"] != tensor["output_digest"]:
                refuse(f"it says lossless, but the digests of {quoted(name)} differ between source and output")
    vocabulary = receipt.config.vocab_size
    for logits in (receipt.logits, receipt.source_logits):
        if logits is not None and max(int(logits.ids.max()), int(logits.tokens.max())) >= vocabulary:
            refuse(f"logits: a token id outside the vocabulary of {vocabulary}")
    if receipt.logits is not None and len(receipt.logits.ids) > receipt.config.max_position_embeddings:
        refuse("logits: a prompt longer than the model's context")
