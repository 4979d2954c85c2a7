"""Keras models whose architecture holds code: Lambda layers, and classes that are not Keras's.

Architectures are JSON: config.json in a ``.keras`` archive or a preset, the attribute ``model_config`` in HDF5.
Sources: keras/src/saving/serialization_lib.py, CVE-2024-3660, CVE-2025-1550, CVE-2025-8747, CVE-2025-9906.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading

_LAMBDA = re.compile(rb'"class_name"\s*:\s*"(?:Lambda|__lambda__|[^"]{0,64}\\u00)|"[a-z_]{0,10}\\u00[^"]{0,50}"\s*:')
"""Written plainly, or in escapes, which nothing that writes JSON needs there."""
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHUNK, _OVERLAP = 8 << 20, 256
_LAMBDAS = ("Lambda", "__lambda__")
_OWN_MODULES = re.compile(r"(?:keras|keras_hub|keras_nlp|tf_keras|tensorflow\.keras|tensorflow\.python\.keras)(?:\.|$)")
_OWN_PACKAGES = re.compile(r"(?:keras_hub|keras_nlp|keras)>")
_FUNCTIONS = re.compile(r"(?:[\w.]+\.)?(?:utils|saving|export|models|trainers|backend)(?:\.[\w.]*)?\.[a-z_]\w*")
"""Functions of Keras's own that load, save or fetch: what an architecture is made of are classes, and functions of a
tensor.
"""
_VALUES = frozenset(
    f"__{kind}__" for kind in ("tuple", "numpy", "tensor", "bytes", "slice", "ellipsis", "keras_tensor")
)


def scan_architecture(content: Any, place: Place) -> Iterator[ScanFinding]:
    """The findings of a JSON document, if it describes Keras objects."""
    lambdas, foreign = 0, dict[str, None]()
    queue = [content]
    while queue:
        value = queue.pop()
        if isinstance(value, list):
            queue += value
        elif isinstance(value, dict):
            queue += value.values()
            if "class_name" in value and ("config" in value or "module" in value or "registered_name" in value):
                lambdas += value["class_name"] in _LAMBDAS
                foreign.update(dict.fromkeys(_foreign(value)))
    if lambdas:
        yield place.finding("keras.lambda", f"{lambdas} object{'s' * (lambdas > 1)} of class Lambda")
    if foreign:
        yield place.finding("keras.foreign", f"it names {', '.join(map(quoted, list(foreign)[:5]))}")


def _foreign(value: dict[str, Any]) -> Iterator[str]:
    """The module and name of an object that Keras would import from elsewhere."""
    module, name, kind = value.get("module"), value.get("registered_name"), value["class_name"]
    if kind in _VALUES or kind in _LAMBDAS:
        return
    if isinstance(module, str) and module != "builtins" and not _OWN_MODULES.match(module):
        yield f"{module}.{kind}"
    elif isinstance(module, str) and isinstance(kind, str) and (named := _named_function(module, value)):
        yield named
    elif module == "builtins" and kind == "function":
        return
    elif module is None and isinstance(name, str) and ">" in name and not _OWN_PACKAGES.match(name):
        yield name


def _named_function(module: str, value: dict[str, Any]) -> str:
    """A function of Keras's that is not one of a tensor; "" for anything else."""
    config = value.get("config")
    name = config if value["class_name"] == "function" and isinstance(config, str) else value["class_name"]
    return f"{module}.{name}" if _FUNCTIONS.fullmatch(f"{module}.{name}") else ""


def _superblocks(nbytes: int) -> Iterator[int]:
    """Where HDF5's library looks for the beginning of a file: after a user block of 0, 512, 1024, ... bytes."""
    at = 0
    while at + len(_SIGNATURE) <= nbytes:
        yield at
        at = at * 2 or 512


def scan_hdf5(path: Path, place: Place) -> Iterator[ScanFinding]:
    """A Lambda layer in the text of an HDF5 file's attributes, wherever they are stored."""
    with open_for_reading(path) as reader:
        if not any(reader.pread(at, len(_SIGNATURE)) == _SIGNATURE for at in _superblocks(reader.size)):
            return
        window = b""
        for first in range(0, reader.size, _CHUNK):
            window = window[-_OVERLAP:] + reader.pread(first, min(_CHUNK, reader.size - first))
            if (b"ambda" in window or b"\\u00" in window) and _LAMBDA.search(window):
                yield place.finding("keras.lambda", "its model_config has a layer of class Lambda")
                return
