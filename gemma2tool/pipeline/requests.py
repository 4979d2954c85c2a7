"""What is asked of the pipeline: frozen requests, with paths and sizes already parsed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.report_files import ReportFiles

DEFAULT_MEMORY = 256 << 20
"""Bytes of data in flight."""


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How a candidate is verified.

    - ``tokens``: token ids (.npy) for the forward passes. ``text``: a file of UTF-8 text, instead. If neither is given,
      the built-in sample text is used.
    - ``gates``: limits that replace the defaults, by name ("kl").
    - ``sample``: how many tokens the source and the candidate each add to the prompt, for people to compare; each token
      takes a pass over both models.
    """

    tokens: Path | None = None
    text: Path | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    sample: int = 0

    @classmethod
    def of(
        cls, tokens: Path | str | None, text: Path | str | None, gates: Mapping[str, float] | None, sample: int = 0
    ) -> Checks:
        """From paths as strings or ``Path``."""
        return cls(
            tokens=None if tokens is None else Path(tokens),
            text=None if text is None else Path(text),
            gates=dict(gates or {}),
            sample=sample,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.tokens, self.text) if path is not None)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a plan is carried out.

    - ``force``: replace an existing destination once its replacement is complete and verified.
    - ``restart``: discard what an interrupted run left.
    - ``allow_nonfinite``: accept NaN and infinities in the source.
    - ``clip_f16``: clip values beyond the largest float16 to it instead of refusing them.
    - ``allow_unsafe_template``: keep a chat template that ``scan`` calls dangerous.
    - ``receipt``: write a receipt beside each verified output.
    - ``readers``: also read the output with the libraries that define its format.
    - ``modelfile``: write a Modelfile for Ollama beside each GGUF.
    - ``memory``: the bytes of data that may be in flight.
    - ``keep_download``: first download a source that is not local to this folder, and read it there.
    - ``device``: where forward passes and calibration compute, "cpu" or "cuda".
    - ``together``: calibrate together with the other processes that torchrun started, each of which makes this request;
      rank 0 writes the output, and the others get no results.
    """

    force: bool = False
    restart: bool = False
    allow_nonfinite: bool = False
    clip_f16: bool = False
    allow_unsafe_template: bool = False
    receipt: bool = True
    readers: bool = True
    modelfile: bool = False
    threads: int = field(default_factory=default_threads)
    memory: int = DEFAULT_MEMORY
    device: str = "cpu"
    keep_download: Path | None = None
    together: bool = False

    def with_force(self, force: bool) -> RunOptions:
        """Return these options with ``force`` set if it already is, or if the argument is true."""
        return replace(self, force=self.force or force)


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """One output, or one for each of several ``types`` in the folder ``destination``.

    ``types``, ``to``, ``options``: as in ``ConversionRequest``. ``recipe``: the recipe's entry for the output, for the
    receipt.
    """

    destination: Path
    types: tuple[str, ...] = ()
    to: str | None = None
    options: WriteOptions = WriteOptions()
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """One source, and one or several outputs.

    - ``source``: a path, an address (docs/sources.md), or a checkpoint that is already open.
    - ``types``: quantization types. With none, the source is converted; with several, one output for each is written to
      the folder ``destination``.
    - ``to``: the target format; None: determined by the destination's name.
    - ``budget``: choose the types for a target; ``types`` is then empty.
    - ``options``: the options of the outputs; ``type``, ``name`` and ``single_file`` are set for each output.
    - ``checks``: how the outputs are verified; None: they are not verified.
    - ``outputs``: outputs with their own destinations and options, instead of the one that ``destination``, ``types``,
      ``to`` and ``options`` describe. Archives are then unpacked beside ``destination``, and ``options`` has the
      adapters.
    """

    source: Path | str | Checkpoint
    destination: Path
    types: tuple[str, ...] = ()
    to: str | None = None
    options: WriteOptions = WriteOptions()
    config: Gemma2Config | Path | str | None = None
    checks: Checks | None = field(default_factory=Checks)
    run: RunOptions = field(default_factory=RunOptions)
    reports: ReportFiles = ReportFiles()
    budget: Budget = Budget()
    outputs: tuple[OutputRequest, ...] = ()

    @property
    def parts(self) -> tuple[OutputRequest, ...]:
        """The outputs, each with its own options."""
        if self.outputs:
            adapters = self.options.adapters
            return tuple(replace(part, options=replace(part.options, adapters=adapters)) for part in self.outputs)
        return (OutputRequest(destination=self.destination, types=self.types, to=self.to, options=self.options),)
