"""The sensitivity table: sums of KL divergence over the tokens of a text, for each matrix and type.

One JSON file serves every size. Sums over different texts of the same model add up, so tables can be merged. KL is
KL(source || candidate) in nats.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.format_facts import Rounding
from gemma2tool.pipeline.sensitivity.candidates import CANDIDATES
from gemma2tool.storage.staging.staged_output import Staging

SCHEMA = "gemma2tool.sensitivity/1"
MAX_BYTES = 256 << 20
MAX_KL, MAX_TOKENS = 1e30, 1 << 50
"""Sums beyond these are no measurements, and would overflow further sums."""


@dataclass(frozen=True)
class Sum:
    """``kl``: summed over ``tokens`` positions."""

    kl: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.kl / self.tokens

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.kl + other.kl, self.tokens + other.tokens)


@dataclass(frozen=True)
class Entry:
    """A matrix in a type: by the ``second_order`` from gradients, and ``measured`` with only this matrix changed."""

    second_order: Sum = Sum()
    measured: Sum = Sum()

    def __add__(self, other: Entry) -> Entry:
        return Entry(self.second_order + other.second_order, self.measured + other.measured)


@dataclass(frozen=True)
class Text:
    """A text that was run: its file's ``name``, the SHA-256 of the token ids, and their shape."""

    name: str
    sha256: str
    windows: int
    length: int


@dataclass(frozen=True)
class SensitivityTable:
    """What storing each matrix in each type costs, collected from one or more texts.

    - ``model``: the model's digest (``gemma2tool hash``).
    - ``rounding``: how the codes were chosen.
    - ``texts``: the texts over which KL was summed. ``calibration``: the texts whose activations chose the codes.
    - ``windows``: the token ids of each text, (N, T), on which a finished file is compared with its prediction.
    - ``entries``: the costs by canonical name and type.
    - ``whole``: by type, the measured cost with all matrices of the layers in that type.
    - ``complete``: False while the collection is under way.
    """

    model: str
    rounding: Rounding
    texts: tuple[Text, ...] = ()
    calibration: tuple[Text, ...] = ()
    windows: tuple[tuple[tuple[int, ...], ...], ...] = ()
    entries: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    whole: Mapping[str, Sum] = field(default_factory=dict)
    complete: bool = True

    @property
    def types(self) -> tuple[str, ...]:
        """The types of the table, in the order of its first matrix."""
        return tuple(dict.fromkeys(type for entries in self.entries.values() for type in entries))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document described in docs/quality.md."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "rounding": self.rounding,
            "complete": self.complete,
            "texts": [dataclasses.asdict(text) for text in self.texts],
            "calibration": [dataclasses.asdict(text) for text in self.calibration],
            "windows": self.windows,
            "tensors": {
                name: {type: _entry_json(entry) for type, entry in entries.items()}
                for name, entries in self.entries.items()
            },
            "whole": {type: [total.kl, total.tokens] for type, total in self.whole.items()},
        }


def _entry_json(entry: Entry) -> dict[str, list[float]]:
    parts = {"second_order": entry.second_order, "measured": entry.measured}
    return {name: [part.kl, part.tokens] for name, part in parts.items() if part.tokens}


def write_table(table: SensitivityTable, path: Path, *, force: bool) -> None:
    """Write the table; the file is complete or not there."""
    data = (json.dumps(table.to_json(), separators=(",", ":")) + "\n").encode()
    with Staging(path, force=force, expected_bytes=len(data)) as staging:
        staging.write_bytes(path.name, data)
        staging.commit()


def read_table(path: Path) -> SensitivityTable:
    """Raises ``InputRefused`` (``sensitivity.schema``) for anything but a whole table."""
    try:
        document = strict_json.load(path, what="sensitivity table", max_bytes=MAX_BYTES)
    except InputRefused as error:
        if not error.id.startswith("json."):
            raise
        raise InputRefused("sensitivity.schema", f"{error.message}, and a sensitivity table is JSON") from None
    return parse_table(document, path)


def parse_table(document: Any, path: Path) -> SensitivityTable:
    """The table of a document in the file ``path``. Raises ``InputRefused`` (``sensitivity.schema``) for any other
    document.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        stated = document.get("schema") if isinstance(document, dict) else None
        raise InputRefused("sensitivity.schema", f"{path}: schema {stated!r} is not {SCHEMA!r}")
    try:
        table = SensitivityTable(
            model=_typed(document["model"], str),
            rounding=_rounding(document["rounding"]),
            texts=_texts(document["texts"]),
            calibration=_texts(document["calibration"]),
            windows=_windows(document["windows"]),
            entries={name: _entries(value) for name, value in _typed(document["tensors"], dict).items()},
            whole={_type(type): _sum(value) for type, value in _typed(document["whole"], dict).items()},
            complete=_typed(document["complete"], bool),
        )
        _check_windows(table)
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused("sensitivity.schema", f"{path}: does not follow {SCHEMA}: {error}") from None
    return table


def _check_windows(table: SensitivityTable) -> None:
    """Raises ``ValueError`` if the token ids are not those of the texts."""
    if len(table.windows) != len(table.texts) or not table.texts:
        raise ValueError(f"windows of {len(table.windows)} texts, and {len(table.texts)} texts")
    for text, rows in zip(table.texts, table.windows, strict=True):
        if len(rows) != text.windows or {len(row) for row in rows} != {text.length}:
            raise ValueError(f"{text.name}: other windows than {text.windows} of {text.length} tokens")


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is not a {kind.__name__}")
    return value


def _rounding(value: Any) -> Rounding:
    if value not in ("nearest", "imatrix", "calibration"):
        raise ValueError(f"rounding {str(value)[:40]!r}")
    rounding: Rounding = value
    return rounding


def _texts(value: Any) -> tuple[Text, ...]:
    kinds = {"name": str, "sha256": str, "windows": int, "length": int}
    return tuple(Text(**{key: _typed(row[key], kind) for key, kind in kinds.items()}) for row in _typed(value, list))


def _windows(value: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(
        tuple(tuple(_typed(token, int) for token in _typed(row, list)) for row in _typed(text, list))
        for text in _typed(value, list)
    )


def _entries(value: Any) -> dict[str, Entry]:
    entries = {_type(type): _entry(part) for type, part in _typed(value, dict).items()}
    if not entries:
        raise ValueError("a tensor without entries")
    return entries


def _type(name: str) -> str:
    if name not in CANDIDATES:
        raise ValueError(f"{name[:40]!r} is not a quantized tensor type")
    return name


def _entry(value: Any) -> Entry:
    sums = {name: _sum(part) for name, part in _typed(value, dict).items()}
    if not sums:
        raise ValueError("an entry without a sum")
    return Entry(**sums)


def _sum(value: Any) -> Sum:
    kl, tokens = _typed(value, list)
    if not (type(kl) in (int, float) and 0 <= kl <= MAX_KL and 0 < _typed(tokens, int) <= MAX_TOKENS):
        raise ValueError(f"{str(value)[:80]} is not a sum of KL and its tokens")
    return Sum(float(kl), tokens)


def merge_tables(tables: Sequence[tuple[Path, SensitivityTable]]) -> SensitivityTable:
    """The sum of finished tables of one model, one or more. Raises ``UsageError`` (``sensitivity.merge``) for different
    roundings, and for a text that is in two of them.
    """
    first_path, merged = tables[0]
    for path, table in tables[1:]:
        if table.rounding != merged.rounding:
            message = f"{path}: rounding {table.rounding} is not {merged.rounding} of {first_path}"
            raise UsageError("sensitivity.merge", message)
        known = {text.sha256 for text in merged.texts}
        twice = [text.name for text in table.texts if text.sha256 in known]
        if twice:
            raise UsageError("sensitivity.merge", f"{path}: {twice[0]} is already counted")
        merged = dataclasses.replace(
            merged,
            texts=merged.texts + table.texts,
            calibration=merged.calibration + tuple(t for t in table.calibration if t not in merged.calibration),
            windows=merged.windows + table.windows,
            entries={
                name: _added(merged.entries.get(name, {}), table.entries.get(name, {}), Entry())
                for name in {**merged.entries, **table.entries}
            },
            whole=_added(merged.whole, table.whole, Sum()),
        )
    return merged


def _added(a: Mapping[str, Any], b: Mapping[str, Any], zero: Any) -> dict[str, Any]:
    return {key: a.get(key, zero) + b.get(key, zero) for key in {**a, **b}}
