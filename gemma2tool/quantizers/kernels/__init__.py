"""The native kernels: C++ compiled once per instruction set, one of which is selected when the program runs.

Every instruction set gives the same bytes; only the speed differs. ``GEMMA2TOOL_INSTRUCTION_SET`` overrides the
selection (``baseline``, ``avx2`` or ``avx512`` on x86-64; a set that the machine does not support is ignored).
"""

from __future__ import annotations

from gemma2tool.quantizers.kernels._native import (
    available_instruction_sets,
    current_instruction_set,
    use_instruction_set,
)

__all__ = ["available_instruction_sets", "current_instruction_set", "use_instruction_set"]
