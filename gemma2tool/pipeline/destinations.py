"""Where outputs go, what formats and types they have, and what may not be there: all refused before the source is
opened.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats import packings, registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.pipeline.output_names import check_name, check_type
from gemma2tool.pipeline.requests import ConversionRequest, OutputRequest
from gemma2tool.storage.paths import refuse_existing, refuse_overwriting_input
from gemma2tool.storage.staging import place as staging_place
from gemma2tool.storage.syscalls import translate_os_errors


@dataclass(frozen=True)
class Destination:
    """One output's place: ``path``, ``format``, quantization ``type`` or None. ``part``: what was asked for."""

    path: Path
    format: str
    type: str | None
    part: OutputRequest

    @property
    def is_file(self) -> bool:
        return self.path.suffix.lower() in registry.FILE_SUFFIXES

    @property
    def options(self) -> WriteOptions:
        """The options of the request as they are for this output."""
        return replace(self.part.options, type=self.type, name=self.path.name, single_file=self.is_file)

    def with_options(self, options: WriteOptions) -> Destination:
        """The same place for the type of ``options``."""
        return replace(self, type=options.type, part=replace(self.part, options=options))


def destinations(request: ConversionRequest) -> list[Destination]:
    """The outputs of a request, checked. Several types go to ``DST/NAME-TYPE.gguf`` and to folders ``DST/NAME-TYPE``.

    Raises ``UsageError`` for anything that could not be written, or that would overwrite what must stay.
    """
    outputs: list[Destination] = []
    for part in request.parts:
        outputs += _outputs(part)
        check_parent(part.destination)
    _refuse_twice(outputs)
    for output in outputs:
        _check_dtype(output.options.dtype, output.format)
        check_type(output.format, output.type)
        check_name(output.path, output.format, is_file=output.is_file)
        output.options.check_target(output.format)
        if not staging_place.exists(output.path):  # otherwise what is staged decides
            refuse_existing(output.path, force=request.run.force, folder=not output.is_file)
        refuse_overwriting_input(input_files(request), output.path)
        _refuse_foreign_folder(output.path)
    return outputs


def _outputs(part: OutputRequest) -> list[Destination]:
    destination, to, types = part.destination, part.to, part.types
    if len(types) <= 1:
        type_name = types[0] if types else None
        return [Destination(destination, registry.for_destination(destination, to, type_name), type_name, part)]
    if destination.suffix.lower() in registry.FILE_SUFFIXES or (destination.exists() and not destination.is_dir()):
        raise UsageError(
            "output.kind",
            f"{destination}: several types need a folder to put their files into",
            hint="name a folder as DST",
        )
    outputs = []
    for type_name in types:
        is_packing = to is not None or type_name in packings.TYPES
        format_name = registry.for_destination(destination, to, type_name) if is_packing else "gguf"
        suffix = next(iter(registry.FACTS[format_name].suffixes), "")
        path = destination / f"{destination.resolve().name}-{type_name}{suffix}"
        outputs.append(Destination(path, format_name, type_name, part))
    return outputs


def _refuse_twice(outputs: Sequence[Destination]) -> None:
    paths = [output.path.absolute() for output in outputs]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError("output.twice", f"{path}: two outputs have this name")


def check_parent(destination: Path) -> None:
    """Raises ``UsageError`` where the folder that ``destination`` goes into does not exist."""
    if not destination.absolute().parent.is_dir():
        raise UsageError(
            "output.no-parent",
            f"{destination.parent}: no such folder",
            hint=f"create it first: mkdir -p {shlex.quote(str(destination.parent))}",
        )


def _check_dtype(dtype: str | None, format_name: str) -> None:
    facts = registry.FACTS[format_name]
    allowed = (*facts.float_dtypes, "auto", *facts.more_dtypes)
    if dtype is None or dtype in allowed:
        return
    hint = choices.hint(dtype, allowed)
    if dtype in registry.by_name(format_name).types:
        hint += f"; {dtype} is a quantization type: 'gemma2tool quantize --type {dtype}'"
    raise UsageError("option.dtype", f"--dtype {dtype} is not a stored type of {format_name}", hint=hint)


def input_files(request: ConversionRequest) -> list[Path]:
    """Files that are read beside the source, and must not be overwritten."""
    paths = [Path(request.config)] if isinstance(request.config, (str, Path)) else []
    paths += [path for path in (*(request.checks.files if request.checks else ()), request.budget.sensitivity) if path]
    for options in (part.options for part in request.parts):
        paths += [adapter.path for adapter in options.adapters]
        calibration = options.calibration
        paths += [path for path in (options.gguf.imatrix, calibration.text, calibration.hessians) if path]
    return [path for path in paths if path.exists()]


def _refuse_foreign_folder(destination: Path) -> None:
    """``--force`` replaces checkpoints only: a folder with other content could be lost by a typing error."""
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    try:
        registry.detect(destination)
    except InputRefused:
        raise UsageError(
            "output.not-a-checkpoint",
            f"{destination}: not replaced, even with --force: the folder contains no checkpoint",
            hint="choose a different name, or remove the folder yourself",
        ) from None


@contextmanager
def folder_of_several(outputs: Sequence[Destination]) -> Iterator[None]:
    """The folders that several outputs go into; removed again if they were created here and stay empty."""
    if len(outputs) == 1:
        yield
        return
    created = []
    for folder in dict.fromkeys(output.path.parent for output in outputs):
        inside = [output for output in outputs if output.path.parent == folder]
        if not folder.exists() or any(staging_place.exists(output.path) for output in inside):
            created.append(folder)
        with translate_os_errors(folder, "creating the folder"):
            try:
                folder.mkdir(exist_ok=True)
            except FileNotFoundError:
                check_parent(folder)
                raise
    try:
        yield
    finally:
        for folder in created:
            with suppress(OSError):  # rmdir refuses a folder that is not empty
                folder.rmdir()
