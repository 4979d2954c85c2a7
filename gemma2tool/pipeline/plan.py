"""Everything that will happen, computed from headers before anything is written.

The plan is what ``--dry-run`` prints and what a run carries out: the source's tensors, how each is encoded, the exact
size of every file, what the target cannot hold, and what a calibration will cost.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.base import Output
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.formats.sentence_transformers import left_behind
from gemma2tool.formats.text_settings import settings_remarks, text_settings
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import HEAD
from gemma2tool.model.norm_checksums import unknown_checksums
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.calibration.output import calibrated, settings_of
from gemma2tool.pipeline.calibration.session import Session
from gemma2tool.storage.paths import existing_folder, refuse_overwriting_input
from gemma2tool.storage.syscalls import free_bytes

if TYPE_CHECKING:
    from gemma2tool.pipeline.budget.choice import BudgetChoice
    from gemma2tool.pipeline.calibration.cost import Cost
    from gemma2tool.pipeline.needs.needs import Needs

_PLAIN_TYPES = frozenset({"f32", "f16", "bf16", "f64"})


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of an output: its name, type and size in the output, and its shape and stored type in the source."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A checked request: ``source`` is open, ``output`` is laid out, the destination is not one of the source's files.

    ``source``: as it was opened, but with a tied head where the target has one and the values are equal. ``session``:
    the calibration that happens while it is written, if any. ``budget``: what a budget chose, if there is one.
    ``recipe``: what a recipe says of the output, if it is in one.
    """

    source: Checkpoint
    destination: Path
    output: Output
    options: WriteOptions
    session: Session | None = None
    budget: BudgetChoice | None = None
    recipe: Mapping[str, Any] | None = None

    @functools.cached_property
    def cost(self) -> Cost | None:
        """Of the calibration."""
        return None if self.session is None else self.session.cost()

    @property
    def tensors(self) -> list[TensorSummary]:
        """The tensors of the output, in its order."""
        return [
            TensorSummary(
                item.name,
                tuple(item.source.shape),
                item.source.stored,
                item.encoder.name,
                sum(place.nbytes for place in item.parts.values()),
            )
            for item in self.output.tensors
        ]

    def types(self) -> list[tuple[str, int, int]]:
        """(stored type, tensors, bytes) of the output, largest first."""
        count: dict[str, int] = defaultdict(int)
        size: dict[str, int] = defaultdict(int)
        for tensor in self.tensors:
            count[tensor.type] += 1
            size[tensor.type] += tensor.nbytes
        return sorted(((name, count[name], size[name]) for name in count), key=lambda row: (-row[2], row[0]))

    def summary(self) -> PlanSummary:
        """The plan without anything that is open."""
        return PlanSummary(
            source=self.source.known_as,
            source_format=self.source.format,
            destination=self.destination,
            format=self.output.format,
            nbytes=self.output.nbytes,
            source_bytes=sum(item.source.nbytes for item in self.output.tensors),
            free_bytes=free_bytes(existing_folder(self.destination)),
            files=tuple((file.name, file.size) for file in self.output.files),
            assets=tuple((name, len(data)) for name, data in sorted(self.output.assets.items())),
            tensors=tuple(self.tensors),
            types=tuple(self.types()),
            losses=tuple(self.output.losses),
            warnings=(*self.source.all_warnings, *self.output.warnings),
            cost=self.cost,
            budget=self.budget,
        )


@dataclass(frozen=True)
class PlanSummary:
    """What would be written, for people and for scripts.

    - ``nbytes``: the exact size of all files.
    - ``source_bytes``: the size of the tensors that are read.
    - ``free_bytes``: free bytes on the destination's disk; None if this is unknown.
    - ``files``, ``assets``: (name, bytes).
    - ``types``: (stored type, tensors, bytes), largest first.
    - ``losses``: (canonical name, largest absolute loss) of the tensors that the target's convention rounds.
    - ``cost``: the cost of the calibration, if there is one. ``budget``: what the budget chose, if there is one.
    - ``needs``: what the run needs that writes this output and the others of the same request.
    """

    source: Path | str
    source_format: str
    destination: Path
    format: str
    nbytes: int
    source_bytes: int
    free_bytes: int | None
    files: tuple[tuple[str, int], ...]
    assets: tuple[tuple[str, int], ...]
    tensors: tuple[TensorSummary, ...]
    types: tuple[tuple[str, int, int], ...]
    losses: tuple[tuple[str, float], ...]
    warnings: tuple[str, ...]
    cost: Cost | None
    budget: BudgetChoice | None = None
    needs: Needs | None = None

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``--dry-run --json`` prints it."""
        return {
            "source": {"path": str(self.source), "format": self.source_format, "bytes": self.source_bytes},
            "destination": {"path": str(self.destination), "format": self.format},
            "bytes": self.nbytes,
            "free_bytes": self.free_bytes,
            **({} if self.needs is None else {"needs": self.needs.to_json()}),
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "assets": dict(self.assets),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "from": tensor.source_type,
                    "type": tensor.type,
                    "bytes": tensor.nbytes,
                }
                for tensor in self.tensors
            ],
            "losses": [{"tensor": name, "max_abs": loss} for name, loss in self.losses],
            "warnings": list(self.warnings),
            **({} if self.cost is None else {"calibration": self.cost.to_json()}),
            **({} if self.budget is None else {"budget": self.budget.to_json()}),
        }


def make_plan(
    source: Checkpoint, destination: Path, *, to: str | None, options: WriteOptions, threads: int = 1
) -> Plan:
    """Lay out ``source`` for ``destination``. ``threads``: what a calibration may use.

    Raises ``UsageError`` for a destination that is, under any name, one of the source's own files, for options that the
    target would ignore, and for a quantized source that may not be quantized again.
    """
    format_name = registry.for_destination(destination, to, options.type)
    source = _with_one_matrix(source, format_name)
    options.check_target(format_name)
    options = replace(options, calibration=_prepared(options.calibration.for_type(options.type), source))
    refuse_overwriting_input((source.path, *source.files), destination)
    if options.type not in (None, "copy") and source.is_quantized and not options.allow_requantize:
        stored = sorted({tensor.stored for tensor in source.tensors.values()} - _PLAIN_TYPES)
        raise UsageError(
            "quantize.requantize",
            f"{source.known_as}: is already quantized ({', '.join(stored)})",
            hint="quantize the original, or compound the loss with --allow-requantize",
        )
    output, session = registry.by_name(format_name).layout(source, options), None
    lost = left_behind(source.assets, output.assets)
    remarks = [*([lost] if lost else []), *settings_remarks(text_settings(source), output)]
    if remarks:
        output = replace(output, warnings=[*output.warnings, *remarks])
    if options.calibration.is_asked:
        settings = settings_of(options.calibration, source, threads=threads)
        output, session = calibrated(output, source, settings, threads=threads)
    return Plan(source, destination, output, options, session)


def _prepared(calibration: Calibration, source: Checkpoint) -> Calibration:
    """With room for the checksums of norms that will be tuned."""
    if not calibration.tune_norms:
        return calibration
    return replace(calibration, norm_checksums=unknown_checksums(source.config))


def _with_one_matrix(source: Checkpoint, format_name: str) -> Checkpoint:
    """The source with a tied head, if the format has no other and its own is a copy of the embedding."""
    if not registry.FACTS[format_name].ties_head:
        return source
    tied = with_tied_head(source)
    if tied is source:
        return source
    remark = f"{HEAD} equals the embedding: stored once, as {format_name} uses the embedding for both"
    return replace(tied, warnings=[*source.warnings, remark])
