"""What must be equal for two runs to write the same bytes, so that one can resume the other.

The source's files by name, size, version (the modification time of local ones) and their first and last bytes; the
tool's version and libraries; the options by name, so that a refusal can say which one differs; and the whole plan:
every header, placement and encoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import CPU, current_device
from gemma2tool.pipeline.plan import Plan
from gemma2tool.quantizers.kernels import _native
from gemma2tool.storage import attached
from gemma2tool.storage.reading import FileReader, open_for_reading
from gemma2tool.storage.staging.journal import Fingerprint
from gemma2tool.version import __version__

if TYPE_CHECKING:
    from gemma2tool.pipeline.calibration.session import Session

_ENDS = 1 << 16
_DIGITS = 16

PLAN = "plan"
"""The name of what is known only when there is a plan."""


def fingerprint(plan: Plan, options: Mapping[str, object]) -> Fingerprint:
    """The fingerprint of a plan carried out with ``options`` (those of the run that change bytes, by name)."""
    run = {} if plan.session is None else {"calibration-run": _calibration(plan.session)}
    return {**run, **settings(plan.source, plan.output.format, plan.options, options), PLAN: _plan(plan)}


def settings(source: Checkpoint, format_name: str, options: WriteOptions, run: Mapping[str, object]) -> dict[str, str]:
    """What of a fingerprint is known before there is a plan. ``run``: as the ``options`` of ``fingerprint``."""
    allowed = {"allow_mismatch": options.allow_mismatch, "allow_requantize": options.allow_requantize}
    given = {**options.given(), **allowed, **run}
    return {
        "tool": f"gemma2tool {__version__}, numpy {np.__version__}, kernels {_kernels()}",
        "format": format_name,
        **{name.replace("_", "-"): _shown(value) for name, value in sorted(given.items()) if value},
        **{f"source {name}": state for name, state in _files(source).items()},
    }


def _calibration(session: Session) -> str:
    """The calibration's token ids and settings, and what the last bits of its products depend on."""
    import torch

    device = current_device()
    unit = torch.backends.cpu.get_cpu_capability() if device.type == CPU else torch.cuda.get_device_name(device)
    return f"{_digest(session.calibration)} by torch {torch.__version__} with {unit}"


@cache
def _kernels() -> str:
    """A digest of the compiled kernels."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:_DIGITS]


def _files(source: Checkpoint) -> dict[str, str]:
    """Every file of the source: by its address, or for local ones by the path below their common folder."""
    files = sorted(set(source.files))
    addresses = {path: attached.address_of(path) for path in files}
    local = [path.absolute() for path in files if addresses[path] is None]
    folder = Path(os.path.commonpath([path.parent for path in local])) if local else Path()
    return {addresses[path] or str(path.absolute().relative_to(folder)): _identity(path) for path in files}


def _identity(path: Path) -> str:
    with open_for_reading(path) as reader:
        digest = hashlib.sha256(b"".join(_ends(reader))).hexdigest()[:_DIGITS]
        return f"{reader.size} bytes {reader.version} with digest {digest}"


def source_identity(source: Checkpoint) -> str:
    """What a source is recognised by in a later run, wherever it is then: the commit of a repository, or a digest of
    its files' names, sizes, first and last bytes.
    """
    if source.pinned is not None and source.pinned.startswith("hf://"):
        return source.pinned
    states = []
    for path in sorted(set(source.files)):
        with open_for_reading(path) as reader:
            states.append([path.name, reader.size, *_ends(reader)])
    digest = hashlib.sha256()
    _feed(digest, states)
    return digest.hexdigest()


def _ends(reader: FileReader) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file."""
    size = min(_ENDS, reader.size)
    return bytes(reader.pread(0, size)), bytes(reader.pread(reader.size - size, size))


def _shown(value: object) -> str:
    """An option, roughly as a person wrote it."""
    if isinstance(value, Adapter):
        return f"{attached.address_of(value.path) or value.path}={value.scale:g}"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_shown(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(_shown, sorted(value) if isinstance(value, (set, frozenset)) else value))
    if isinstance(value, Path):
        return value.name  # what is in the file decides; that is in the plan, or in the calibration's digest
    if isinstance(value, (str, int, float, bool)):
        return str(value)
    return _digest(value)


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    try:
        _feed(digest, value)
    except TypeError:
        return type(value).__name__  # its effect on the bytes is in the plan
    return digest.hexdigest()[:_DIGITS]


def _plan(plan: Plan) -> str:
    digest, output = hashlib.sha256(), plan.output
    _feed(digest, [(file.name, file.size, list(file.fixed)) for file in output.files])
    _feed(digest, output.assets)
    for item in output.tensors:
        source = item.source
        _feed(digest, [item.name, item.canonical, source.shape, source.dtype, source.stored, source.origin])
        _feed(digest, [item.encoder, {suffix: dataclasses.astuple(place) for suffix, place in item.parts.items()}])
    return digest.hexdigest()[:_DIGITS]


def _feed(digest: hashlib._Hash, value: object) -> None:
    """Feed a setting to the digest unambiguously; ``TypeError`` for any other object. Fields of a dataclass that do not
    take part in comparisons follow from others."""
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if isinstance(value, np.ndarray):
        value = [value.dtype, value.shape, np.ascontiguousarray(value).tobytes()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        compared = (field.name for field in dataclasses.fields(value) if field.compare)
        value = [type(value).__qualname__, *(getattr(value, name) for name in compared)]
    if isinstance(value, (list, tuple)):
        digest.update(b"[%d;" % len(value))
        for element in value:
            _feed(digest, element)
    elif isinstance(value, (bytes, memoryview)):
        digest.update(b"b%d;" % len(value))
        digest.update(value)
    elif value is None or isinstance(value, (str, int, float, bool, np.generic, np.dtype, Path)):
        text = f"{type(value).__name__}:{value!s}".encode("utf-8", "surrogateescape")
        digest.update(b"t%d;" % len(text))
        digest.update(text)
    elif isinstance(value, Sequence):
        _feed(digest, list(value))
    else:
        raise TypeError(f"{type(value).__name__} is not a setting")
