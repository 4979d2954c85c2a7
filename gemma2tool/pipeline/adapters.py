"""An adapter by itself in another format: opened, laid out, written, read back and compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused, UsageError, choices
from gemma2tool.formats import registry
from gemma2tool.formats.adapters.adapter import Adapter, refused
from gemma2tool.formats.adapters.naming import is_adapter
from gemma2tool.formats.adapters.peft.config import CONFIG, MAX_CONFIG_BYTES
from gemma2tool.formats.assets import read_config
from gemma2tool.formats.base import Output
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.instruction_tuned import RELEASED
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, to_float32
from gemma2tool.model.names import HEAD
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.pipeline.inputs import resolve_config
from gemma2tool.pipeline.write import write_output
from gemma2tool.storage.paths import refuse_overwriting_input
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.staging.staged_output import Staging

_SUFFIX = ".gguf"
_ROUNDING = {"f32": 2.0**-22, "f16": 2.0**-10, "bf16": 2.0**-8, "q8_0": 2.0**-6}
"""How far a stored value may be from the source's, as a part of the largest magnitude of its matrix."""


@dataclass(frozen=True, kw_only=True)
class AdapterRequest:
    """An adapter to write as a GGUF for llama.cpp.

    - ``config``: the config of the model that the adapter was trained on; None: the model that adapter_config.json
      names, if that is a local folder or a released model.
    - ``dtype``: "f32" (the default), "f16", "bf16" or "q8_0".
    - ``allow_mismatch``: also write what llama.cpp does not apply.
    - ``verify``: read the file back before it is moved to the destination.
    """

    source: Path
    destination: Path
    config: Gemma2Config | Path | str | None = None
    dtype: str | None = None
    allow_mismatch: bool = False
    force: bool = False
    verify: bool = True


@dataclass(frozen=True)
class AdapterResult:
    """The adapter that was written.

    - ``weights``: how many weights the adapter changes.
    - ``rank``: the largest rank of its matrices.
    - ``tensors``: the file's tensors as (name, shape, type).
    - ``verified``: whether the file was read back and matches the source within the rounding of its types.
    - ``differing``: the weights that do not match; if there are any, nothing is written.
    """

    destination: Path
    nbytes: int
    weights: int
    rank: int
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    warnings: tuple[str, ...]
    differing: tuple[str, ...]
    verified: bool
    written: bool
    seconds: float

    def to_json(self) -> dict[str, object]:
        """The result as ``--json`` prints it."""
        return {
            "destination": str(self.destination),
            "format": "gguf",
            "bytes": self.nbytes,
            "written": self.written,
            "verified": self.verified,
            "differing": list(self.differing),
            "weights": self.weights,
            "rank": self.rank,
            "tensors": [{"name": name, "shape": list(shape), "type": type} for name, shape, type in self.tensors],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def is_adapter_conversion(source: Path | str | Checkpoint, destination: Path, to: str | None) -> bool:
    """Whether a conversion is of an adapter on this disk alone, to GGUF."""
    if isinstance(source, Checkpoint) or (to or "gguf") != "gguf":
        return False
    path = Path(source)
    return destination.suffix.lower() == _SUFFIX and path.exists() and is_adapter(path) and not _is_model(path)


def _is_model(path: Path) -> bool:
    """Whether a folder holds a model beside the adapter."""
    try:
        registry.detect(path)
    except InputRefused:
        return False
    return True


def convert_adapter(request: AdapterRequest, *, dry_run: bool = False) -> AdapterResult:
    """Write an adapter as GGUF. Raises ``UsageError`` and ``InputRefused``; then the destination is as it was."""
    from gemma2tool.formats.adapters.gguf_output import DTYPES, layout
    from gemma2tool.formats.adapters.reading import read_adapter

    if request.dtype is not None and request.dtype not in DTYPES:
        message = f"--dtype {request.dtype} is not a stored type of an adapter"
        raise UsageError("option.dtype", message, hint=choices.hint(request.dtype, DTYPES))
    start = time.monotonic()
    config = _base_config(request)
    with _skeleton(config, request.source) as base:
        adapter = read_adapter(request.source, base)
        _check_shapes(adapter, base)
        refuse_overwriting_input((request.source, *adapter.files), request.destination)
        name, mismatch = request.destination.name, request.allow_mismatch
        output = layout(adapter, config, WriteOptions(dtype=request.dtype, name=name, allow_mismatch=mismatch))
        differing = () if dry_run else _write(output, adapter, request, base)
        return AdapterResult(
            request.destination,
            output.nbytes,
            len(adapter.deltas),
            max((delta.rank for delta in adapter.deltas.values()), default=0),
            tuple((item.name, item.source.shape, item.encoder.name) for item in output.tensors),
            tuple(output.warnings),
            differing=differing,
            verified=request.verify and not dry_run and not differing,
            written=not dry_run and not differing,
            seconds=time.monotonic() - start,
        )


def _base_config(request: AdapterRequest) -> Gemma2Config:
    """The config of the model that the adapter belongs to. Raises ``UsageError`` (``lora.base``) if it is unknown."""
    given = request.config
    if given is not None:
        if isinstance(given, str | Path) and Path(given).is_dir():
            given = Path(given) / "config.json"
        config = resolve_config(given)
        assert config is not None
        return config
    base = _named_base(request.source)
    if base is not None and (Path(base) / "config.json").is_file():
        return read_config(Path(base) / "config.json")
    release = (base or "").rstrip("/").rpartition("/")[2].lower().removeprefix("gemma-2-")
    if base is not None and "gemma-2-" in base.lower() and release in RELEASED:
        return RELEASED[release]
    named = f"the base model {quoted(base)} is not on this disk" if base else f"no {CONFIG} names its base model"
    raise UsageError("lora.base", f"{request.source}: {named}")


def _named_base(source: Path) -> str | None:
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        return None
    content = strict_json.load(path, what=CONFIG, max_bytes=MAX_CONFIG_BYTES)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base if isinstance(base, str) and base else None


class _Absent(LazyTensor):
    """A weight of the base, of which only the shape is known."""

    dtype, stored, origin = FLOAT32, "f32", "base"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def load_rows(self, first: int, last: int) -> Array:
        raise NotImplementedError("the base's weights are not read")


def _skeleton(config: Gemma2Config, path: Path) -> Checkpoint:
    """The base without its values: names and shapes, to which an adapter is held."""
    tensors: dict[str, LazyTensor] = {
        name: _Absent(spec.shape) for name, spec in tensor_specs(config).items() if spec.required
    }
    return Checkpoint(path, registry.FACTS[registry.DEFAULT], config, tensors)


def _check_shapes(adapter: Adapter, base: Checkpoint) -> None:
    shapes: dict[str, tuple[int, ...]] = {name: delta.shape for name, delta in adapter.deltas.items()}
    shapes |= {name: tensor.shape for name, tensor in adapter.replacements.items()}
    for name, shape in shapes.items():
        if name == HEAD:  # which the layout refuses
            continue
        if name not in base.tensors:
            raise refused("target", adapter.path, f"{quoted(name)} is not a weight of the base model")
        if shape != base.tensors[name].shape:
            there = base.tensors[name].shape
            raise refused("shape", adapter.path, f"{name}: the adapter is for {shape}, the base model has {there}")


def _write(output: Output, adapter: Adapter, request: AdapterRequest, base: Checkpoint) -> tuple[str, ...]:
    """Write the file; the names of weights that it does not hold as the adapter does, in which case it is removed."""
    with Staging(request.destination, force=request.force, expected_bytes=output.nbytes) as staging:
        write_output(output, {file.name: staging.file(file.name, file.size) for file in output.files})
        rounding = max(_ROUNDING[item.encoder.name] for item in output.tensors)
        differing = _differing(adapter, staging.path, base, rounding) if request.verify else ()
        if not differing:
            staging.commit()
    return differing


def _differing(source: Adapter, path: Path, base: Checkpoint, rounding: float) -> tuple[str, ...]:
    """The weights that the file at ``path`` changes in another way than ``source``."""
    from gemma2tool.formats.adapters.gguf import read

    with _skeleton(base.config, path) as place:
        written = read(path, place)
        names = [*dict.fromkeys((*source.deltas, *written.deltas, *source.replacements, *written.replacements))]
        return tuple(name for name in names if not _is_alike(name, source, written, rounding))


def _is_alike(name: str, source: Adapter, written: Adapter, rounding: float) -> bool:
    a, b = source.deltas.get(name), written.deltas.get(name)
    if (a is None) != (b is None) or (name in source.replacements) != (name in written.replacements):
        return False
    if a is not None and b is not None:
        (a_left, a_right), (b_left, b_right) = a.factors(), b.factors()
        left = _is_near(np.float32(a.scaling) * a_left, np.float32(b.scaling) * b_left, rounding)
        return left and _is_near(a_right, b_right, rounding)
    norm, stored = source.replacements[name], written.replacements[name]
    return _is_near(1 + to_float32(norm.load()), 1 + to_float32(stored.load()), rounding)


def _is_near(a: Array, b: Array, rounding: float) -> bool:
    """Whether ``b`` is ``a`` within ``rounding`` of the largest magnitude; values that are not finite are not."""
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= rounding * np.abs(a).max(initial=0.0))
