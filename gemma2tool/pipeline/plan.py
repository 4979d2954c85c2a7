"""Everything that will happen, computed from headers before anything is written.

The plan is what ``--dry-run`` prints and what a run carries out: the source's tensors, how each is encoded, the exact size of every
file, what the target cannot hold, and what will be checked.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.base import Output, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import SharedRows
from gemma2tool.pipeline.calibration.output import calibrated, calibration_of
from gemma2tool.storage.paths import refuse_same

if TYPE_CHECKING:
    from gemma2tool.pipeline.calibration.cost import Cost


@dataclass(frozen=True)
class Plan:
    """A checked request: ``source`` is open, ``output`` is laid out, the destination is not one of the source's files.

    ``cost``: of the calibration that will happen while it is written, if any will.
    """

    source: Checkpoint
    destination: Path
    output: Output
    options: WriteOptions
    cost: Cost | None = None

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read, each source row once."""
        return sum(item.source.nbytes for item in self.output.tensors)

    def types(self) -> list[tuple[str, int, int]]:
        """(stored type, tensors, bytes) of the output, largest first."""
        count: dict[str, int] = defaultdict(int)
        size: dict[str, int] = defaultdict(int)
        for item in self.output.tensors:
            count[item.encoder.name] += 1
            size[item.encoder.name] += sum(place.nbytes for place in item.parts.values())
        return sorted(((name, count[name], size[name]) for name in count), key=lambda row: (-row[2], row[0]))

    def to_json(self) -> dict[str, object]:
        """The plan as ``--dry-run --json`` prints it."""
        return {
            "source": {"path": str(self.source.path), "format": self.source.format},
            "destination": {"path": str(self.destination), "format": self.output.format},
            "bytes": self.output.nbytes,
            "files": [{"name": file.name, "bytes": file.size} for file in self.output.files],
            "assets": {name: len(data) for name, data in sorted(self.output.assets.items())},
            "tensors": [
                {
                    "name": item.name,
                    "shape": list(item.source.shape),
                    "from": item.source.stored,
                    "type": item.encoder.name,
                    "bytes": sum(place.nbytes for place in item.parts.values()),
                }
                for item in self.output.tensors
            ],
            "losses": [{"tensor": name, "max_abs": loss} for name, loss in self.output.losses],
            "warnings": [*self.source.warnings, *self.source.config.warnings, *self.output.warnings],
            **({} if self.cost is None else {"calibration": self.cost.to_json()}),
        }


def shared(source: Checkpoint) -> Checkpoint:
    """``source`` with tensors that several outputs can go through in one pass."""
    return replace(source, tensors={name: SharedRows(tensor) for name, tensor in source.tensors.items()}, closers=[])


def make_plan(
    source: Checkpoint, destination: Path, *, to: str | None, options: WriteOptions, threads: int = 1
) -> Plan:
    """Lay out ``source`` for ``destination``; refuses a destination that is, under any name, one of the source's own files.

    ``threads``: what a calibration may use.
    """
    name = registry.for_destination(destination, to, options.type)
    refuse_same((source.path, *source.files), destination)
    if options.type not in (None, "copy") and source.is_quantized and not options.extra.get("allow_requantize"):
        stored = sorted({tensor.stored for tensor in source.tensors.values()} - {"f32", "f16", "bf16", "f64"})
        raise UsageError(
            "quantize.requantize",
            f"{source.path}: is quantized already ({', '.join(stored)})",
            hint="quantize the original, or lose more with --allow-requantize",
        )
    output, cost = registry.by_name(name).layout(source, options), None
    if (calibration := calibration_of(options.extra, source)) is not None:
        output, cost = calibrated(output, source, calibration, threads=threads)
    return Plan(source, destination, output, options, cost)
