"""What is asked of a release, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.formats.options import Adapter
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.pipeline.requests import RunOptions
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.publish.defaults import BUILT_IN, TEMPLATE, TOKENS


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What the card says that a checkpoint may not know.

    ``license``: None: what the source's card says, otherwise "gemma". ``base_model``: a repository on the hub; None:
    the source's own, if it is from there. ``relation``: of the source to ``base_model``, one of ``RELATIONS``; None:
    "quantized", or "finetune" if adapters are merged or the source is from another repository. ``quantized_by``: a
    name.
    """

    license: str | None = None
    base_model: str | None = None
    relation: str | None = None
    quantized_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """One source and a folder for its files.

    ``types``: of GGUF and of quantized folders. ``model``: the name that files begin with; None: the source's.
    ``adapters``: LoRA adapters to merge; then ``model`` is needed, as it is another model. ``template``: of the files'
    names, with {model} and {type}. ``imatrix``: an importance matrix for the GGUF types, or ``imatrix_text``: the text
    to collect one from. ``calibration``: the text that codes are chosen by. ``text``: what quality is measured on, at
    least ``tokens`` tokens of it. Texts are files, or "built-in".
    """

    source: Path | str | Checkpoint
    folder: Path
    types: tuple[str, ...]
    model: str | None = None
    adapters: tuple[Adapter, ...] = ()
    template: str = TEMPLATE
    imatrix: Path | None = None
    imatrix_text: Path | str | None = None
    calibration: Path | str | None = None
    text: Path | str = BUILT_IN
    tokens: int = TOKENS
    config: Gemma2Config | Path | str | None = None
    card: CardOptions = field(default_factory=CardOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """A release whose finished files are uploaded to the repository ``to`` (ORG/NAME) on the hub. ``private``: of a
    repository that is created. ``discard``: remove a file from the disk when it is uploaded; then each output is
    written in a pass of its own, so that the disk holds one at a time.
    """

    release: ReleaseRequest
    to: str
    private: bool = False
    discard: bool = False


@dataclass(frozen=True)
class ReleaseResult:
    """``files``: what the folder holds, by path below it. ``results``: of the outputs that were written by this run.
    ``failed``: those whose verification failed. ``uploaded``: files that this run sent to ``repository``.
    """

    folder: Path
    files: tuple[str, ...]
    results: tuple[ConversionResult, ...] = ()
    uploaded: tuple[str, ...] = ()
    repository: str | None = None

    @property
    def failed(self) -> tuple[ConversionResult, ...]:
        return tuple(result for result in self.results if not result.written)

    def to_json(self) -> dict[str, object]:
        """The result as ``--json`` prints it."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "outputs": [result.to_json() for result in self.results],
            "uploaded": list(self.uploaded),
        }
