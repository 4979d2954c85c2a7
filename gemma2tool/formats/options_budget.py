"""What a user may ask of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma2tool.errors import UsageError
from gemma2tool.formats.option_info import normalize, option, parse_size
from gemma2tool.formats.options import WriteOptions

PLACEHOLDER = "q8_0"
"""The type of an output until its budget has chosen: any GGUF type that takes every option."""

TARGETS = ("--target-size", "--target-bpw", "--target-kl")


def parse_candidates(text: str) -> tuple[str, ...]:
    """The types that "a,b" names, each once, in lower case."""
    return tuple(dict.fromkeys(name.strip() for name in text.lower().split(",") if name.strip()))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A type for each matrix, chosen for a target: the best GGUF of a size, or the smallest of a KL divergence.

    ``target_size``: bytes of the whole file. ``target_bpw``: bits per weight as llama.cpp counts them, of all tensors.
    ``target_kl``: mean KL(source || file) in nats, as predicted. ``candidates``: types; empty: all of the sensitivity
    table. ``sensitivity``: a table; None: collected from the calibration text.
    """

    HEADING: ClassVar[str] = "Budget"

    target_size: int | None = option(
        None,
        "--target-size",
        "the best file of at most this size.",
        metavar="SIZE",
        formats=("gguf",),
        parse=parse_size,
    )
    target_bpw: float | None = option(
        None, "--target-bpw", "the best file of at most so many bits per weight.", formats=("gguf",), minimum=0.1
    )
    target_kl: float | None = option(
        None, "--target-kl", "the smallest file with this KL divergence.", formats=("gguf",), minimum=0.0
    )
    candidates: tuple[str, ...] | None = option(
        None,
        "--candidates",
        "types to choose from, with commas. Default: those of the sensitivity table.",
        metavar="TYPES",
        formats=("gguf",),
        parse=parse_candidates,
    )
    sensitivity: Path | None = option(
        None, "--sensitivity", "table that 'gemma2tool sensitivity' wrote.", metavar="FILE", formats=("gguf",)
    )

    def __post_init__(self) -> None:
        normalize(self)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that are given."""
        values = (self.target_size, self.target_bpw, self.target_kl)
        return tuple(name for name, value in zip(TARGETS, values, strict=True) if value is not None)

    @property
    def is_asked(self) -> bool:
        return bool(self.targets)

    def check(self, options: WriteOptions, format_name: str) -> None:
        """Raises ``UsageError`` for targets that contradict each other or the options of the output."""
        if not self.is_asked:
            for name, given in (("--candidates", self.candidates), ("--sensitivity", self.sensitivity)):
                if given is not None:
                    hint = f"give one of {', '.join(TARGETS)}"
                    raise UsageError("option.ignored", f"{name} has no effect without a target", hint=hint)
            return
        if len(self.targets) > 1:
            raise UsageError("budget.target", f"{' and '.join(self.targets)} are both targets")
        if format_name != "gguf":
            raise UsageError(
                "option.ignored", f"{self.targets[0]} has no effect for {format_name}", hint="it is for GGUF"
            )
        gguf, chosen = options.gguf, self.targets[0]
        taken = {
            "--pure": gguf.pure,
            "--tensor-type": gguf.tensor_types,
            "--token-embedding-type": gguf.token_embedding_type,
            "--output-tensor-type": gguf.output_tensor_type,
            "--split-max-size": options.split.split_max_size,
            "--split-max-tensors": options.split.split_max_tensors,
        }
        for name, value in taken.items():
            if value:
                raise UsageError("budget.options", f"{name} and {chosen} both decide", hint=f"leave out {name}")
        if self.sensitivity is None and not options.calibration.is_asked:
            raise UsageError("budget.no-table", f"{chosen} needs --sensitivity FILE or --calibration TEXT")
