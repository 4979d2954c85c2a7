"""Paths that are given in place of a checkpoint by mistake: what they are, and what to type instead."""

from __future__ import annotations

import shlex
import struct
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.formats.adapters import naming
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

_MAX_JSON = 64 << 20
_MAX_NAME = 256
MODEL_SUFFIXES = (".safetensors", ".bin", ".gguf", ".ckpt", ".pt", ".pth", ".sbs", ".h5", ".keras", ".json")
"""What the name of a file of a model ends in."""


def missing(path: Path) -> InputRefused:
    """The error for a path that does not exist."""
    return InputRefused("input.missing", f"{path}: no such file or folder", hint="check the path of the checkpoint")


def other_file(path: Path) -> InputRefused | None:
    """The error for a file or folder that belongs to a model and is not one; None if it is nothing that is known."""
    try:
        return adapter(path) or (_folder(path) if path.is_dir() else _file(path))
    except (ToolError, OSError):
        return None


def adapter(path: Path) -> InputRefused | None:
    """The error for an adapter, by the names of its files; None for anything else."""
    if not naming.is_adapter(path):
        return None
    what = "an adapter's config" if path.suffix == ".json" else "an adapter without its model"
    given = path if path.is_dir() or path.name.endswith(naming.SUFFIXES) else path.parent
    hint = f"give the model as SRC, and --lora {shlex.quote(str(given))}; or a DST.gguf for the adapter alone"
    return _kind(path, what, hint)


def _folder(path: Path) -> InputRefused | None:
    ggufs = sorted(file.name for file in path.glob("*.gguf") if file.is_file())
    if len(ggufs) > 1:
        listed = ", ".join(ggufs[:5]) + (f" and {len(ggufs) - 5} more" if len(ggufs) > 5 else "")
        return InputRefused(
            "gguf.several",
            f"{path}: holds {len(ggufs)} GGUF files: {listed}",
            hint=f"name one of them, such as {shlex.quote(str(path / ggufs[0]))}",
        )
    return None


def _file(path: Path) -> InputRefused | None:
    if _is_imatrix(path):
        return _kind(path, "an importance matrix", "give the model as SRC, and --imatrix with this file")
    with open_for_reading(path) as reader:
        if bytes(reader.pread(0, min(reader.size, 64))).lstrip()[:1] != b"{":
            return None
    content = strict_json.load(path, what=path.name, max_bytes=_MAX_JSON)
    folder = shlex.quote(str(path.parent))
    if not isinstance(content, dict):
        return None
    if content.get("schema") == "gemma2tool.receipt":
        output = path.name.removesuffix(".receipt.json")
        return _kind(path, "a receipt of gemma2tool", f"give the output that it describes ({quoted(output)[1:-1]})")
    if isinstance(content.get("weight_map"), dict):
        return _kind(path, "an index of shards", f"give its folder: {folder}")
    if "peft_type" in content:
        return _kind(path, "an adapter's config", f"give the model as SRC, and --lora {folder}")
    if "model_type" in content or "architectures" in content:
        return _kind(path, "a model's config, without weights", f"give its folder ({folder}), or pass it with --config")
    if isinstance(content.get("model"), dict) and "vocab" in content["model"]:
        return _kind(path, "a tokenizer, without weights", f"give its folder: {folder}")
    return None


def _kind(path: Path, what: str, hint: str) -> InputRefused:
    return InputRefused("input.other-file", f"{path}: is {what}", hint=hint)


def _is_imatrix(path: Path) -> bool:
    """Whether a file begins like llama.cpp's legacy importance matrix: a count, a length, the name of a tensor."""
    with open_for_reading(path) as reader:
        head = bytes(reader.pread(0, min(reader.size, 8 + _MAX_NAME)))
    if len(head) < 16:
        return False
    count, length = struct.unpack_from("<ii", head)
    name = head[8 : 8 + length] if 0 < length <= _MAX_NAME else b""
    return 0 < count < 1 << 16 and name.startswith((b"blk.", b"output", b"token_embd")) and name.endswith(b".weight")
