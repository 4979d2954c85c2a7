"""Files by what they are: the scan of one file's content, or of one member of an archive."""

from __future__ import annotations

import codecs
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from gemma2tool.containers import file_kind, gguf, gguf_keys, safetensors, strict_yaml
from gemma2tool.containers.hdf5 import reader as hdf5
from gemma2tool.containers.pickle_program import MAGIC
from gemma2tool.errors import InputRefused
from gemma2tool.pipeline.scan import archives, keras, pickles, yaml_tags
from gemma2tool.pipeline.scan.acted_on import scan_acted_on
from gemma2tool.pipeline.scan.archives import Content, Unpacked
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.json_files import scan_json, scan_templates, unread
from gemma2tool.pipeline.scan.template import scan_template
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS, UNREAD_TYPES
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

MAX_TEXT_BYTES = 4 << 20
MAX_YAML_CHARS = 1 << 18

_EXTERNAL = ("hdf5.external", "hdf5.link")
"""Where an HDF5 file leads to others: values, links."""
_TEMPLATE_KEY = re.compile(r"tokenizer\.chat_template(?:\.(.+))?")
_VOCABULARY_KEY = re.compile(r"tokenizer\.ggml\.(?:tokens|merges)$")
_TEMPLATES = (".jinja", ".jinja2", ".j2", ".template")
_PLAIN_TEXT = (*_TEMPLATES, ".md", ".txt", ".yaml", ".yml", ".py")
_MAX_SPARSE = 1 << 40
"""Of the file in which a member stands for reading."""
_ScanPath = Callable[[Path, Place], Iterator[ScanFinding]]
_MAGIC_NPY = b"\x93NUMPY"
_WEIGHTS = (
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".dill",
    ".npz",
    ".zip",
    ".tar",
    ".keras",
    ".sbs",
)
"""What names of pickles, archives and containers end in."""
_OTHER_FORMATS = (".onnx", ".pb", ".tflite", ".msgpack", ".mlmodel", ".ot", ".engine")
_PROGRAMS = (b"\x7fELF", b"MZ\x90", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")


def scan_file(path: Path, place: Place) -> Iterator[ScanFinding]:
    """The findings of one file. Raises ``InputRefused`` if it cannot be read."""
    with open_for_reading(path) as reader:
        nbytes = reader.size
    with path.open("rb") as stream:
        content = Content(path.name, stream, nbytes, nbytes, Unpacked.of_file(nbytes), path)
        yield from scan_content(content, place)


def scan_content(content: Content, place: Place) -> Iterator[ScanFinding]:
    """The findings of a file or of a member of an archive."""
    yield from scan_acted_on(content, place)
    head = content.head(file_kind.HEAD_BYTES)
    kind = file_kind.identify(head, content.nbytes)
    if kind is not None and kind.name == "lfs-pointer":
        yield place.finding("files.pointer", f"it is {kind.text}")
        return
    if archive := archives.kind_of(head):
        yield from archives.scan_archive(content, archive, place, scan_content)
        return
    suffix = PurePosixPath(content.name.lower()).suffix
    if kind is not None and kind.name in _CONTAINERS:
        yield from _container(content, _CONTAINERS[kind.name], place)
    else:
        if suffix in _CONTAINER_SUFFIXES:  # its reader says why it is none
            yield from _container(content, _CONTAINERS[_CONTAINER_SUFFIXES[suffix]], place)
        elif kind is not None and kind.name == suffix[1:]:
            pass  # a container whose texts are not looked at
        elif suffix in _WEIGHTS and not pickles.is_pickle(content.head(archives.MAX_MEMBER_BYTES)):
            what = f"it is {kind.text}" if kind is not None else "what it is could not be seen"
            yield place.finding("files.unread", f"its name is that of weights; {what}")
        elif suffix in _OTHER_FORMATS:
            yield place.finding("files.unread", "scan does not know its format")
        yield from _scan_data(content, place)
    yield from archives.scan_appended(content, place, scan_content)


def _container(content: Content, scan: _ScanPath, place: Place) -> Iterator[ScanFinding]:
    """The findings of a container, whose reader needs a file. Of a large one in an archive the beginning is enough:
    what is looked at is there, except in HDF5.
    """
    if content.path is not None:
        yield from scan(content.path, place)
        return
    if not content.whole and (scan is _hdf5 or content.nbytes > _MAX_SPARSE):
        yield place.finding("archive.unread", f"of its {content.nbytes:,} bytes only {content.held:,} were looked at")
        return
    with tempfile.TemporaryDirectory(prefix="gemma2tool-") as folder:
        path = Path(folder) / "member"
        with path.open("wb") as file:
            file.write(content.head(content.held))
            file.truncate(content.nbytes)
        for finding in scan(path, place):
            yield replace(finding, message=finding.message.replace(str(path), content.name))


def _scan_data(content: Content, place: Place) -> Iterator[ScanFinding]:
    """The findings of a file that is neither an archive nor a container of tensors."""
    data = content.head(archives.MAX_MEMBER_BYTES)
    whole = len(data) >= content.nbytes
    lower = content.name.lower()
    if data.startswith(_PROGRAMS):
        yield place.finding("code.binary", "it is a program or a library")
    elif data[:2] in MAGIC:
        yield from pickles.scan_pickle(data, place, whole=whole)
    elif data.startswith(_MAGIC_NPY):
        yield from _npy(data, place, whole)
    elif lower.endswith(".json"):
        yield from scan_json(content.name.rsplit("/", 1)[-1], data, content.nbytes, place)
    elif lower.endswith(_PLAIN_TEXT):
        text = _decoded(data[:MAX_TEXT_BYTES])
        if content.nbytes > MAX_TEXT_BYTES:
            message = f"of its {content.nbytes:,} bytes only {MAX_TEXT_BYTES:,} were looked at"
            yield place.finding("files.unread", message)
        if lower.endswith((".yaml", ".yml")):
            yield from yaml_tags.scan_yaml(_decoded(data), place)
            yield from _yaml_templates(text, place)
        if lower.endswith(_TEMPLATES):
            yield from scan_template(text, place, located=not place.where)
        else:
            yield from scan_text(text, place, located=not place.where)
    elif pickles.looks_like_pickle(data, content.name):
        yield from pickles.scan_pickle(data, place, whole=whole)
    if data[:2] not in MAGIC and not pickles.looks_like_pickle(data, content.name):
        yield from pickles.scan_unmarked(data, place)


def _yaml_templates(text: str, place: Place) -> Iterator[ScanFinding]:
    """The chat templates of a config in YAML; a small one, as the library is slow."""
    if "chat_template" not in text:
        return
    try:
        content = strict_yaml.load(text, what=place.file, max_chars=MAX_YAML_CHARS)
    except InputRefused as error:
        yield unread(place, error)
        return
    if isinstance(content, dict):
        yield from scan_templates(content, place)


def _decoded(data: bytes) -> str:
    """A text as readers decode it: by its byte order mark, else as UTF-8."""
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    return data.decode("utf-8", "replace")


def _gguf(path: Path, place: Place) -> Iterator[ScanFinding]:
    """Its keys, whatever types its tensors have."""
    try:
        keys = gguf_keys.read_key_values(path)
    except InputRefused as error:
        yield unread(place, error)
        return
    for key, value in keys.items():
        part = place.part(key)
        yield from scan_text(key, part, one_line=True)
        values = value.value if isinstance(value.value, list) else [value.value]
        texts = [] if _VOCABULARY_KEY.match(key) else [text for text in values if isinstance(text, str)]
        if _TEMPLATE_KEY.fullmatch(key):
            for text in texts:
                yield from scan_template(text, part)
        elif isinstance(value.value, list):
            yield from _each(texts, part)
        else:
            for text in texts:
                yield from scan_text(text, part, one_line=key in ("general.name", "general.license"))
    try:
        yield from _each(gguf.read_header(path, GGML_BLOCKS, UNREAD_TYPES).tensors, place.part("tensors"))
    except InputRefused as error:
        yield unread(place, error)


def _safetensors(path: Path, place: Place) -> Iterator[ScanFinding]:
    try:
        header = safetensors.read_header(path)
    except InputRefused as error:
        yield unread(place, error)
        return
    yield from _each(header.tensors, place.part("tensors"))
    for key, value in header.metadata.items():
        yield from scan_text(key, place.part("metadata"), one_line=True)
        yield from scan_text(value, place.part(f"metadata: {key}"))


def _hdf5(path: Path, place: Place) -> Iterator[ScanFinding]:
    yield from keras.scan_hdf5(path, place)
    try:
        names = hdf5.read_arrays(path)
    except InputRefused as error:
        id = "hdf5.external" if error.id in _EXTERNAL else "files.unread"
        yield place.finding(id, error.message)
        return
    yield from _each(names, place.part("datasets"))


_CONTAINERS: Mapping[str, _ScanPath] = {"gguf": _gguf, "safetensors": _safetensors, "hdf5": _hdf5}
"""By the names of ``file_kind``."""
_CONTAINER_SUFFIXES = {".gguf": "gguf", ".safetensors": "safetensors", ".h5": "hdf5", ".hdf5": "hdf5"}


def _each(names: Any, place: Place) -> Iterator[ScanFinding]:
    """The findings of names, each name's first ones at the place of all."""
    for name in names:
        for finding in scan_text(str(name), place, one_line=True):
            yield place.finding(finding.id, f"{quoted(str(name))}: {finding.message}")


def _npy(data: bytes, place: Place, whole: bool) -> Iterator[ScanFinding]:
    """An array of objects is a pickle behind a header."""
    wide = data[6:7] >= b"\2"
    length = int.from_bytes(data[8 : 12 if wide else 10], "little")
    start = (12 if wide else 10) + length
    if b"'|O'" in data[:start] or b"'O'" in data[:start]:
        yield from pickles.scan_pickle(data[start:], place, whole=whole)
