"""What a file format declares about itself, as plain data, for code that knows no format."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gemma2tool.model.config import Gemma2Config

Rounding = Literal["nearest", "imatrix", "calibration"]
"""How the codes of quantized tensors were chosen: by their own values, with an importance matrix, by a calibration."""

TypeFamily = Literal["folders", "gguf"]
"""The quantization types of folders of safetensors, or those of llama.cpp."""

CALIBRATION_KEYS = "gemma2tool.calibration."
"""What the keys begin with by which a file says that its codes were chosen by a calibration."""

NORMS_KEY = f"{CALIBRATION_KEYS}norms"
"""The key by which a file says that its norms were tuned; its value: ``model.norm_checksums``."""

Assumption = tuple[str, str]
"""A config field (or "quantization") and a sentence: what the consumer computes whatever the file says."""


def _no_assumptions(config: Gemma2Config) -> Iterable[Assumption]:
    return ()


@dataclass(frozen=True)
class FormatFacts:
    """Facts about a format and about the program that reads it, its *consumer*.

    For the list of formats: ``files`` is what a checkpoint looks like on disk; ``extra`` is the extra of gemma2tool
    that must be installed to ``extra_to`` ("read", "write") it.

    For reading: ``weight_names`` are patterns of the names that files with its weights have in a folder, where the name
    shows the format.

    For writing: a destination whose name ends in one of ``suffixes`` is written in this format, as a single file.
    ``float_dtypes`` are the types that unquantized values are written in; ``more_dtypes`` are other values of
    ``--dtype``.

    ``type_family`` says which quantization types are meant where one of them is named for this format.

    ``run_command`` is a command line that runs the consumer on a checkpoint called ``{path}``.

    For verification: ``holds_tokenizer`` says that the consumer takes the tokenizer and the chat template from the
    checkpoint's folder or file; ``weights_alone`` that weights (a single file of them, if ``weight_suffixes`` names
    such files) are a complete checkpoint, whose consumer takes the tokenizer from elsewhere. ``weight_suffixes`` are
    suffixes of single files that hold weights and no tokenizer; empty where a single file holds the tokenizer too
    (GGUF). ``ties_head`` says that the consumer uses the embedding as output matrix, whatever else is stored.
    ``cannot_represent`` maps a config field to why a file of this format may have another value than its source.
    ``metadata_formats`` are the values of ``format`` in a safetensors file's metadata that its consumer accepts; empty
    where it does not look. ``assumptions`` gives, for a config, the fields that the file states and its consumer
    computes otherwise, each with a sentence.
    """

    name: str
    files: str = ""
    remarks: str = ""
    extra: str | None = None
    extra_to: str | None = None
    weight_names: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    float_dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
    more_dtypes: tuple[str, ...] = ()
    type_family: TypeFamily = "folders"
    run_command: str = ""
    holds_tokenizer: bool = False
    weights_alone: bool = False
    ties_head: bool = False
    weight_suffixes: tuple[str, ...] = ()
    metadata_formats: tuple[str, ...] = ()
    cannot_represent: Mapping[str, str] = field(default_factory=dict)
    assumptions: Callable[[Gemma2Config], Iterable[Assumption]] = _no_assumptions

    def command_for(self, path: Path) -> str:
        """``run_command`` for a checkpoint, quoted for a shell; empty if there is none."""
        return self.run_command.replace("{path}", shlex.quote(str(path)))
