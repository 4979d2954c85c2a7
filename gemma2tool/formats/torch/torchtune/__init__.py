"""torchtune's native state dict, as torchtune's code after release 0.6.1 names the norms."""

from __future__ import annotations

from gemma2tool.formats.torch.tune_facts import FILE, assumptions
from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "torchtune",
    files=f"a folder with {FILE}",
    remarks="torchtune's own state dict, from which every release computes Gemma 2",
    weight_names=(FILE,),
    ties_head=True,
    assumptions=assumptions,
)
