"""Code that a config names: files of the model, kernels of a hub, modules that a library imports by their names.

Sources: transformers 5.23 (``auto_map``, ``custom_pipelines``; ``is_kernel`` in integrations/hub_kernels.py), mlx-lm
(``model_file``), peft 0.21 (``auto.py``, ``tuners/lora/tp_layer.py``), sentence-transformers (``import_from_string`` of
modules, routers and activation functions).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gemma2tool.model.loaders import CODE_KEYS
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

_REMOTE_KEYS = (*CODE_KEYS, "custom_pipelines")
"""The last one is for transformers' pipelines."""
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_KERNEL = re.compile(r"(?:[^|]*\|)?[^/:|]+/[^/:]+")
_ACTIVATIONS = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
_MODULES = ("parent_library", "megatron_core")
_OWN = re.compile(r"(?:torch|transformers|sentence_transformers|diffusers|megatron|peft)(?:\.|$)")
_PARTS = ("sentence_transformers", "auto_mapping")
"""Parts of configs whose keys are read as well."""


def scan_imports(name: str, content: Any, place: Place) -> Iterator[ScanFinding]:
    """The findings of a JSON document of this name."""
    if name == "modules.json" and isinstance(content, list):
        yield from _classes([entry.get("type") for entry in content if isinstance(entry, dict)], place)
    if not isinstance(content, dict):
        return
    if name == "router_config.json" and isinstance(content.get("types"), dict):
        yield from _classes(list(content["types"].values()), place)
    for key in _REMOTE_KEYS:
        if content.get(key):
            yield place.finding("code.remote", f"{key} names {quoted(json.dumps(content[key]), 200)}")
    for key in _KERNEL_KEYS:
        for value in _texts(content.get(key)):
            if _KERNEL.match(value):
                yield place.finding("code.remote", f"{key} names {quoted(value, 200)}, a kernel of the hub")
    for part in (content, *(content[key] for key in _PARTS if isinstance(content.get(key), dict))):
        yield from _modules(part, place)


def _modules(content: dict[str, Any], place: Place) -> Iterator[ScanFinding]:
    """Modules beyond the libraries' own. A name without a dot is an activation function of transformers."""
    for key in (*_ACTIVATIONS, *_MODULES):
        value = content.get(key)
        if isinstance(value, str) and value and not _OWN.match(value) and (key in _MODULES or "." in value):
            yield place.finding("code.import", f"{key} is {quoted(value, 200)}")


def _classes(types: list[Any], place: Place) -> Iterator[ScanFinding]:
    """Classes that sentence-transformers imports from the folder, or from anywhere."""
    if foreign := [str(name) for name in types if not str(name).startswith("sentence_transformers.")]:
        yield place.finding("code.remote", f"it names the class {quoted(foreign[0])}")


def _texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else [value]
    return [text for text in values if isinstance(text, str)]
