"""A derived model through a format and back: every gate, and every warning that the tool gives on the way."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gemma2tool.errors import ToolError
from gemma2tool.formats import packings, registry
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.checks.run import CheckRequest, check
from gemma2tool.pipeline.conversion import convert
from gemma2tool.pipeline.requests import Checks, ConversionRequest, RunOptions
from gemma2tool.quantizers.mixtures import FILE_TYPES
from gemma2tool.verify.result import Verification
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.derived.case import Derived

FLOATS = tuple((name, "") for name in registry.NAMES)
QUANTIZED = (
    *(("gguf", name) for name in FILE_TYPES if not name.startswith(("iq1", "iq2", "iq3_x", "q2_k_s", "f", "bf"))),
    *(("hf", name) for name in packings.TYPES if not name.startswith("mlx")),
    *(("mlx", name) for name in packings.TYPES if name.startswith("mlx")),
    *(("gemma-cpp", name) for name in registry.by_name("gemma-cpp").types),
)
"""Format and quantization type of every target that needs neither calibration nor an importance matrix."""

ROUNDING = ("gguf", "maxtext")
"""Formats whose own convention changes low bits of some tensors."""

Target = tuple[str, str]
Item = TypeVar("Item")


@dataclass
class Outcome:
    """``alarms``: failed gates, named causes, refusals, in sentences. ``warnings``: of the log and of the gates.
    ``refused``: why the target has no place for the model. ``files``: how many were written and verified.
    """

    label: str
    alarms: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refused: str = ""
    files: int = 0


def in_turn(items: Sequence[Item], number: int, count: int) -> list[Item]:
    """``count`` of the items for case ``number``; over all cases, each of them about equally often."""
    return [items[(number * count + index) % len(items)] for index in range(min(count, len(items)))]


def there_and_back(case: Derived, source: Path, adapter: Path | None, target: Target, folder: Path) -> Outcome:
    """Convert ``source`` to ``target`` and that back to a Hugging Face folder; verify both, and the way as a whole."""
    format, type = target
    outcome = Outcome(f"{case.name} as {format} {type}".rstrip())
    suffix = next(iter(registry.FACTS[format].suffixes), "")
    out, back = folder / f"out{suffix}", folder / "back"
    adapters = () if adapter is None else (Adapter.of(adapter),)
    try:
        with _warnings(outcome):
            if not _converted(outcome, source, out, format, (type,) if type else (), WriteOptions(adapters=adapters)):
                return outcome
            if config_of(out, format, source) is None:
                outcome.warnings += [f"check: {line}" for line in checked(out)]
            if not type and _converted(outcome, out, back, "hf", (), WriteOptions(), config_of(out, format, source)):
                _judge(outcome, "there and back", _compared(source, back, adapters, format))
    except ToolError as error:
        outcome.refused = f"{error.id}: {error}"
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcome


def config_of(out: Path, format: str, source: Path) -> Path | None:
    """The source's config, for formats that have none."""
    return source / "config.json" if registry.by_name(format).lacks_config(out) else None


def checked(source: Path) -> list[str]:
    """What ``gemma2tool check`` has to say against a file, beyond notes."""
    result = check(CheckRequest(source=source, threads=1))
    return [f"{item.id}: {item.message}" for item in result.findings if item.severity != "note"]


def _converted(
    outcome: Outcome,
    source: Path,
    out: Path,
    to: str,
    types: tuple[str, ...],
    options: WriteOptions,
    config: Path | None = None,
) -> bool:
    request = ConversionRequest(
        source=source,
        destination=out,
        types=types,
        to=to,
        options=options,
        config=config,
        checks=Checks(),
        run=RunOptions(threads=1, receipt=False),
    )
    (result,) = convert(request)
    assert result.verification is not None
    _judge(outcome, out.name, result.verification)
    return result.written


def _compared(source: Path, back: Path, adapters: tuple[Adapter, ...], format: str) -> Verification:
    """What came back against what it came from, as far as ``format`` has a place for it."""
    whole, rounds = registry.FACTS[format].holds_tokenizer, format in ROUNDING
    from gemma2tool.formats.adapters.merging import merge

    levels = ["completeness", "config", *(["tokenizer"] if whole else []), *([] if rounds else ["tensors"])]
    with registry.open_checkpoint(source) as original, registry.open_checkpoint(back) as candidate:
        expected: Checkpoint = original
        for adapter in adapters:
            expected = merge(expected, adapter.path)
        return verify(expected, candidate, VerifySettings(levels=levels))


def _judge(outcome: Outcome, what: str, result: Verification) -> None:
    outcome.files += 1
    outcome.alarms += [f"{what}: {gate.name}: {gate.summary}" for gate in result.gates if gate.failed]
    outcome.alarms += [f"{what}: cause {cause.id}" for cause in result.causes]
    outcome.warnings += [
        finding.message for gate in result.gates for finding in gate.findings if finding.severity == "warning"
    ]


@contextmanager
def _warnings(outcome: Outcome) -> Iterator[None]:
    """The log's warnings, added to the outcome."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            outcome.warnings.append(record.getMessage())

    logger, handler = logging.getLogger("gemma2tool"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
