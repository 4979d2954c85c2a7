"""Where a Modelfile of Ollama takes the model from: ``ollama create -f`` reads the files that it names.

Source: ollama's parser/parser.go (instructions in any case, values in quotes over several lines, characters that are
not printable left out) and types/model/name.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

NAME = re.compile(r"(?:.*[./_-])?modelfile(?:[._-].*)?", re.I)
"""Of files that are called Modelfile."""
_SOURCES = ("from", "adapter", "draft")
_WEIGHTS = (".gguf", ".safetensors", ".bin")
_OUTSIDE = re.compile(r"[\\/~]|[A-Za-z]:[\\/]")
_NETWORK = re.compile(r"[\\/]{2}|[A-Za-z][A-Za-z0-9+.-]*://")
_HOSTS = ("hf.co", "huggingface.co", "registry.ollama.ai", "ollama.com")


def scan_modelfile(text: str, place: Place) -> Iterator[ScanFinding]:
    """The findings of a Modelfile at ``place``, whose folder is in the folder that is scanned."""
    depth = len(PurePosixPath(place.file).parts) - 1 if not place.where else 0
    for name, value, line in instructions(text):
        if name not in _SOURCES or not value:
            continue
        shown = f"{name.upper()} takes {quoted(value, 200)}"
        if _NETWORK.match(value) or ((_OUTSIDE.match(value) or _climbs(value, depth)) and not _is_weights(value)):
            yield place.finding("files.escape", shown, line=line)
        elif _OUTSIDE.match(value) or _climbs(value, depth):
            yield place.finding("files.elsewhere", f"{shown}, outside of the folder", line=line, severity="odd")
        elif name == "from" and not value.startswith(".") and not _is_weights(value):
            yield from _named_model(shown, value, place, line)


def _named_model(shown: str, value: str, place: Place, line: int) -> Iterator[ScanFinding]:
    """The name of a model in a registry; a note, unless the registry is one that nobody expects."""
    host, _, rest = value.partition("/")
    if "/" in rest and ("." in host or ":" in host) and host.lower() not in _HOSTS:
        yield place.finding("files.elsewhere", f"{shown}, of another registry", line=line, severity="odd")
    else:
        yield place.finding("files.elsewhere", f"{shown}, unless a file has this name", line=line)


def _is_weights(value: str) -> bool:
    return value.lower().endswith(_WEIGHTS)


def _climbs(value: str, depth: int) -> bool:
    """Whether a relative path leads above the folder that is scanned, ``depth`` folders above the Modelfile."""
    for part in value.replace("\\", "/").split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """The instructions in lower case, their values and their lines."""
    name, quote, first, value = "", "", 0, list[str]()
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), start=1):
        if not name:
            words = line.strip(" \t").split(None, 1)
            if len(words) < 2 or words[0].startswith("#"):
                continue
            name, first, line = words[0].lower(), number, words[1]
            quote = next((mark for mark in ('"""', '"') if _printable(line).startswith(mark)), "")
            line = _printable(line).removeprefix(quote)
        value.append(_printable(line))
        if value[-1].endswith(quote):
            yield name, "\n".join(value).removesuffix(quote), first
            name, value = "", []


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).strip()
