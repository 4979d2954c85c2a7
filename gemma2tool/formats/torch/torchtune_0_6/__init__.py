"""torchtune's native state dict, as the releases 0.5.0 to 0.6.1 name the norms."""

from __future__ import annotations

from gemma2tool.formats.torch.tune_facts import FILE_0_6, assumptions
from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts(
    "torchtune-0.6",
    files=f"a folder with {FILE_0_6}",
    remarks="torchtune's own state dict as the converter of 0.5.0 to 0.6.1 names it: two norms exchanged",
    weight_names=(FILE_0_6,),
    ties_head=True,
    assumptions=assumptions,
)
