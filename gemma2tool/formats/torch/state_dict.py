"""Folders with one torch file of a flat state dict beside a Hugging Face config.json: the form of torchtune and
litgpt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.containers.torch_zip.layout import TorchZipLayout
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output, OutputFile, OutputTensor, Placement, opening
from gemma2tool.formats.mapping.container_tensors import open_torch
from gemma2tool.formats.mapping.float_layout import TensorPlan, drop_equal_head, plan_floats
from gemma2tool.formats.mapping.transforms import TableRow, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.storage.paths import path_within_folder

CONFIG = "config.json"
ZIP_MAGIC = b"PK\x03\x04"


class StateDictFolder(Format):
    """A torch file, or the folder that holds it.

    ``file``: the name of the file that is written. ``pattern``: of other names that are read. ``table``: the tensors
    that are written. ``legacy``: rows of older files. ``telltale``: a tensor that only this format has.
    ``containers``: keys under which the format's own trainers save the state dict.
    """

    file: ClassVar[str]
    pattern: ClassVar[str]
    table: ClassVar[tuple[TableRow, ...]]
    legacy: ClassVar[tuple[TableRow, ...]] = ()
    telltale: ClassVar[str]
    containers: ClassVar[tuple[str, ...]] = ()

    def detect(self, path: Path) -> bool:
        try:
            weights = self._weights(path)
            if weights is None:
                return False
            with weights.open("rb") as file:
                if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                    return False
            return self.telltale in self._state_dict(weights)
        except (InputRefused, OSError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        weights = self._weights(path) or path
        files = [weights if weights == path else path_within_folder(weights)]
        if config is None:
            files.append(self._config_file(weights))
            config = assets.read_config(path_within_folder(files[-1]))
        with opening() as closers:
            tensors = to_canonical(
                (*self.table, *self.legacy), open_torch(self._state_dict(weights), weights, closers), config
            )
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                drop_equal_head(tensors, config),
                assets.folder_assets(weights.parent),
                files=tuple(files),
                closers=closers,
            )
            checkpoint.check()
        return checkpoint

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        if Path(options.name).suffix in (".pt", ".pth"):
            raise UsageError(
                "output.kind",
                f"{options.name}: {self.name} is written as a folder, because a state dict holds no config",
                hint=f"name a folder; the weights will be its {self.file}",
            )
        plans = self.plan(checkpoint, options)
        parts = {plan.disk: plan.encoder.parts(plan.source.shape)[0] for plan in plans}
        zipped = TorchZipLayout({name: (part.dtype, part.shape) for name, part in parts.items()})
        tensors = []
        for plan in plans:
            place = Placement(plan.disk, self.file, zipped.offsets[(plan.disk,)], parts[plan.disk].nbytes)
            tensors.append(OutputTensor(plan.disk, plan.canonical, plan.source, plan.encoder, {"": place}))

        def finish(crcs: Mapping[str, int]) -> Sequence[tuple[int, bytes]]:
            return zipped.finish({(name,): crc for name, crc in crcs.items()})

        small_files = {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
        small_files |= {CONFIG: assets.dump_json(checkpoint.config.to_hf())} | self.more_files(checkpoint.config)
        weights = OutputFile(self.file, zipped.total_size, (), finish)
        return Output(self.name, False, [weights], tensors, small_files)

    def plan(self, checkpoint: Checkpoint, options: WriteOptions) -> list[TensorPlan]:
        """The tensors to write, in the order of the file."""
        return plan_floats(self.table, checkpoint, options, self.name)

    def more_files(self, config: Gemma2Config) -> dict[str, bytes]:
        """Small files of the format's own, by name."""
        return {}

    def _weights(self, path: Path) -> Path | None:
        """The weights: ``path`` itself, or the only file of a folder that has one of the format's names."""
        if path.is_file():
            return path
        for pattern in (self.file, self.pattern):
            matches = list(path.glob(pattern)) if path.is_dir() else []
            if len(matches) == 1 and matches[0].is_file():
                return matches[0]
        return None

    def _state_dict(self, weights: Path) -> Mapping[str, Any]:
        """The state dict of a file: under the first of ``containers`` that it has, otherwise the whole tree."""
        tree = torch_zip.read_index(weights)
        for name in self.containers:
            if isinstance(tree.get(name), Mapping):
                state: Mapping[str, Any] = tree[name]
                return state
        return tree

    @staticmethod
    def _config_file(weights: Path) -> Path:
        path = weights.parent / CONFIG
        if not path.is_file():
            raise UsageError(
                "config.needed",
                f"{weights.name}: no config.json beside the weights",
                hint="pass the model's config.json, or 2b, 9b or 27b, with --config",
            )
        return path
