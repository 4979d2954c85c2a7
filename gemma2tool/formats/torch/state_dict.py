"""Folders with one torch file of a flat state dict beside a Hugging Face config.json: the form of torchtune and
litgpt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.containers.torch_zip.layout import TorchZipLayout
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Format, Output, OutputFile, OutputTensor, Placement, opening
from gemma2tool.formats.mapping.container_tensors import open_torch
from gemma2tool.formats.mapping.float8 import widened
from gemma2tool.formats.mapping.float_layout import TensorPlan, drop_equal_head, plan_floats
from gemma2tool.formats.mapping.transforms import TableRow, to_canonical
from gemma2tool.formats.mapping.wrappers import Root, find_state, has_state, plain_names, torch_files
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.storage.paths import path_within_folder

CONFIG = "config.json"


class StateDictFolder(Format):
    """A torch file, or the folder that holds it.

    ``file``: the name of the file that is written; a file of any name is read. ``table``: the tensors that are written.
    ``legacy``: rows of older files. ``root``: the embedding, whose name only this format has.
    """

    file: ClassVar[str]
    table: ClassVar[tuple[TableRow, ...]]
    legacy: ClassVar[tuple[TableRow, ...]] = ()
    root: ClassVar[Root]

    def detect(self, path: Path) -> bool:
        try:
            weights = self._weights(path)
            if weights is None:
                return False
            return weights.name == self.file or has_state(torch_zip.read_index(weights), self.root)
        except (InputRefused, OSError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        weights = self._weights(path) or path
        files = [weights if weights == path else path_within_folder(weights)]
        if config is None:
            files.append(self._config_file(weights))
            config = assets.read_config(path_within_folder(files[-1]))
        with opening() as closers:
            state, remarks = find_state(torch_zip.read_index(weights), self.root, weights.name)
            plain, more = plain_names(state, self.root, weights.name)
            stored, wide = widened(open_torch(plain, weights, closers), weights.name)
            rows, remarks_on_table = self.table_of(stored, config, weights)
            tensors = to_canonical(rows, stored, config)
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                drop_equal_head(tensors, config),
                assets.folder_assets(weights.parent),
                [*remarks, *more, *wide, *remarks_on_table],
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

    def table_of(
        self, stored: Mapping[str, LazyTensor], config: Gemma2Config, weights: Path
    ) -> tuple[Sequence[TableRow], list[str]]:
        """The rows that the tensors ``stored`` in the file ``weights`` are read by, and remarks for the user."""
        return (*self.table, *self.legacy), []

    def _weights(self, path: Path) -> Path | None:
        """The weights: ``path`` itself, or of a folder the file of the format's name or the only one of torch.save."""
        if path.is_file():
            return path
        if (path / self.file).is_file():
            return path / self.file
        files = torch_files(path)
        return files[0] if len(files) == 1 else None

    @staticmethod
    def _config_file(weights: Path) -> Path:
        path = weights.parent / CONFIG
        if not path.is_file():
            raise UsageError(
                "config.needed",
                f"{weights.name}: no config.json beside the weights",
                hint="pass the model's config.json, or 2b, 9b, 27b, 2b-it, 9b-it or 27b-it, with --config",
            )
        return path
