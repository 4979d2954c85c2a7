"""The layout that GPTQ and AWQ share: P.qweight, P.qzeros and P.scales, transposed against the weight P.weight.

For a weight (O, I) in G groups of columns, the scales are (G, O) and the zero points, packed into words along the
output, are (G, O * bits / 32). The codes are packed along the input by GPTQ and along the output by AWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemma2tool.formats.packings.parts import FLOATS, INT32, groups_per_row, required_matrix, required_part
from gemma2tool.model.lazy import FLOAT32, LazyTensor
from gemma2tool.quantizers.bitpack import WORD_BITS

CODES = ".qweight"
GROUP_SIZE = 128
"""Columns that share a scale, unless a user chooses otherwise."""


@dataclass(frozen=True)
class TransposedParts:
    """The stored tensors of one weight: ``words`` of packed codes, ``zeros``, ``scales``; ``shape``: of the weight, (O,
    I).
    """

    module: str
    words: LazyTensor
    zeros: LazyTensor
    scales: LazyTensor
    shape: tuple[int, int]

    @property
    def names(self) -> set[str]:
        return {f"{self.module}.{part}" for part in ("qweight", "qzeros", "scales")}


def transposed_parts(
    raw: Mapping[str, LazyTensor], quantization_config: Mapping[str, object], bits: int, *, along_input: bool
) -> Iterator[TransposedParts]:
    """The parts of every weight in this layout, checked; ``along_input``: codes are packed into words along the input.

    Raises ``InputRefused`` if parts are missing or their shapes contradict one another.
    """
    per_word = WORD_BITS // bits
    for name in raw:
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        words = required_matrix(raw, name, (INT32,))
        columns, rows = words.shape
        columns, rows = (columns * per_word, rows) if along_input else (columns, rows * per_word)
        groups = groups_per_row(quantization_config, columns)
        scales = required_part(raw, f"{module}.scales", FLOATS, (groups, rows))
        zeros = required_part(raw, f"{module}.qzeros", (INT32,), (groups, rows // per_word))
        yield TransposedParts(module, words, zeros, scales, (rows, columns))


class TransposedTensor(LazyTensor):
    """A weight (O, I), float32. Its rows are columns of the stored arrays, so the codes are read whole and kept for a
    while.
    """

    def __init__(self, parts: TransposedParts, stored: str) -> None:
        self.words, self.zeros, self.scales = parts.words, parts.zeros, parts.scales
        self.shape, self.dtype, self.stored, self.origin = parts.shape, FLOAT32, stored, parts.words.origin
