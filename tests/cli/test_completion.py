"""Shell completion offers values too: formats, types, dtypes, gates, sizes of releases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gemma2tool.cli.groups import completion
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gemma2tool quantize a b --type q4_k", {"q4_k_m", "q4_k_s"}),
        ("gemma2tool quantize a b --type q8_0,nf", {"q8_0,nf4"}),
        ("gemma2tool convert a b --to gemma", {"gemma-cpp", "gemma-pytorch"}),
        ("gemma2tool convert a b --dtype b", {"bf16"}),
        ("gemma2tool verify a --gate kl", {"kl=", "kl-max=", "kl-p99="}),
        ("gemma2tool quantize a b --gptq-format gptq_", {"gptq_v2"}),
        ("gemma2tool inspect a --config 2", {"2b", "2b-it", "27b", "27b-it"}),
    ],
)
def test_values(words: str, expected: set[str]) -> None:
    count = len(words.split()) - 1
    environment = os.environ | {
        "_GEMMA2TOOL_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(count),
        "PYTHONPATH": str(ROOT),
    }
    code = "from gemma2tool.cli.main import app; app(prog_name='gemma2tool')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_after_a_comma_the_next_value_is_completed() -> None:
    assert completion(("nf4", "nf8", "q8_0"))("q8_0,n") == ["q8_0,nf4", "q8_0,nf8"]
