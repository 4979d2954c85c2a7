"""torchtune's native state dict of the releases 0.5.0 to 0.6.1, which exchange the names of two norms.

A dict says nothing of the release, so the file's name does: ``tune_state_dict-0.6.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.torch import tune
from gemma2tool.formats.torch.state_dict import StateDictFolder
from gemma2tool.formats.torch.torchtune_0_6 import FACTS
from gemma2tool.formats.torch.tune_facts import FILE_0_6
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor


class Torchtune06(StateDictFolder):
    """A torch file of the releases' name, or a folder with one."""

    facts = FACTS
    file = FILE_0_6
    table = tune.table(norms_exchanged=True)
    root = tune.ROOT

    def detect(self, path: Path) -> bool:
        weights = self._weights(path)
        return weights is not None and weights.name == self.file

    def table_of(
        self, stored: Mapping[str, LazyTensor], config: Gemma2Config, weights: Path
    ) -> tuple[Sequence[TableRow], list[str]]:
        contrary = tune.norms_exchanged(stored, config) is False
        return self.table, [tune.contrary_remark(weights)] if contrary else []


FORMAT = Torchtune06()
