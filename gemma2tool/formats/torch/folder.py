"""Folders with one torch file of a flat state dict beside a Hugging Face config.json: what torchtune and litgpt keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Output, OutputFile, OutputTensor, Placement, WriteOptions
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float_layout import Planned
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.storage.paths import path_within_folder

CONFIG = "config.json"


def find(path: Path, patterns: Sequence[str]) -> Path | None:
    """The weights: ``path`` itself, or the only file of a folder that matches one of the patterns."""
    if path.is_file():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern)) if path.is_dir() else []
        if len(found) == 1 and found[0].is_file():
            return found[0]
    return None


def holds(path: Path | None, key: str, containers: Sequence[str] = ()) -> bool:
    """Whether a torch file's state dict, at its top or under one of ``containers``, has ``key``. Never raises."""
    try:
        if path is None:
            return False
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
        return key in state_dict(torch_zip.read_index(path), containers)
    except (InputRefused, OSError):
        return False


def state_dict(tree: Mapping[str, object], containers: Sequence[str]) -> Mapping[str, object]:
    """The state dict of a saved tree: under the first of ``containers`` that is there, else the tree."""
    for name in containers:
        if isinstance(tree.get(name), Mapping):
            return tree[name]
    return tree


def open_folder(
    path: Path, weights: Path, facts: FormatFacts, config: Gemma2Config | None, containers: Sequence[str] = ()
) -> tuple[Checkpoint, dict]:
    """A checkpoint with its config, assets and files, and the tensors as the file names them, still to be made canonical."""
    folder = weights.parent
    files = [weights if weights == path else path_within_folder(weights)]
    if config is None:
        config_path = folder / CONFIG
        if not config_path.is_file():
            raise UsageError(
                "config.needed",
                f"{weights.name}: no config.json beside the weights",
                hint="pass the model's config.json, or 2b, 9b or 27b, with --config",
            )
        config = assets.read_config(path_within_folder(config_path))
        files.append(config_path)
    checkpoint = Checkpoint(path, facts, config, {}, assets.folder_assets(folder), files=tuple(files))
    state = state_dict(torch_zip.read_index(weights), containers)
    return checkpoint, container_tensors.open_torch(state, weights, checkpoint.closers)


def layout(
    checkpoint: Checkpoint,
    planned: Sequence[Planned],
    file: str,
    name: str,
    options: WriteOptions,
    more: Mapping[str, bytes],
) -> Output:
    """A folder with the torch file, config.json, the source's assets and ``more`` small files."""
    if Path(options.name).suffix in (".pt", ".pth"):
        raise UsageError(
            "output.kind",
            f"{options.name}: {name} is written as a folder, because a state dict holds no config",
            hint=f"name a folder; the weights will be its {file}",
        )
    specs = {item.disk: (item.encoder.parts(item.source.shape)[0].dtype, item.source.shape) for item in planned}
    zipped = torch_zip.TorchZipLayout(specs)
    tensors = []
    for item in planned:
        part = item.encoder.parts(item.source.shape)[0]
        place = Placement(item.disk, file, zipped.offsets[(item.disk,)], part.nbytes)
        tensors.append(OutputTensor(item.disk, item.canonical, item.source, item.encoder, {"": place}))
    output_file = OutputFile(
        file, zipped.total_size, (), lambda crcs: zipped.finish({(name,): crc for name, crc in crcs.items()})
    )
    small = {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
    small[CONFIG] = assets.dump_json(checkpoint.config.to_hf())
    return Output(name, False, [output_file], tensors, small | dict(more))
