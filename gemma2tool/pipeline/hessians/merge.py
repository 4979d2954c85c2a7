"""Adds up the parts of a file of Hessians."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma2tool.pipeline.calibration.collected import About
from gemma2tool.pipeline.hessians.collect import slice_counts
from gemma2tool.pipeline.hessians.file import HessiansFile, kind_of
from gemma2tool.pipeline.sharding.pairwise import PairwiseSum, levels
from gemma2tool.pipeline.sharding.part import Part
from gemma2tool.storage.staging.staged_output import Staging


def write_merged(out: Path, parts: Sequence[Part], *, force: bool) -> None:
    """Write the sums of all parts, in the order of their shards, one Hessian at a time.

    Raises ``KeyError``, ``ValueError`` or ``TypeError`` for parts that do not follow from one another.
    """
    about = About.of(parts[0].content["about"])
    counts = slice_counts((about.sequences, about.length))
    sizes = {str(name): int(size) for name, size in parts[0].content["sizes"].items()}
    file = HessiansFile(sizes, about)
    with file.writing(Staging(out, force=force, expected_bytes=file.nbytes)) as writer:
        for name in sizes:
            total, kind = PairwiseSum(), kind_of(name)
            for part in parts:
                first, last = part.content["spans"][kind]
                for values, level in zip(part.arrays[name], levels(first, last), strict=True):
                    if values.shape != (sizes[name],):
                        raise ValueError(f"{name[:80]} has another size")
                    total.add(values, level)
            if total.next != counts[kind]:
                raise ValueError("the slices of the parts are not those of the text")
            writer.write(name, total)
