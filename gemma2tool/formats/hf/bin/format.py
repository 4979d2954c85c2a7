"""Hugging Face's format from before safetensors: config.json and ``pytorch_model.bin``, one file or shards with an
index.

A file is what torch.save writes for a flat state dict; names and layout are the canonical ones. transformers saved it
with ``safe_serialization=False`` up to release 4, and still loads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.base import Closers, Format, Output, OutputFile, OutputTensor, Placement
from gemma2tool.formats.config_folder import CONFIG, FolderFormat, WeightFiles, open_folder
from gemma2tool.formats.consumers import sentences
from gemma2tool.formats.hf.bin import FACTS
from gemma2tool.formats.hf.tokenizer import transformers_tokenizer_files
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import stored_dtypes
from gemma2tool.formats.mapping.float_layout import refuse_type
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.safetensors_output import config_content, group_by_size, natural_key, other_assets
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import path_within_folder

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


class HuggingFaceBin(Format):
    """A folder with config.json and torch shards of Hugging Face's names, without safetensors beside them."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        if not path.is_dir() or not any((path / name).is_file() for name in (INDEX, SINGLE)):
            return False
        return next(path.glob("*.safetensors"), None) is None and not _has_fused_names(path)

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        return open_folder(path, FolderFormat(FACTS, _weight_files, _read), config)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        refuse_type(options, self.name)
        dtypes = stored_dtypes(checkpoint, options)
        names = sorted(checkpoint.specs, key=natural_key)
        encoders = {name: Float(dtypes[name]) for name in names}
        parts = {name: encoders[name].parts(checkpoint.tensors[name].shape)[0] for name in names}
        groups = group_by_size([(name, parts[name].nbytes) for name in names], options.max_shard_size)
        files: list[OutputFile] = []
        tensors: list[OutputTensor] = []
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            file = SINGLE if len(groups) == 1 else f"pytorch_model-{number:05d}-of-{len(groups):05d}.bin"
            zipped = torch_zip.TorchZipLayout(
                OrderedDict((name, (parts[name].dtype, parts[name].shape)) for name in group)
            )
            files.append(OutputFile(file, zipped.total_size, (), partial(_finish, zipped)))
            for name in group:
                place = Placement(name, file, zipped.offsets[(name,)], parts[name].nbytes)
                tensors.append(OutputTensor(name, (name,), checkpoint.tensors[name], encoders[name], {"": place}))
                weight_map[name] = file
        warnings = sentences(FACTS.assumptions(checkpoint.config))
        tokenizer_files, remarks = transformers_tokenizer_files(checkpoint)
        small_files = other_assets(checkpoint) | tokenizer_files
        small_files[CONFIG] = assets.dump_json(config_content(checkpoint, dtypes))
        if len(groups) > 1:
            total = {"total_size": sum(part.nbytes for part in parts.values())}
            small_files[INDEX] = assets.dump_json({"metadata": total, "weight_map": weight_map})
        return Output(self.name, False, files, tensors, small_files, warnings=[*warnings, *remarks])


def _finish(zipped: torch_zip.TorchZipLayout, checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:
    return zipped.finish({(name,): checksum for name, checksum in checksums.items()})


def _weight_files(folder: Path) -> WeightFiles:
    index = folder / INDEX
    return WeightFiles.from_index(index) if index.is_file() else WeightFiles([path_within_folder(folder / SINGLE)])


def _read(files: Sequence[Path], closers: Closers) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        container_tensors.merge(tensors, container_tensors.open_torch(torch_zip.read_index(file), file, closers), file)
    return tensors, {}


def _has_fused_names(folder: Path) -> bool:
    """Whether the tensors have gemma_pytorch's fused names rather than Hugging Face's."""
    try:
        index = folder / INDEX
        if index.is_file():
            return any(".qkv_proj." in name for name in container_tensors.indexed_files(index)[1])
        return any(".qkv_proj." in name for name in torch_zip.read_index(folder / SINGLE))
    except InputRefused:
        return False


FORMAT = HuggingFaceBin()
