"""GGUF, llama.cpp's format: any Gemma 2 file is read, quantized or split; files are written as llama.cpp's own tools
write them.

A conversion (``dtype``) gives what convert_hf_to_gguf.py gives; a quantization (``type``) what llama-quantize then
makes of it, in one step. From a GGUF source either gives what llama-quantize gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFHeader, GGUFValue
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.base import Format, Output, WriteOptions, opening
from gemma2tool.formats.gguf import FACTS
from gemma2tool.formats.gguf.config import ARCHITECTURE, read_config, unrepresentable, unusual
from gemma2tool.formats.gguf.convert import (
    FILE_TYPES,
    common_type,
    converter_keys,
    converter_types,
    disk_tensors,
    out_type,
    planned_as,
)
from gemma2tool.formats.gguf.key_values import KeyValue, Reading
from gemma2tool.formats.gguf.output import GGUFTensorPlan, place, quantized_keys, quantized_order
from gemma2tool.formats.gguf.quantize import Named, Request, quantized
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.gguf.tensors import FLOATS, GGUFTensor
from gemma2tool.formats.mapping.transforms import convention_losses, entries, expected_after_roundtrip, to_canonical
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor, MappedRows
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.mixtures import COPY
from gemma2tool.quantizers.mixtures import FILE_TYPES as MIXTURES
from gemma2tool.storage.paths import confined_path, path_within_folder
from gemma2tool.storage.reading import open_for_reading

CONFIG_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.h5", "*.pth")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Source:
    """A GGUF as it is on disk, for writing another: key-values, and tensors by GGUF name, in file order."""

    kv: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]


class GGUF(Format):
    """One .gguf file, or any shard of a split one."""

    facts = FACTS
    types = tuple(sorted(MIXTURES))

    def detect(self, path: Path) -> bool:
        try:
            if path.is_dir():
                # Repositories put a GGUF beside the weights it was made from: those are the model then.
                others = any(next(path.glob(pattern), None) for pattern in OTHER_WEIGHTS)
                return not others and _only_model(path) is not None
            with path.open("rb") as file:
                return file.read(len(gguf.MAGIC)) == gguf.MAGIC
        except OSError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        """Any shard of a split file stands for all of them. The config is what llama.cpp makes of the file, unless one
        is given.
        """
        file = path if not path.is_dir() else _only_model(path)
        if file is None:
            raise InputRefused("gguf.several", f"{path}: not one GGUF but several or none", hint="name the file")
        headers = _headers(file if file == path else path_within_folder(file))
        kv = {key: value for key, value in headers[0].kv.items() if not key.startswith("split.")}
        keys = Reading(kv, file.name)
        architecture = keys.text("general.architecture", None)
        if architecture != ARCHITECTURE:
            raise InputRefused(
                "gguf.architecture",
                f"{file.name}: general.architecture is {architecture!r}, this tool reads {ARCHITECTURE!r}",
                hint="only Gemma 2 can be read",
            )
        with opening() as closers:
            tensors: dict[str, GGUFTensor] = {}
            for header in headers:
                reader = open_for_reading(header.path)
                closers.append(reader.close)
                for name, entry in header.tensors.items():
                    if name in tensors:
                        raise InputRefused(
                            "gguf.duplicate-tensor", f"{header.path.name}: {name} is in another shard, too"
                        )
                    tensors[name] = GGUFTensor(reader, entry)
            config = config or read_config(keys, _embedding_rows(tensors, file), _config_dtype(tensors))
            is_weighted = any(key.startswith("quantize.imatrix.") for key in kv)
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                to_canonical(TABLE, tensors, config),
                tokenizer_assets(keys),
                metadata={self.name: Source(kv, tensors), "importance_matrix": is_weighted},
                files=tuple(header.path for header in headers),
                closers=closers,
            )
            checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        return False

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """Norms whose low bits w + 1 in float32 cannot hold; none of a checkpoint that was a GGUF itself."""
        return {} if self.name in source.metadata else expected_after_roundtrip(TABLE, source.tensors, source.config)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        """See the module's docstring. ``options.allow_mismatch`` writes a file that llama.cpp will run as another
        model than the source (``gguf.cannot-say`` otherwise)."""
        request = Request.of(options)
        warnings: list[str] = []
        source = checkpoint.metadata.get(self.name)
        if not isinstance(source, Source):
            _refuse_unrepresentable(checkpoint, options.allow_mismatch, warnings)
            planned, kv = self._from_canonical(checkpoint, options, request, warnings)
            lost = convention_losses(TABLE, checkpoint.tensors, checkpoint.config)
        else:
            planned, kv = self._from_gguf(checkpoint, source, options, request, warnings)
            lost = []
        files, tensors = place(planned, kv, options.name, request.split)
        return Output(self.name, not request.split.wanted, files, tensors, losses=lost, warnings=warnings)

    def _from_canonical(
        self, checkpoint: Checkpoint, options: WriteOptions, request: Request, warnings: list[str]
    ) -> tuple[list[GGUFTensorPlan], list[KeyValue]]:
        tensors = disk_tensors(checkpoint)
        if options.type is None:
            outtype = out_type(checkpoint, options.dtype)
            _refuse_without_type(options, request)
            types = converter_types(((name, tensor.shape) for name, _, tensor in tensors), outtype, warnings)
            planned = [planned_as(name, canonical, tensor, types[name], None) for name, canonical, tensor in tensors]
            return planned, [*converter_keys(checkpoint, FILE_TYPES[outtype], warnings), *request.keys]
        middle = _intermediate(checkpoint, options)
        tensors = [(name, canonical, _narrowed(tensor, middle)) for name, canonical, tensor in tensors]
        planned, number = quantized(tensors, options.type, checkpoint.config, request, warnings)
        kv = converter_keys(checkpoint, FILE_TYPES[middle], warnings)
        number = FILE_TYPES[middle] if number is None else number
        return quantized_order(planned), quantized_keys(kv, number, [*request.keys, *request.imatrix_keys()])

    def _from_gguf(
        self, checkpoint: Checkpoint, source: Source, options: WriteOptions, request: Request, warnings: list[str]
    ) -> tuple[list[GGUFTensorPlan], list[KeyValue]]:
        carried = {entry.disk: entry.canonical for entry in entries(TABLE, checkpoint.config)}
        tensors: list[Named] = [(name, carried[name], tensor) for name, tensor in source.tensors.items()]
        type = options.type
        if type is None:
            type = "copy" if options.dtype is None else out_type(checkpoint, options.dtype)
        elif options.dtype is not None:
            raise UsageError(
                "gguf.dtype-and-type", "--dtype and --type are one choice for a GGUF source", hint="leave out --dtype"
            )
        planned, number = quantized(tensors, type, checkpoint.config, request, warnings)
        if number is None:
            number = Reading(source.kv, checkpoint.path.name).integer("general.file_type", 0)
        keys = quantized_keys(list(source.kv.items()), number, [*request.keys, *request.imatrix_keys()])
        return quantized_order(planned), keys


def _headers(file: Path) -> list[GGUFHeader]:
    """The header of the file, or of every shard of a split one, the one with the key-values first."""
    header = gguf.read_header(file)
    if "split.count" not in header.kv:
        return [header]
    count = Reading(header.kv, file.name).integer("split.count")
    named = _SHARD.fullmatch(file.name)
    if count == 1 and named is None:
        return [header]
    if named is None or int(named[3]) != count:
        raise InputRefused(
            "gguf.split-name",
            f"{file.name}: a shard of {count}, but its name does not end in -00001-of-{count:05d}.gguf",
            hint="give the shards back their names",
        )
    headers = []
    for number in range(1, count + 1):
        path = confined_path(file.parent, f"{named[1]}-{number:05d}-of-{count:05d}.gguf", what="shard")
        header = gguf.read_header(path)
        keys = Reading(header.kv, path.name)
        if keys.integer("split.no") != number - 1 or keys.integer("split.count") != count:
            raise InputRefused(
                "gguf.split",
                f"{path.name}: its split.no or split.count is not its name's",
                hint="fetch the shards again",
            )
        headers.append(header)
    total = Reading(headers[0].kv, file.name).integer("split.tensors.count", None)
    held = sum(len(header.tensors) for header in headers)
    if total is not None and total != held:
        raise InputRefused(
            "gguf.split", f"{file.name}: the shards hold {held} tensors of {total}", hint="fetch the shards again"
        )
    return headers


def _only_model(folder: Path) -> Path | None:
    """The GGUF that a folder holds, when it is one (or all shards of one)."""
    found = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    shards = {(match[1], match[3]) for path in found if (match := _SHARD.fullmatch(path.name))}
    if len(found) == 1 or (len(shards) == 1 and all(_SHARD.fullmatch(path.name) for path in found)):
        return found[0]
    return None


def _embedding_rows(tensors: Mapping[str, GGUFTensor], file: Path) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputRefused(
            "gguf.embedding", f"{file.name}: no token_embd.weight", hint="a vocabulary alone is no model"
        )
    return embedding.rows


def _config_dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) == 2:
            name = DTYPE_NAMES[tensor.dtype]
            sizes[name] = sizes.get(name, 0) + tensor.size
    return CONFIG_DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def _refuse_unrepresentable(checkpoint: Checkpoint, allow: bool, warnings: list[str]) -> None:
    found = unrepresentable(checkpoint.config, checkpoint.tensors)
    if found and not allow:
        raise InputRefused(
            "gguf.cannot-say",
            f"{checkpoint.path.name}: GGUF cannot represent this: {'; '.join(found)}",
            hint="write a Hugging Face folder, or accept a GGUF that computes something else with --allow-mismatch",
        )
    warnings += [f"GGUF cannot represent this, the file will compute something else: {problem}" for problem in found]
    warnings += unusual(checkpoint.config)


def _refuse_without_type(options: WriteOptions, request: Request) -> None:
    """Options that only a quantization looks at."""
    if request.imatrix is not None or request.overrides.patterns or request.overrides.pure:
        raise UsageError(
            "gguf.no-type", "importance matrix and tensor types need a --type", hint="choose one, such as q4_k_m"
        )
    if request.overrides.token_embedding or request.overrides.output:
        raise UsageError(
            "gguf.no-type", "a type for one tensor needs a --type for the others", hint="choose one, such as q4_k_m"
        )


def _intermediate(checkpoint: Checkpoint, options: WriteOptions) -> str:
    """The float type of the file between converter and llama-quantize; without ``dtype`` one that loses nothing. A copy
    is no quantization: it keeps what the source's own type is."""
    if options.dtype is None and options.type is not None and options.type.lower() != COPY:
        return common_type(tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2)
    middle = out_type(checkpoint, options.dtype)
    if middle.upper() not in FLOATS:
        raise UsageError(
            "gguf.dtype-and-type", f"{options.type} cannot be made from {middle}", hint="leave out --dtype"
        )
    return middle


def _narrowed(tensor: LazyTensor, middle: str) -> LazyTensor:
    dtype = FLOATS[middle.upper()]
    if len(tensor.shape) < 2 or tensor.dtype == dtype:
        return tensor
    return MappedRows(tensor, lambda rows: cast(rows, dtype), dtype)


FORMAT = GGUF()
