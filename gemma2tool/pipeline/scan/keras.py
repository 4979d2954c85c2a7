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

_LAMBDA = re.compile(rb'"class_name"\s*:\s*"(?:Lambda|__lambda__)"')
_CHUNK, _OVERLAP = 8 << 20, 256
_MAX_OBJECTS = 100_000
_LAMBDAS = ("Lambda", "__lambda__")
_OWN_MODULES = re.compile(r"(?:keras|keras_hub|keras_nlp|tf_keras|tensorflow\.keras|tensorflow\.python\.keras)(?:\.|$)")
_OWN_PACKAGES = re.compile(r"(?:keras_hub|keras_nlp|keras)>")
_VALUES = frozenset(
    f"__{kind}__" for kind in ("tuple", "numpy", "tensor", "bytes", "slice", "ellipsis", "keras_tensor")
)


def scan_architecture(content: Any, place: Place) -> Iterator[ScanFinding]:
    """The findings of a JSON document, if it describes Keras objects."""
    lambdas, foreign = 0, dict[str, None]()
    queue, seen = [content], 0
    while queue and seen < _MAX_OBJECTS:
        value = queue.pop()
        seen += 1
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
    elif module == "builtins" and kind == "function":
        return
    elif module is None and isinstance(name, str) and ">" in name and not _OWN_PACKAGES.match(name):
        yield name


def scan_hdf5(path: Path, place: Place) -> Iterator[ScanFinding]:
    """A Lambda layer in the text of an HDF5 file's attributes, wherever they are stored."""
    with open_for_reading(path) as reader:
        window = b""
        for first in range(0, reader.size, _CHUNK):
            window = window[-_OVERLAP:] + reader.pread(first, min(_CHUNK, reader.size - first))
            if b"ambda" in window and _LAMBDA.search(window):
                yield place.finding("keras.lambda", "its model_config has a layer of class Lambda")
                return
