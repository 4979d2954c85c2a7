"""What a user may ask of a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gemma2tool.errors import UsageError
from gemma2tool.formats.option_info import FOLDERS_QUANTIZED, normalize, option, parse_size
from gemma2tool.formats.options import WriteOptions

PLACEHOLDER = "q8_0"
"""The type of a GGUF until its budget has chosen: any that takes every option."""
_FOLDER_PLACEHOLDERS = {"mlx": "mlx-4", "hf": "nf4"}
_FORMATS = ("gguf", "hf", "mlx")

TARGETS = ("--target-size", "--target-bpw", "--target-kl")


def parse_candidates(text: str) -> tuple[str, ...]:
    """Return the types that "a,b" names, without duplicates, in lower case."""
    return tuple(dict.fromkeys(name.strip() for name in text.lower().split(",") if name.strip()))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A target by which the type of each matrix is chosen: the best output of a given size, or the smallest output with
    a given KL divergence.

    - ``target_size``: bytes of the whole file, or of all files of a folder.
    - ``target_bpw``: bits per weight over all tensors, counted as llama.cpp counts them.
    - ``target_kl``: predicted mean KL(source || file), in nats per token.
    - ``candidates``: the types to choose from; empty: every type of the sensitivity table that the format supports.
    - ``sensitivity``: a sensitivity table; None: collect one from the calibration text.
    """

    HEADING: ClassVar[str] = "Budget"

    target_size: int | None = option(
        None,
        "--target-size",
        "The best output of at most this size.",
        metavar="SIZE",
        parse=parse_size,
    )
    target_bpw: float | None = option(
        None, "--target-bpw", "The best output of at most so many bits per weight.", minimum=0.1
    )
    target_kl: float | None = option(None, "--target-kl", "The smallest output with this KL divergence.", minimum=0.0)
    candidates: tuple[str, ...] | None = option(
        None,
        "--candidates",
        "Types to choose from, with commas. Default: those of the sensitivity table.",
        metavar="TYPES",
        parse=parse_candidates,
    )
    sensitivity: Path | None = option(
        None, "--sensitivity", "Table that 'gemma2tool sensitivity' wrote.", metavar="FILE"
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

    def placeholder(self, to: str | None) -> str:
        """Return the type of an output until the budget has chosen; ``to``: the requested format."""
        of_folders = [name for name in self.candidates or () if name in FOLDERS_QUANTIZED]
        return of_folders[0] if of_folders else _FOLDER_PLACEHOLDERS.get(to or "", PLACEHOLDER)

    def check(self, options: WriteOptions, format_name: str) -> None:
        """Raise ``UsageError`` for targets that contradict each other or the options of the output."""
        if not self.is_asked:
            for name, given in (("--candidates", self.candidates), ("--sensitivity", self.sensitivity)):
                if given is not None:
                    hint = f"give one of {', '.join(TARGETS)}"
                    raise UsageError("option.ignored", f"{name} has no effect without a target", hint=hint)
            return
        if len(self.targets) > 1:
            raise UsageError("budget.target", f"{' and '.join(self.targets)} are both targets")
        if format_name not in _FORMATS:
            raise UsageError(
                "option.ignored",
                f"{self.targets[0]} has no effect for {format_name}",
                hint="it is for GGUF and for quantized folders",
            )
        gguf, packing, chosen = options.gguf, options.packing, self.targets[0]
        taken = {
            "--pure": gguf.pure,
            "--tensor-type": gguf.tensor_types,
            "--token-embedding-type": gguf.token_embedding_type,
            "--output-tensor-type": gguf.output_tensor_type,
            "--split-max-size": options.split.split_max_size,
            "--split-max-tensors": options.split.split_max_tensors,
            "--skip": packing.skip,
            "--only": packing.only,
            "--module-type": packing.module_types,
            "--group-size": packing.group_size,
            "--double-quant": packing.double_quant,
        }
        for name, value in taken.items():
            if value:
                raise UsageError("budget.options", f"{name} and {chosen} both decide", hint=f"leave out {name}")
        if self.sensitivity is None and options.calibration.text is None:
            raise UsageError("budget.no-table", f"{chosen} needs --sensitivity FILE or --calibration TEXT")
        if self.sensitivity is None and format_name == "hf" and not self.candidates:
            hint = "write --candidates nf4: matrices are quantized to it or left as they are"
            raise UsageError("budget.candidates", f"{chosen} needs the type of the folder", hint=hint)
