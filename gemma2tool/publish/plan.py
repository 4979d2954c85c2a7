"""What a release will hold: its outputs with their names, options and records, and which of them are finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats import packings
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.formats.options import Adapter, GGUFOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.calibration.text import LENGTH, SAMPLES, read_sequences
from gemma2tool.pipeline.fingerprint import source_identity
from gemma2tool.pipeline.held_out import overlap, warn_of
from gemma2tool.pipeline.importance import chunks_of
from gemma2tool.pipeline.output_names import FLOAT_DTYPES
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.requests import Checks, ConversionRequest, OutputRequest
from gemma2tool.pipeline.sensitivity.table import Text
from gemma2tool.pipeline.sensitivity.windows import ALL, describe
from gemma2tool.publish.defaults import BUILT_IN, RELATIONS
from gemma2tool.publish.names import (
    IMATRIX,
    check_model_name,
    check_names,
    check_template,
    check_types,
    model_name,
    output_name,
    repository_name,
)
from gemma2tool.publish.request import ReleaseRequest
from gemma2tool.publish.texts import described, text_file
from gemma2tool.receipt.document import Receipt, read_receipt, receipt_path
from gemma2tool.receipt.files import digest_files, file_names
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.text_file import read_text

RECORD = "release"
"""The key of a release's record among what a receipt's recipe says."""


@dataclass(frozen=True)
class Output:
    """One output of a release: its ``path`` in the folder, the ``type`` it was asked for, and how it is written.
    ``record``: what its receipt says of the release. ``adapters``: merged into the source.
    """

    path: Path
    type: str
    options: WriteOptions
    record: Mapping[str, Any]
    adapters: tuple[Adapter, ...] = ()

    @property
    def request(self) -> OutputRequest:
        return OutputRequest(destination=self.path, types=(self.type,), options=self.options, recipe=self.record)

    def finished(self, *, force: bool, threads: int) -> Receipt | None:
        """Its receipt if it is in place and what would be written; None if it is to be written.

        An output that waits for the importance matrix of the release is told only when that is there. Raises
        ``UsageError`` (``release.other``) for another output of its name, unless ``force`` says that it may be
        replaced.
        """
        matrix = self.options.gguf.imatrix
        if staging_place.exists(self.path) or not self.path.exists() or (matrix is not None and not matrix.exists()):
            return None
        try:
            return self._checked(threads)
        except UsageError:
            if not force:
                raise
            return None

    def _checked(self, threads: int) -> Receipt:
        receipt = self.own_receipt()
        if receipt is None:
            raise UsageError("release.other", f"{self.path}: exists, but has no receipt of this release")
        if list(receipt.files) != digest_files(self.path, file_names(self.path), threads=threads):
            raise UsageError("release.other", f"{self.path}: exists, but does not match its receipt")
        return receipt

    def own_receipt(self) -> Receipt | None:
        """Its receipt, if there is one, of the same source, options and text; whether its files are there or not."""
        place = receipt_path(self.path)
        with suppress(InputRefused):
            if place.is_file():
                receipt = read_receipt(place)
                plan = receipt.content["plan"]
                same = (plan.get("recipe"), plan["options"]) == (self.record, receipts.options(self.written))
                return receipt if same else None
        return None

    @property
    def written(self) -> WriteOptions:
        """The options that its conversion gets."""
        return WriteOptions(
            type=self.type,
            gguf=self.options.gguf,
            calibration=self.options.calibration.for_type(self.type),
            packing=self.options.packing,
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Release:
    """A request with its source open. ``source``: with ``adapters`` merged into ``base``. ``ids``: token ids (N, T)
    that quality is measured on, ``text``: what they are. ``identity``: of the source. ``imatrix``: where the importance
    matrix is, or will be.
    """

    request: ReleaseRequest
    base: Checkpoint
    source: Checkpoint
    adapters: tuple[Adapter, ...]
    model: str
    identity: str
    ids: NDArray[np.int64]
    text: Text
    imatrix: Path | None
    calibration: Path | None
    folder: Path = field(default_factory=Path)
    """For files that are needed until the release is done."""

    @property
    def release_imatrix(self) -> Path | None:
        """The importance matrix that is part of the release: the one that it collects."""
        return self.imatrix if self.request.imatrix_text is not None else None

    def outputs(self) -> tuple[Output, ...]:
        """The outputs of the request."""
        return tuple(self._output(type) for type in self.request.types)

    def missing(self, elsewhere: Collection[Path] = ()) -> tuple[Output, ...]:
        """The outputs that are neither finished nor ``elsewhere``. Raises ``UsageError`` (``release.other``) for files
        in their way.
        """
        force, threads = self.request.run.force, self.request.run.threads
        left = (output for output in self.outputs() if output.path not in elsewhere)
        return tuple(output for output in left if output.finished(force=force, threads=threads) is None)

    def _output(self, type: str) -> Output:
        name = output_name(self.request.template, self.model, type)
        is_float = type in FLOAT_DTYPES
        options = WriteOptions(
            gguf=GGUFOptions(imatrix=self.imatrix if type not in packings.TYPES and not is_float else None),
            calibration=Calibration(text=None if is_float else self.calibration),
        )
        record = {
            RECORD: {
                "model": self.model,
                "type": type,
                "source": self.identity,
                "text": {
                    "name": self.text.name,
                    "sha256": self.text.sha256,
                    "windows": self.text.windows,
                    "length": self.text.length,
                },
            }
        }
        return Output(self.request.folder / name, type, options, record, self.adapters)

    def conversion(self, outputs: tuple[Output, ...]) -> ConversionRequest:
        """The request that writes some outputs in one pass, verified and measured on the text."""
        tokens = self.folder / "measured.npy"
        np.save(tokens, self.ids)
        return ConversionRequest(
            source=self.base,
            destination=outputs[0].path,
            outputs=tuple(output.request for output in outputs),
            options=WriteOptions(adapters=self.adapters),
            checks=Checks(tokens=tokens),
            run=replace(self.request.run, modelfile=False),  # the release writes its own
        )

    def imatrix_to_collect(self) -> tuple[NDArray[np.int64], str] | None:
        """What the importance matrix of the release is to be collected from: token ids (N, T), and their name in its
        file; None if it has none, or if it is there from an earlier run.

        Raises ``UsageError`` (``release.other``) for one of another text that may not be replaced.
        """
        place = self.release_imatrix
        if place is None:
            return None
        chunks, dataset = self._imatrix_chunks()
        if place.exists():
            with suppress(InputRefused):
                if read_imatrix(place).dataset == dataset:
                    return None
            if not self.request.run.force:
                raise UsageError("release.other", f"{place}: exists, but comes from a different text or source")
        return chunks, dataset

    def _imatrix_chunks(self) -> tuple[NDArray[np.int64], str]:
        assert self.request.imatrix_text is not None
        text = text_file(self.request.imatrix_text, "calibration", self.folder)
        ids = PromptTokenizer(self.source).encode(read_text(text, what="text"))
        config = self.source.config
        chunks = chunks_of(ids, min(LENGTH, config.max_position_embeddings), config.bos_token_id, SAMPLES)
        return chunks, f"{text.name}, tokens {describe(text, chunks).sha256[:16]}, of {self.identity}"

    def sentence(self) -> str:
        """What quality is measured on."""
        text = described(self.request.text)
        count, length = self.ids.shape
        return f"{self.ids.size:,} tokens ({count} window{'s' * (count != 1)} of {length}) of {text}"


def check_request(request: ReleaseRequest) -> None:
    """Raises ``UsageError`` for what can be refused before the source is opened."""
    if not request.types:
        raise UsageError("type.missing", "--types is empty", hint="'gemma2tool formats' lists them")
    check_types(request.types)
    check_template(request.template, request.types)
    if request.model is not None:
        check_model_name(request.model)
    elif request.adapters:
        message = "--lora makes another model, which needs a name of its own"
        raise UsageError("release.options", message, hint="name it with --name")
    if request.card.base_model is not None:
        repository_name(request.card.base_model, "--base-model")
    if request.card.relation is not None and request.card.relation not in RELATIONS:
        hint = choices.hint(request.card.relation, RELATIONS)
        raise UsageError("option.choice", f"--base-model-relation {request.card.relation!r} is not a choice", hint=hint)
    _check_folder(request.folder)
    given = {
        "--imatrix": request.imatrix,
        "--imatrix-text": request.imatrix_text,
        "--calibration": request.calibration,
    }
    chosen = [option for option, value in given.items() if value is not None]
    if len(chosen) > 1:
        hint = f"leave out {chosen[1]}"
        raise UsageError("release.options", f"{chosen[0]} and {chosen[1]} both choose the codes", hint=hint)
    if request.tokens < 1:
        raise UsageError("release.text", "--tokens is less than one")
    if not request.run.receipt:
        raise UsageError("release.options", "a release needs receipts: they say what is finished")


def _check_folder(folder: Path) -> None:
    """Raises ``UsageError`` (``release.folder``) if the folder, or one above it, is a file."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise UsageError("release.folder", f"{folder}: {'it' if place == folder.absolute() else place} is a file")


def open_release(
    request: ReleaseRequest, base: Checkpoint, folder: Path, merged: tuple[Checkpoint, tuple[Adapter, ...]]
) -> Release:
    """The release of an open source ``base``. ``folder``: for files that are needed meanwhile. ``merged``: the source
    with the adapters of the request, and these with local paths.

    Raises ``UsageError`` (``release.text``) for a text that has too few tokens.
    """
    source, adapters = merged
    model = request.model or model_name(source)
    check_names((output_name(request.template, model, type) for type in request.types), request.template, model)
    path = text_file(request.text, "measurement", folder)
    for chosen in (request.imatrix_text, request.calibration):
        if chosen is not None and str(chosen) != BUILT_IN and overlap(path, Path(chosen)):
            warn_of(path, "the codes are chosen by it")
    ids = read_sequences(path, source, samples=ALL, length=None)
    count = min(math.ceil(request.tokens / ids.shape[1]), len(ids))
    ids = ids[np.linspace(0, len(ids) - 1, count).astype(np.int64)]
    if ids.size < request.tokens:
        raise UsageError(
            "release.text",
            f"{path}: has {ids.size:,} tokens in whole windows, and {request.tokens:,} are asked for",
            hint="pass a longer text with --text, or fewer --tokens",
        )
    imatrix = request.imatrix
    if request.imatrix_text is not None:
        imatrix = request.folder / f"{model}{IMATRIX}"
    calibration = None
    if request.calibration is not None:
        calibration = text_file(request.calibration, "calibration", folder)
    identity = _identity(base, adapters)
    text = describe(path, ids)
    return Release(request, base, source, adapters, model, identity, ids, text, imatrix, calibration, folder)


def _identity(base: Checkpoint, adapters: tuple[Adapter, ...]) -> str:
    """What the source is recognised by, with the adapters that are merged into it."""
    if not adapters:
        return source_identity(base)
    merged = json.dumps(receipts.options(WriteOptions(adapters=adapters)), sort_keys=True)
    return f"{source_identity(base)} with adapters {hashlib.sha256(merged.encode()).hexdigest()[:16]}"
