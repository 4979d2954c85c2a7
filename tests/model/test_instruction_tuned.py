"""Archives of weights alone do not say whether the model is instruction-tuned: the name is asked, and an option."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats.gemma_cpp import config as gemma_cpp
from gemma2tool.model.config import SIZES
from gemma2tool.model.instruction_tuned import guessed
from gemma2tool.pipeline.inputs import resolve_config


@pytest.mark.parametrize(
    "path",
    [
        "gemma-2-2b-it/model.ckpt",
        "gemma-2-2b-it/1/model.ckpt",
        "gemma-2/pyTorch/gemma-2-2b-it.ckpt",
        "Gemma2_9B_IT/model.ckpt",
        "gemma-2-27b-instruct/model.ckpt",
    ],
)
def test_the_name_of_an_instruction_tuned_model_is_believed_and_named(path: str) -> None:
    config = guessed(SIZES["2b"], Path("/data") / path)
    assert config.eos_token_id == (1, 107)
    (warning,) = [text for text in config.warnings if "instruction-tuned" in text]
    assert "because of the name" in warning and "--config 2b" in warning


@pytest.mark.parametrize(
    "path", ["gemma-2-2b/model.ckpt", "model.ckpt", "it/model.ckpt", "gemma-2-2b-italian/1/x.ckpt"]
)
def test_without_such_a_name_it_is_taken_as_pretrained_and_that_is_said(path: str) -> None:
    config = guessed(SIZES["2b"], Path("/data") / path)
    assert config.eos_token_id == 1
    (warning,) = [text for text in config.warnings if "instruction-tuned" in text]
    assert "taken as pretrained" in warning and "--config 2b-it" in warning


@pytest.mark.parametrize("size", SIZES)
def test_an_option_says_it(size: str) -> None:
    """And gemma.cpp is told to wrap prompts as turns."""
    tuned, pretrained = resolve_config(f"{size}-it"), resolve_config(size)
    assert tuned is not None and pretrained is not None
    assert tuned.eos_token_id == (1, 107) and pretrained.eos_token_id == 1
    assert not tuned.warnings
    read = [gemma_cpp.read(gemma_cpp.write(config, 1), Path("x.sbs"), None) for config in (tuned, pretrained)]
    assert [config.eos_token_id for config in read] == [(1, 107), 1]


def test_a_misspelt_size_is_refused_with_the_names() -> None:
    with pytest.raises(InputRefused, match="2b-itt") as refusal:
        resolve_config("2b-itt")
    assert "2b-it" in refusal.value.hint
