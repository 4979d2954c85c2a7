"""How a folder is quantized: the type, and what a user chose for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma2tool.errors import UsageError
from gemma2tool.formats.option_info import refuse_ignored, refuse_unknown
from gemma2tool.formats.options import GROUP_SIZES, WHOLE_ROW, PackingOptions


@dataclass(frozen=True)
class Settings:
    """What a user asked of a quantized folder: a type of ``packings.TYPES`` and its options.

    ``act_order``: of GPTQ, whether its groups follow the order in which calibration rounds columns.

    Raises ``UsageError`` for an option that the type does not take or a value that it does not offer.
    """

    type: str
    options: PackingOptions = field(default_factory=PackingOptions)
    act_order: bool = False

    def __post_init__(self) -> None:
        refuse_ignored(self.options, "hf", self.type)
        refuse_unknown(self.options)
        _check_group_size(self.type, self.options.group_size)
        for flag, patterns in (("--skip", self.options.skip), ("--only", self.options.only)):
            if "" in patterns:
                raise UsageError(
                    "quantize.pattern",
                    f"{flag} '' matches every tensor",
                    hint=f"check for an unset variable; leave {flag} out, or name tensors: mlp, layers.0",
                )

    @property
    def symmetric(self) -> bool:
        """Of GPTQ: whether the zero points are in the middle of the codes."""
        return self.options.symmetric is not False

    @property
    def gptq_format(self) -> str:
        """Of GPTQ: the convention in which zero points are stored."""
        return self.options.gptq_format or "gptq"

    def group_size_or(self, default: int) -> int:
        """How many columns share a scale: what the user chose, otherwise ``default``; -1 for a whole row."""
        return default if self.options.group_size is None else self.options.group_size


def _check_group_size(type_name: str, group_size: int | None) -> None:
    """Raises ``UsageError`` for a group size that the type's consumers have no kernels for."""
    allowed = GROUP_SIZES.get(type_name, ())
    if group_size is None or group_size in allowed:
        return
    sizes = ", ".join(map(str, allowed)) + (" (-1: a whole row)" if WHOLE_ROW in allowed else "")
    raise UsageError(
        "quantize.group-size",
        f"{type_name} has no groups of {group_size} columns",
        hint=f"choose one of {sizes}" if allowed else "leave out --group-size",
    )
