"""How a folder is quantized: the type, what a type lets a user choose, and which weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma2tool.errors import UsageError
from gemma2tool.formats.options import GROUP_SIZES, WHOLE_ROW, PackingOptions, refuse_ignored
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.gptq import CHECKPOINT_FORMATS
from gemma2tool.quantizers.mixtures import REGEX_HINT
from gemma2tool.storage.quoting import quoted

TIED_HEAD = "lm_head.weight"
# Serving engines run these as one matrix, which is quantized whole or not at all.
_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


@dataclass(frozen=True)
class Settings:
    """What a user asked of a quantized folder.

    ``type``: one of ``packings.TYPES``. ``group_size``: columns that share a scale, -1 for a whole row, None for the type's own.
    ``symmetric`` and ``checkpoint_format`` ("gptq" or "gptq_v2"): of GPTQ, None for symmetric and "gptq"; ``act_order``: its groups
    follow the order in which calibration rounds columns. ``skip``, ``only``: regular
    expressions searched in tensor names: what matches is left as it is; what does not match is.

    Raises UsageError for a choice that the type does not offer.
    """

    type: str
    double_quant: bool = False
    group_size: int | None = None
    symmetric: bool | None = None
    checkpoint_format: str | None = None
    act_order: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        options = PackingOptions(
            double_quant=self.double_quant,
            group_size=self.group_size,
            symmetric=self.symmetric,
            gptq_format=self.checkpoint_format,
        )
        refuse_ignored(options, "hf", self.type)
        allowed = GROUP_SIZES.get(self.type, ())
        if self.group_size is not None and self.group_size not in allowed:
            listed = ", ".join(map(str, allowed)) + (" (-1: a whole row)" if WHOLE_ROW in allowed else "")
            raise UsageError(
                "quantize.group-size",
                f"{self.type} has no groups of {self.group_size} columns",
                hint=f"choose one of {listed}" if allowed else "leave out --group-size",
            )
        if self.checkpoint_format not in (None, *CHECKPOINT_FORMATS):
            raise UsageError(
                "quantize.gptq-format",
                f"GPTQ has no checkpoint format {quoted(self.checkpoint_format)}",
                hint=f"choose one of {', '.join(CHECKPOINT_FORMATS)}",
            )
        for option, patterns in (("--skip", self.skip), ("--only", self.only)):
            if "" in patterns:
                raise UsageError(
                    "quantize.pattern",
                    f"{option} '' matches every tensor",
                    hint=f"was a variable meant that is not set? leave {option} out, or name tensors: mlp, layers.0",
                )

    @classmethod
    def of(cls, type_name: str, options: PackingOptions, *, act_order: bool = False) -> Settings:
        """From the options that a user gave; ``act_order``: of the calibration."""
        return cls(
            type_name,
            double_quant=options.double_quant,
            group_size=options.group_size,
            symmetric=options.symmetric,
            checkpoint_format=options.gptq_format,
            act_order=act_order,
            skip=options.skip,
            only=options.only,
        )

    def groups(self, default: int) -> int:
        """The group size, ``default`` where the user chose none; -1 for a whole row."""
        return default if self.group_size is None else self.group_size


def kept_by_choice(specs: Mapping[str, TensorSpec], settings: Settings) -> set[str]:
    """Names of the tensors that ``skip`` and ``only`` leave as they are.

    Raises UsageError for an expression that is none, or that matches no tensor of the model (a tied head counts as one).
    """
    skip, only = _compiled(settings.skip), _compiled(settings.only)
    names = [*specs, *([] if TIED_HEAD in specs else [TIED_HEAD])]
    for pattern in (*skip, *only):
        if not any(_matches([pattern], name) for name in names):
            raise UsageError(
                "quantize.pattern",
                f"the pattern {pattern.pattern!r} matches no tensor",
                hint="patterns are searched in names such as model.layers.0.mlp.down_proj.weight",
            )
    return {name for name in specs if _matches(skip, name) or (only and not _matches(only, name))}


def asked_for(name: str, settings: Settings) -> bool:
    """Whether the user named this tensor as one to quantize."""
    return _matches(_compiled(settings.only), name)


def split_fusions(quantized: Iterable[str], kept: Iterable[str]) -> list[str]:
    """The modules left as they are whose partners in a serving engine's fused matrices are quantized."""
    quantized, found = set(quantized), []
    for name in kept:
        for partners in _FUSED:
            own = next((each for each in partners if name.endswith("." + each)), None)
            if own is not None and any(name.removesuffix(own) + each in quantized for each in partners):
                found.append(name)
    return found


def consumer_remarks(settings: Settings) -> list[str]:
    """What a consumer of the type cannot load of it, as far as it is known."""
    found = []
    if settings.type == "w4a16-asym":
        found.append(
            "w4a16-asym: vLLM loads it; transformers (5.23) expects other zero points, and loads it only with"
            " CompressedTensorsConfig(dequantize=True)"
        )
    if settings.type in ("gptq-4", "awq-4") and settings.group_size == WHOLE_ROW:
        found.append(
            f"{settings.type} with a scale for a whole row: GPTQModel's kernel for CPUs (7.6) does not run it, those for GPUs do"
        )
    return found


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    found = []
    for text in patterns:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise UsageError(
                "quantize.pattern", f"{text!r} is not a regular expression: {error}", hint=REGEX_HINT
            ) from None
    return found


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    """Patterns may end at the module's name or at the tensor's."""
    return any(pattern.search(name) or pattern.search(name.removesuffix(".weight")) for pattern in patterns)
