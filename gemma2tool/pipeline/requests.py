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
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How a candidate is verified.

    ``tokens``: token ids (.npy) for the forward passes, or ``text``, a file of UTF-8 text; neither: the built-in sample
    text. ``gates``: limits that replace the defaults, by name ("kl"). ``sample``: tokens by which source and candidate
    continue the prompt, for people to read; each takes a pass over both models.
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

    ``force``: replace an existing destination once its replacement is complete and verified. ``restart``: discard what
    an interrupted run left. ``allow_nonfinite``: accept NaN and infinities in the source. ``clip_f16``: store the
    largest float16 instead of refusing values beyond it. ``allow_unsafe_template``: carry a chat
    template that ``scan`` calls dangerous. ``receipt``: write one beside each verified output. ``readers``: let the
    libraries that define the output's format read it too. ``modelfile``: write one for ollama beside each GGUF.
    ``memory``: bytes of data in flight. ``keep_download``:
    download a source that is not local to this folder first, and read it there. ``device``: where forward passes and
    calibration compute, "cpu" or "cuda". ``together``: calibrate together with the other processes that torchrun
    started, each of which makes this request; rank 0 writes, and the others get no results.
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
        """These options, with ``force`` if either asks for it."""
        return replace(self, force=self.force or force)


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """One output, or one of each of several ``types`` in the folder ``destination``.

    ``types``, ``to``, ``options``: as in ``ConversionRequest``. ``recipe``: what a recipe says of it, for its receipt.
    """

    destination: Path
    types: tuple[str, ...] = ()
    to: str | None = None
    options: WriteOptions = WriteOptions()
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionRequest:
    """One source, one or several outputs.

    ``source``: a path, an address (docs/sources.md), or a checkpoint that is open already. ``types``: quantization
    types; none converts, several put one output each into the folder ``destination``. ``to``: the target format; None:
    by the destination's name. ``budget``: the types are chosen for a target; then ``types`` is empty.
    ``options``: of the outputs; their ``type``, ``name`` and ``single_file`` are set for each output. ``checks``: None
    leaves out the verification. ``outputs``: outputs with places and options of their own, in place of the one that
    ``destination``, ``types``, ``to`` and ``options`` describe; then ``destination`` is beside what is unpacked, and
    ``options`` has the adapters.
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
