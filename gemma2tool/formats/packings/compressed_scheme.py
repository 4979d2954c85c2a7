"""The weight scheme in the config of a compressed-tensors checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemma2tool.errors import InputRefused
from gemma2tool.formats.packings.parts import HINT
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.compressed import Scheme
from gemma2tool.storage.quoting import quoted


@dataclass(frozen=True)
class WeightScheme:
    """What the config says about all weights. ``bits`` and ``kind`` are checked; the rest is checked for each
    weight.
    """

    bits: int
    kind: str
    strategy: object
    group_size: object
    block_structure: object
    symmetric: bool

    def for_weight(self, scales: LazyTensor, shape: tuple[int, ...], packed: bool) -> Scheme:
        """The scheme of a weight of this shape. Raises ``InputRefused`` if the shape of its scales contradicts the
        config.
        """
        group: object = None
        block_rows: object = 1
        if self.strategy == "group":
            group = self.group_size
        elif self.strategy == "block":
            block = self.block_structure
            block_rows, group = block if isinstance(block, list) and len(block) == 2 else (0, 0)
        if (
            len(shape) != 2
            or type(block_rows) is not int
            or block_rows <= 0
            or not (group is None or (type(group) is int and group > 0))
            or (block_rows == 1 and group and shape[1] % group)
        ):
            raise InputRefused(
                "compressed.config",
                f"{scales.origin}: config.json has the strategy {quoted(self.strategy)}, which does not fit a weight of"
                f" shape {shape}",
                hint=HINT,
            )
        scheme = Scheme(self.bits, self.kind, group, block_rows, self.symmetric, packed)
        expected: set[tuple[int, ...]] = {(-(-shape[0] // block_rows), scheme.group_count(shape[1]))}
        if group is None:
            expected |= {(shape[0],), (1,), (), (1, 1)}  # one for each row, or one for the tensor
        if scales.shape not in expected:
            raise InputRefused(
                "packing.part-shape",
                f"{scales.origin}: scales of shape {scales.shape} do not fit a weight of shape {shape}",
                hint=HINT,
            )
        return scheme


def read_weight_scheme(weights: Mapping[str, object]) -> WeightScheme:
    """The scheme of a group's ``weights`` entry: integers, or float8 with scales in the model's dtype. Raises
    ``InputRefused`` for unsupported types.
    """
    bits, kind = weights.get("num_bits"), weights.get("type")
    if type(bits) is not int or bits not in (4, 8) or not isinstance(kind, str) or kind not in ("int", "float"):
        raise InputRefused(
            "compressed.config",
            f"config.json: weights of {quoted(bits)} bits of type {quoted(kind)}",
            hint="4-bit and 8-bit integers, 8-bit floats, nvfp4, mxfp4 and mxfp8 are supported",
        )
    return WeightScheme(
        bits,
        kind,
        weights.get("strategy"),
        weights.get("group_size"),
        weights.get("block_structure"),
        weights.get("symmetric") is not False,
    )
