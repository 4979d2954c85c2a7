"""torchtune's native state dict, ``tune_state_dict.pt``."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.formats.torch import tune
from gemma2tool.formats.torch.state_dict import StateDictFolder
from gemma2tool.formats.torch.torchtune import FACTS
from gemma2tool.formats.torch.tune_facts import FILE


class Torchtune(StateDictFolder):
    """A torch file with torchtune's names, or a folder with one."""

    facts = FACTS
    file = FILE
    table = tune.table(norms_exchanged=False)
    root = tune.ROOT

    def remarks(self, weights: Path) -> list[str]:
        return [tune.names_remark(weights)]


FORMAT = Torchtune()
