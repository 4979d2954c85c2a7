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
    """Facts for the model card that a checkpoint may not contain.

    - ``license``: None: the license that the source's card names, otherwise "gemma".
    - ``base_model``: a repository on the hub; None: the source's repository, if the source is from the hub.
    - ``relation``: the relation of the source to ``base_model``, one of ``RELATIONS``; None: "quantized", or "finetune"
      if adapters are merged or the source is from another repository.
    - ``quantized_by``: the name of the person or organization that quantized the model.
    """

    license: str | None = None
    base_model: str | None = None
    relation: str | None = None
    quantized_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """One source, and a folder for its files. Each text is a file or "built-in".

    - ``types``: types of GGUF files and of quantized folders.
    - ``model``: the name with which files begin; None: the source's.
    - ``adapters``: LoRA adapters to merge; ``model`` is then required, because the result is a different model.
    - ``template``: the pattern of the file names, with {model} and {type}.
    - ``imatrix``: an importance matrix for the GGUF types. ``imatrix_text``: a text to collect one from, instead.
    - ``calibration``: the text by which codes are chosen.
    - ``text``: the text that quality is measured on, using at least ``tokens`` tokens of it.
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
    """A release whose finished files are uploaded to the repository ``to`` (ORG/NAME) on the hub.

    - ``private``: if the repository does not exist, create it as a private one.
    - ``discard``: remove each file from the disk after its upload. Each output is then written in a pass of its own, so
      that the disk holds one at a time.
    """

    release: ReleaseRequest
    to: str
    private: bool = False
    discard: bool = False


@dataclass(frozen=True)
class ReleaseResult:
    """What a release wrote.

    - ``files``: the files in the folder, by their paths relative to it.
    - ``results``: the outputs that this run wrote. ``failed``: those whose verification failed.
    - ``uploaded``: the files that this run uploaded to ``repository``.
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
        """Return the result as ``--json`` prints it."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "outputs": [result.to_json() for result in self.results],
            "uploaded": list(self.uploaded),
        }
