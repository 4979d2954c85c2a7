"""``--sample``: source and candidate continue the same prompt."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool.cli.terminal import Console
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.reference.generate import generate
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.verify.compare.measurements import Sample
from gemma2tool.verify.compare.sample import PROMPT_TOKENS
from gemma2tool.verify.compare.token_ids import default_ids
from gemma2tool.verify.reports.terminal import render_verification
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.commands import assert_refused, run
from tests.support.verification import arrays, candidate, sensitive_checkpoint


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return sensitive_checkpoint()


def shown(text: StringIO) -> list[str]:
    return text.getvalue().splitlines()


def test_both_sides_write_what_the_model_writes(source: Checkpoint) -> None:
    result = verify(source, candidate(arrays(source)), VerifySettings(sample=5))
    assert result.measurements is not None and (sample := result.measurements.sample) is not None
    prompt = default_ids(source.config)[:, :PROMPT_TOKENS]
    tokens = generate(Gemma2ForCausalLM.from_checkpoint(source), torch.from_numpy(prompt), max_new_tokens=5)
    assert sample.source == sample.candidate == tuple(f"<{int(token)}>" for token in tokens)
    assert sample.prompt == tuple(f"<{token}>" for token in prompt[0])
    out = StringIO()
    render_verification(result, Console(stdout=out))
    assert "sample: both continue the prompt with the same 5 tokens" in shown(out)
    assert verify(source, candidate(arrays(source))).measurements.sample is None  # type: ignore[union-attr]


def test_a_difference_is_counted_from_its_first_token(source: Checkpoint) -> None:
    changed = {name: np.flip(array, 0).copy() if "embed" in name else array for name, array in arrays(source).items()}
    result = verify(source, candidate(changed), VerifySettings(sample=3))
    assert result.measurements is not None and (sample := result.measurements.sample) is not None
    assert sample.source != sample.candidate
    assert sample.sentence().startswith("the continuations differ from ")


@pytest.mark.parametrize(("a", "b", "common"), [("abc", "abc", 3), ("abc", "abd", 2), ("abc", "ab", 2), ("x", "y", 0)])
def test_tokens_in_common(a: str, b: str, common: int) -> None:
    assert Sample((), tuple(a), tuple(b)).common == common


@pytest.mark.parametrize("words", [("--sample", 4), ("--engine", "llama.cpp", "--sample", 4)])
def test_a_sample_needs_the_source(tmp_path: Path, words: tuple[object, ...]) -> None:
    assert_refused(run("verify", tmp_path / "a.gguf", *words), 2, "option.ignored")
