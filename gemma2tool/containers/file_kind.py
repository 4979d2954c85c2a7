"""What a file really is, from its first bytes, whatever its name says.

Readers ask when a file is not what they expected, so that the message names the cause: a Git LFS pointer, a web page
or an error message saved in place of weights, an archive, another container.

Sources: the Git LFS specification (docs/spec.md), file(1)'s magic numbers, and the containers' own modules.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import FileReader, open_for_reading

HEAD_BYTES = 4096
"""How many of a file's first bytes ``identify`` is given; fewer only if the file is shorter."""

_MAX_TEXT = 160  # of a message that is quoted
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = re.compile(rb"\nsize (\d{1,19})\n")
_PAGE = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"\s*<(?:\?xml|Error>)")
_XML_MESSAGE = re.compile(rb"<Message>([^<]*)</Message>")
_MESSAGE_KEYS = ("error", "message", "detail", "msg", "error_description")
_DOWNLOAD = "download the file itself; if it needs an account or a licence, log in first"
_UNPACK = "unpack it, then pass the folder or the file that was in it"
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!\x1a\x07": "RAR",
}
_CONTAINERS = {
    b"GGUF": ("gguf", "a GGUF file", ".gguf"),
    b"\x89HDF\r\n\x1a\n": ("hdf5", "an HDF5 file", ".h5"),
    b"SBS\n": ("sbs", "a gemma.cpp file", ".sbs"),
}
_PART = rb'{"__metadata__":{"part":"{\"schema\":\"gemma2tool.part/'


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    ``name``: a short fixed name ("lfs-pointer", "html", "gzip", "safetensors", ...). ``text``: what it is, for a
    message after "is ". ``remedy``: what to do, as an imperative. ``id``: of the error that it causes where another
    kind is expected. ``suffixes``: with which its readers find it.
    """

    name: str
    text: str
    remedy: str
    id: str = "file.other-container"
    suffixes: tuple[str, ...] = ()


def identify(head: bytes, size: int) -> FileKind | None:
    """What a file of ``size`` bytes is that begins with ``head`` (``HEAD_BYTES``, or all of it); None: unknown."""
    return _container(head) or _archive(head) or _not_downloaded(head, size) or _text(head, size)


def identify_file(path: Path) -> FileKind | None:
    """``identify`` of a file. Raises ``InputRefused`` if it cannot be read."""
    with open_for_reading(path) as reader:
        return _identify_open(reader)


def refuse_foreign(reader: FileReader, expected: str) -> None:
    """Raises ``InputRefused`` that says what an open file is, if that can be seen and is not ``expected``: a name of
    ``FileKind``, or empty.

    Readers call it before they report that the file is not their container, because this message is more specific.
    """
    kind = _identify_open(reader)
    if kind is not None and kind.name != expected:
        raise foreign(kind, str(reader.path))


def foreign(kind: FileKind, where: str) -> InputRefused:
    """The error for a file ``where`` that is of ``kind`` and not what it should be."""
    return InputRefused(kind.id, f"{where}: is {kind.text}", hint=kind.remedy)


def _identify_open(reader: FileReader) -> FileKind | None:
    return identify(bytes(reader.pread(0, min(reader.size, HEAD_BYTES))), reader.size)


def _container(head: bytes) -> FileKind | None:
    for magic, (name, text, suffix) in _CONTAINERS.items():
        if head.startswith(magic):
            return FileKind(name, text, f"rename it: its name should end in {suffix}", suffixes=(suffix,))
    if head.startswith(b"GGUF"[::-1]):
        return FileKind(
            "gguf-big-endian", "a big-endian GGUF file", "use a little-endian file: llama.cpp's gguf_convert_endian.py"
        )
    if head[8:].startswith(_PART):
        return FileKind(
            "part", "a part that --shard wrote", "merge the parts of all shards first: gemma2tool merge OUT"
        )
    if head[8:10] in (b'{"', b"{ ", b"{\n", b"{}") and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        remedy = "rename it: its name should end in .safetensors"
        return FileKind("safetensors", "a safetensors file", remedy, suffixes=(".safetensors",))
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return FileKind("pickle", "a Python pickle", "save the tensors alone, as a state dict, with torch.save")
    if head.startswith(b"PK\x03\x04"):
        return _zip(head)
    return None


def _zip(head: bytes) -> FileKind:
    """A zip archive, by the name of its first member."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/version", b"/byteorder")) or b"/data/" in name:
        return FileKind("torch", "a file of torch.save", "rename it: its name should end in .pt, .pth, .bin or .ckpt")
    if name.endswith(b".npy"):
        return FileKind("npz", "a NumPy archive (.npz)", "save the tensors as safetensors", id="file.archive")
    if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
        return FileKind("keras", "a Keras archive (.keras)", _UNPACK, id="file.archive")
    return FileKind("zip", "a zip archive", _UNPACK, id="file.archive")


def _archive(head: bytes) -> FileKind | None:
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return FileKind(name.lower(), f"a {name} archive", _UNPACK, id="file.archive")
    if head[257:262] == b"ustar":
        return FileKind("tar", "a tar archive", "unpack it with tar -xf, then give the folder", id="file.archive")
    return None


def _not_downloaded(head: bytes, size: int) -> FileKind | None:
    if head.startswith(_POINTER):
        target = _POINTER_SIZE.search(head)
        of_size = f" of {int(target[1]):,} bytes" if target else ""
        text = f"a Git LFS pointer to a file{of_size}, not that file"
        return FileKind(
            "lfs-pointer",
            text,
            "run 'git lfs pull' in its repository, or download the file itself",
            id="file.lfs-pointer",
        )
    if len(head) >= 64 and not any(head):
        text = f"{size:,} bytes of which the first {len(head):,} are zero"
        return FileKind("zeros", text, "download the file again", id="file.zeros")
    return None


def _text(head: bytes, size: int) -> FileKind | None:
    """A page, an error message or another text."""
    if _PAGE.match(head):
        return FileKind("html", "a web page (HTML)", _DOWNLOAD, id="file.web-page")
    if _XML.match(head):
        message = _XML_MESSAGE.search(head)
        quote = f" that says {_shown(message[1])}" if message else ""
        return FileKind("xml", f"an XML document{quote}", _DOWNLOAD, id="file.message")
    try:
        text = head.decode("utf-8") if size <= len(head) else head[:-3].decode("utf-8", "ignore")
    except UnicodeDecodeError:
        return None
    if not text.strip() or not all(char.isprintable() or char in "\n\r\t" for char in text):
        return None
    if text.lstrip()[0] in "{[":
        return _json(text, size)
    if size > len(head):
        return FileKind("text", f"a text of {size:,} bytes", _DOWNLOAD, id="file.message")
    return FileKind("text", f"a text that says {_shown(head)}", _DOWNLOAD, id="file.message")


def _json(text: str, size: int) -> FileKind:
    """JSON: a server's error message if it has a key of one, otherwise a document, which may be right elsewhere."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        for key in _MESSAGE_KEYS:
            if content.get(key):
                message = _shown(str(content[key]).encode("utf-8", "replace"))
                return FileKind("json-message", f"a JSON message that says {message}", _DOWNLOAD, id="file.message")
    return FileKind("json", f"a JSON document of {size:,} bytes", "give the file of the weights", id="file.message")


def _shown(raw: bytes) -> str:
    return quoted(" ".join(raw.decode("utf-8", "replace").split()), _MAX_TEXT)
