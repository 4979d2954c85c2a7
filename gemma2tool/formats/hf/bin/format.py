"""Hugging Face's format from before safetensors: config.json and ``pytorch_model.bin``, one file or shards with an
index.

A file is what torch.save writes for a flat state dict; names and layout are the canonical ones. transformers saved it
with ``safe_serialization=False`` up to release 4, and still loads it. What training code saves beside a config
(``pytorch_model_fsdp.bin``, a ``.ckpt`` of Lightning, ``{"module": state dict}`` of DeepSpeed) is read, too, and so is
hqq's ``qmodel.pt``.
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
from gemma2tool.formats.hf.bin.hqq_model import descriptions, is_hqq_model, stored_tensors
from gemma2tool.formats.hf.tokenizer import transformers_tokenizer_files
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_dtypes import stored_dtypes
from gemma2tool.formats.mapping.float_layout import refuse_type
from gemma2tool.formats.mapping.wrappers import HUGGING_FACE, Root, find_state, has_state, torch_files
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.safetensors_output import config_content, disk_names, group_by_size, natural_key, other_assets
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import path_within_folder

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
FUSED = Root("embedder.weight")
"""The embedding of gemma_pytorch, whose shards have the same file names."""


class HuggingFaceBin(Format):
    """A folder with config.json and torch shards of Hugging Face's names, without safetensors beside them."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        """As transformers does, safetensors of their usual names are preferred to torch files."""
        if path.is_file():
            return _has_own_names(path)
        if not path.is_dir() or any((path / name).is_file() for name in SAFETENSORS):
            return False
        if any((path / name).is_file() for name in (INDEX, SINGLE)):
            return not _has_fused_names(path)
        lone = _lone_file(path)
        return lone is not None and next(path.glob("*.safetensors"), None) is None and _has_own_names(lone)

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        remarks: list[str] = []
        checkpoint = open_folder(path, FolderFormat(FACTS, _weight_files, partial(_read, remarks)), config)
        checkpoint.warnings[:0] = remarks
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        refuse_type(options, self.name)
        dtypes = stored_dtypes(checkpoint, options)
        canonical = {disk: name for name, disk in disk_names(checkpoint).items()}
        names = sorted(canonical, key=natural_key)
        encoders = {name: Float(dtypes[canonical[name]]) for name in names}
        sources = {name: checkpoint.tensors[canonical[name]] for name in names}
        parts = {name: encoders[name].parts(sources[name].shape)[0] for name in names}
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
                tensors.append(OutputTensor(name, (canonical[name],), sources[name], encoders[name], {"": place}))
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


def _weight_files(path: Path) -> WeightFiles:
    if path.is_file():
        return WeightFiles([path])
    if (path / INDEX).is_file():
        return WeightFiles.from_index(path / INDEX)
    single = path / SINGLE
    return WeightFiles([path_within_folder(single if single.is_file() else _lone_file(path) or single)])


def _lone_file(folder: Path) -> Path | None:
    """The only file of a folder that torch.save may have written weights to; it may have any name."""
    files = torch_files(folder)
    return files[0] if len(files) == 1 else None


def _read(remarks: list[str], files: Sequence[Path], closers: Closers) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tree = torch_zip.read_index(file)
        if is_hqq_model(tree):
            state, more = stored_tensors(tree), list[str]()
            container_tensors.merge(tensors, descriptions(tree, file.name), file)
        else:
            state, more = find_state(tree, HUGGING_FACE, file.name)
        remarks += more
        container_tensors.merge(tensors, container_tensors.open_torch(state, file, closers), file)
    return tensors, {}


def _has_own_names(file: Path) -> bool:
    try:
        tree = torch_zip.read_index(file)
        return has_state(tree, HUGGING_FACE) or is_hqq_model(tree)
    except (InputRefused, OSError):
        return False


def _has_fused_names(folder: Path) -> bool:
    """Whether the tensors have gemma_pytorch's fused names rather than Hugging Face's."""
    try:
        index = folder / INDEX
        if index.is_file():
            return any(".qkv_proj." in name for name in container_tensors.indexed_files(index)[1])
        return has_state(torch_zip.read_index(folder / SINGLE), FUSED)
    except (InputRefused, OSError):
        return False


FORMAT = HuggingFaceBin()
