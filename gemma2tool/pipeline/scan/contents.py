"""Files by what they are: the scan of one file's content, or of one member of an archive."""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma2tool.containers import file_kind, gguf, gguf_keys, safetensors, strict_json, strict_yaml
from gemma2tool.containers.hdf5 import reader as hdf5
from gemma2tool.containers.pickle_program import MAGIC
from gemma2tool.containers.tokenizer_json import added_entries
from gemma2tool.errors import InputRefused
from gemma2tool.formats.tokenizers.files import MAX_JSON_BYTES, templates_of
from gemma2tool.model.tokenizer import DEFAULT_TEMPLATE
from gemma2tool.pipeline.scan import archives, imports, keras, pickles, yaml_tags
from gemma2tool.pipeline.scan.acted_on import scan_acted_on
from gemma2tool.pipeline.scan.archives import Content, Unpacked
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
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
_TEMPLATES = (".jinja", ".jinja2", ".j2", ".template")
_PLAIN_TEXT = (*_TEMPLATES, ".md", ".txt", ".yaml", ".yml", ".py")
_MAX_SPARSE = 1 << 40
"""Of the file in which a member stands for reading."""
_ScanPath = Callable[[Path, Place], Iterator[ScanFinding]]
_MAGIC_NPY = b"\x93NUMPY"
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
    if kind is not None and kind.name in _CONTAINERS:
        yield from _container(content, _CONTAINERS[kind.name], place)
    else:
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
        yield from _json(content.name.rsplit("/", 1)[-1], data, place)
    elif lower.endswith(_PLAIN_TEXT):
        text = _decoded(data[:MAX_TEXT_BYTES])
        if lower.endswith((".yaml", ".yml")):
            yield from yaml_tags.scan_yaml(text, place)
            yield from _yaml_templates(text, place)
        if lower.endswith(_TEMPLATES):
            yield from scan_template(text, place, located=not place.where)
        else:
            yield from scan_text(text, place, located=not place.where)
    elif pickles.looks_like_pickle(data, content.name):
        yield from pickles.scan_pickle(data, place, whole=whole)


def _yaml_templates(text: str, place: Place) -> Iterator[ScanFinding]:
    """The chat templates of a config in YAML; a small one, as the library is slow."""
    if "chat_template" not in text:
        return
    try:
        content = strict_yaml.load(text, what=place.file, max_chars=MAX_YAML_CHARS)
    except InputRefused:
        return
    if isinstance(content, dict):
        yield from _templates(content, place)


def _templates(content: Mapping[str, Any], place: Place) -> Iterator[ScanFinding]:
    for label, template in templates_of(content.get("chat_template")).items():
        part = place.part("chat_template" if label == DEFAULT_TEMPLATE else f"chat_template {quoted(label)}")
        yield from scan_template(template, part)


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
        yield _unread(place, error)
        return
    for key, value in keys.items():
        part = place.part(key)
        yield from scan_text(key, part, one_line=True)
        if not isinstance(value.value, str):
            continue
        if _TEMPLATE_KEY.fullmatch(key):
            yield from scan_template(value.value, part)
        else:
            yield from scan_text(value.value, part, one_line=key in ("general.name", "general.license"))
    for key in ("general.tags", "general.languages", "general.datasets"):
        if isinstance(listed := getattr(keys.get(key), "value", None), list):
            yield from _each(map(str, listed), place.part(key))
    try:
        yield from _each(gguf.read_header(path, GGML_BLOCKS, UNREAD_TYPES).tensors, place.part("tensors"))
    except InputRefused as error:
        yield _unread(place, error)


def _safetensors(path: Path, place: Place) -> Iterator[ScanFinding]:
    try:
        header = safetensors.read_header(path)
    except InputRefused as error:
        yield _unread(place, error)
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


def _json(name: str, data: bytes, place: Place) -> Iterator[ScanFinding]:
    try:
        contents = [strict_json.load(data, what=name, max_bytes=MAX_JSON_BYTES)]
    except InputRefused as error:
        yield _unread(place, error)
        if error.id != "json.duplicate-key":
            return
        contents = [json.loads(data, object_pairs_hook=pairs) for pairs in (dict, lambda pairs: dict(pairs[::-1]))]
    findings = (finding for content in contents for finding in _json_value(name, content, place))
    yield from dict.fromkeys(findings)


def _unread(place: Place, error: InputRefused) -> ScanFinding:
    """The finding for a file that its reader refuses; other readers take one of what is there twice."""
    return place.finding("files.ambiguous" if ".duplicate-" in error.id else "files.unread", error.message)


def _json_value(name: str, content: Any, place: Place) -> Iterator[ScanFinding]:
    yield from imports.scan_imports(name, content, place)
    if not isinstance(content, dict):
        return
    if name == "tokenizer.json":
        for entry in added_entries(content).values():
            yield from _token(entry.content, place.part("added_tokens"))
        return
    yield from _templates(content, place)
    yield from _index(content.get("weight_map"), place)
    yield from keras.scan_architecture(content, place)
    yield from _texts({key: value for key, value in content.items() if key != "chat_template"}, place)


def _index(weight_map: Any, place: Place) -> Iterator[ScanFinding]:
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    escaping = [file for file in files if not isinstance(file, str) or "/" in file or "\\" in file or ".." in file]
    if escaping:
        yield place.finding("files.escape", f"it names the file {quoted(escaping[0])}")


def _texts(content: Mapping[str, Any], place: Place) -> Iterator[ScanFinding]:
    """The texts of a config: tokens, names, descriptions."""
    queue: list[tuple[str, Any]] = list(content.items())
    for key, value in queue:
        if isinstance(value, str):
            yield from scan_text(value, place.part(key))
        elif isinstance(value, dict) and len(queue) < 100_000:
            queue += value.items()
        elif isinstance(value, list) and len(queue) < 100_000:
            queue += [(key, item) for item in value]


def _token(text: object, place: Place) -> Iterator[ScanFinding]:
    if isinstance(text, str):
        for finding in scan_text(text, place):
            yield place.finding(finding.id, f"{quoted(text)}: {finding.message}")
