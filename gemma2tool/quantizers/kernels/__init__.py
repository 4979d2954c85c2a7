"""The native kernels: C++ compiled once per instruction set, chosen when the program runs.

Every instruction set gives the same bytes; the choice changes speed alone. ``GEMMA2TOOL_INSTRUCTION_SET`` overrides it
(``baseline``, ``avx2`` or ``avx512`` on x86-64; a name the machine has not is ignored).
"""

from __future__ import annotations

from gemma2tool.quantizers.kernels._native import (
    available_instruction_sets,
    current_instruction_set,
    use_instruction_set,
)

__all__ = ["available_instruction_sets", "current_instruction_set", "use_instruction_set"]
