"""The ``general.*`` keys, which describe a model: from its model card, config, generation config and folder name.

The heuristics on names are those of gguf-py (``gguf.metadata``), which llama.cpp's converter uses too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.containers.model_card import front_matter
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyValue, f32, i32, string, strings, u32
from gemma2tool.model.checkpoint import Checkpoint

MAX_JSON_BYTES = 1 << 20
GENERIC_NAMES = ("model", "pytorch_model", "consolidated", "checkpoint", "ckpt")
"""Names of weights files that say nothing about the model; the name of their folder does."""

_SAMPLING: tuple[tuple[str, tuple[str, ...], Callable[[Any], GGUFValue]], ...] = (
    ("sequence", ("sequence",), string),
    ("top_k", ("top_k",), i32),
    ("top_p", ("top_p",), f32),
    ("min_p", ("min_p",), f32),
    ("xtc_probability", ("xtc_probability",), f32),
    ("xtc_threshold", ("xtc_threshold",), f32),
    ("temp", ("temperature",), f32),
    ("penalty_last_n", ("penalty_last_n",), i32),
    ("penalty_repeat", ("repetition_penalty", "penalty_repeat"), f32),
    ("mirostat", ("mirostat",), i32),
    ("mirostat_tau", ("mirostat_tau",), f32),
    ("mirostat_eta", ("mirostat_eta",), f32),
)
"""The general.sampling key, its names in generation_config.json, and how it is written."""


def model_name(path: Path) -> str:
    """The name of the model's folder, or of its file where that is not generic."""
    path = path.absolute()
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem in GENERIC_NAMES else path.stem


@dataclass(frozen=True)
class Subject:
    """What the keys describe: its ``path``, the small files beside it, ``extra`` fields of its config, how many
    ``parameters`` it has; those of an adapter count as gguf-py counts them, below zero.
    """

    path: Path
    assets: Mapping[str, bytes]
    extra: Mapping[str, Any]
    parameters: int


def metadata_keys(checkpoint: Checkpoint, warnings: list[str]) -> list[KeyValue]:
    """``general.sampling.*`` and then authorship, in the converter's order."""
    extra = checkpoint.config.extra
    return keys_about(Subject(checkpoint.path, checkpoint.assets, extra, checkpoint.parameters), warnings)


def keys_about(subject: Subject, warnings: list[str]) -> list[KeyValue]:
    """``metadata_keys`` of anything."""
    return [*_sampling_keys(subject, warnings), *_authorship_keys(subject, warnings)]


def _sampling_keys(subject: Subject, warnings: list[str]) -> list[KeyValue]:
    content = _json_asset(subject, "generation_config.json", warnings)
    keys = []
    for key, names, make in _SAMPLING:
        value = next((content[name] for name in names if content.get(name) is not None), None)
        if value is None:
            continue
        try:
            keys.append((f"general.sampling.{key}", _sampling_value(make, value)))
        except (ValueError, OverflowError):
            warnings.append(f"generation_config.json: {names[0]} is {value!r}: left out")
    return keys


def _sampling_value(make: Callable[[Any], GGUFValue], value: object) -> GGUFValue:
    """Raises ValueError or OverflowError for a value that does not fit."""
    if (
        isinstance(value, str) != (make is string)
        or not isinstance(value, (str, int, float))
        or isinstance(value, bool)
    ):
        raise ValueError
    return make(int(value) if make is i32 else value)


def _authorship_keys(subject: Subject, warnings: list[str]) -> list[KeyValue]:
    import gguf
    from gguf.metadata import Metadata

    total, extra = subject.parameters, dict(subject.extra)
    name = model_name(subject.path)
    card = _model_card(subject, warnings)
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    try:
        metadata = Metadata.apply_metadata_heuristic(Metadata(), card, extra, Path(name), total)
    except (TypeError, ValueError, AttributeError, KeyError):
        warnings.append("README.md: its front matter is not that of a model card and is ignored")
        metadata = Metadata.apply_metadata_heuristic(Metadata(), {}, extra, Path(name), total)
    keys: list[KeyValue] = []
    _add(keys, "name", metadata.name or name)
    for field in ("author", "version", "organization", "finetune", "basename", "description", "quantized_by"):
        _add(keys, field, getattr(metadata, field))
    _add(keys, "size_label", metadata.size_label or (gguf.size_label(total, total, 0, 0) if total > 0 else None))
    _add(
        keys,
        "license",
        ",".join(map(str, metadata.license)) if isinstance(metadata.license, list) else metadata.license,
    )
    _add(keys, "license.name", metadata.license_name)
    _add(keys, "license.link", metadata.license_link)
    for field in ("url", "doi", "uuid", "repo_url"):
        _add(keys, field, getattr(metadata, field))
    for field in ("url", "doi", "uuid", "repo_url"):
        _add(keys, f"source.{field}", getattr(metadata, f"source_{field}"))
    _add_entries(keys, "base_model", metadata.base_models)
    _add_entries(keys, "dataset", metadata.datasets)
    for field, values in (("tags", metadata.tags), ("languages", metadata.languages)):
        if values:
            keys.append((f"general.{field}", strings(str(value) for value in values)))
    return keys


def _add(keys: list[KeyValue], name: str, value: Any) -> None:
    if value is not None and str(value):
        keys.append((f"general.{name}", string(str(value))))


def _add_entries(keys: list[KeyValue], name: str, entries: list[Any] | None) -> None:
    if entries is None:
        return
    entries = [entry for entry in entries if isinstance(entry, Mapping)]
    keys.append((f"general.{name}.count", u32(len(entries))))
    for number, entry in enumerate(entries):
        for field in ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"):
            _add(keys, f"{name}.{number}.{field}", entry.get(field))


def _json_asset(subject: Subject, name: str, warnings: list[str]) -> Mapping[str, Any]:
    if name not in subject.assets:
        return {}
    try:
        content = strict_json.load(subject.assets[name], what=name, max_bytes=MAX_JSON_BYTES)
    except InputRefused as error:
        warnings.append(f"{error.message}: none of it is kept")
        return {}
    return content if isinstance(content, Mapping) else {}


def _model_card(subject: Subject, warnings: list[str]) -> dict[str, Any]:
    if "README.md" not in subject.assets:
        return {}
    try:
        return front_matter(subject.assets["README.md"])
    except InputRefused as error:
        warnings.append(f"{error.message}: none of it is kept")
        return {}
