"""Correct files always pass: every type, from sources of every float type, with weights of every kind.

A slice of ``campaigns/false_alarms.py``, which tries all combinations: here each type is tried with a few of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.false_alarms import DTYPES, RANGES, source, target_name, targets, verified

pytestmark = pytest.mark.slow

TARGETS = list(targets())
KINDS = [(ranges, dtype) for ranges in RANGES for dtype in DTYPES]
# What raised an alarm once, or comes nearest to a limit.
NEAR = [("tiny", "f16"), ("tiny", "f32"), ("small", "f16"), ("rows apart", "bf16"), ("Student's t", "bf16")]


@pytest.fixture(scope="module")
def sources() -> dict[tuple[str, str], object]:
    return {}


def check(sources: dict, kind: tuple[str, str], index: int, tmp_path: Path, levels: tuple[str, ...]) -> bool:
    if kind not in sources:
        sources[kind] = source(*kind)
    to, options = TARGETS[index]
    result = verified(sources[kind], to, options, tmp_path, levels)
    if isinstance(result, str):
        assert result.startswith(("imatrix.needed", "option.dtype")), f"{target_name(to, options)}: {result}"
        return False
    assert result.passed, (target_name(to, options), kind, [gate.summary for gate in result.gates if gate.failed])
    return True


@pytest.mark.parametrize("index", range(len(TARGETS)), ids=lambda index: target_name(*TARGETS[index]))
def test_tensors_of_every_type(sources: dict, index: int, tmp_path: Path) -> None:
    kinds = [KINDS[(7 * index) % len(KINDS)]] + (NEAR if TARGETS[index][0] != "gguf" else [])
    for kind in kinds:
        if TARGETS[index][1].get("type") == "nvfp4a16" and (kind[1] == "f16" or kind[0] == "rows apart"):
            continue  # its scale of small matrices overflows float16, and one scale is not enough for rows far apart
        check(sources, kind, index, tmp_path, ("completeness", "config", "tensors"))


@pytest.mark.parametrize("index", range(1, len(TARGETS), 5), ids=lambda index: target_name(*TARGETS[index]))
def test_forward_passes_of_untrained_weights(sources: dict, index: int, tmp_path: Path) -> None:
    check(sources, ("as drawn", "bf16"), index, tmp_path, ("tensors", "logits"))
