"""torchtune's native state dict, ``tune_state_dict.pt``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.torch import tune
from gemma2tool.formats.torch.state_dict import StateDictFolder
from gemma2tool.formats.torch.torchtune import FACTS
from gemma2tool.formats.torch.tune_facts import FILE
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor


class Torchtune(StateDictFolder):
    """A torch file with torchtune's names, or a folder with one."""

    facts = FACTS
    file = FILE
    table = tune.table(norms_exchanged=False)
    root = tune.ROOT

    def table_of(
        self, stored: Mapping[str, LazyTensor], config: Gemma2Config, weights: Path
    ) -> tuple[Sequence[TableRow], list[str]]:
        exchanged = tune.norms_exchanged(stored, config)
        if exchanged is None:
            return self.table, [tune.names_remark(weights)]
        return tune.table(norms_exchanged=exchanged), [tune.exchanged_remark(weights)] if exchanged else []


FORMAT = Torchtune()
