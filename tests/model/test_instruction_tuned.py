"""Archives of weights alone do not say whether the model is instruction-tuned: the name is asked, the embedding, and an
option.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.gemma_cpp import config as gemma_cpp
from gemma2tool.model import config as config_module
from gemma2tool.model.config import SIZES
from gemma2tool.model.instruction_tuned import guessed, turn_marks_trained
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.pipeline.inputs import resolve_config
from tests.support.formats import write_as
from tests.support.paths import TINY


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
    config = guessed(SIZES["2b"], Path("/data") / path, None)
    assert config.eos_token_id == (1, 107)
    (warning,) = [text for text in config.warnings if "instruction-tuned" in text]
    assert "because of the name" in warning and "--config 2b" in warning


@pytest.mark.parametrize(
    "path", ["gemma-2-2b/model.ckpt", "model.ckpt", "it/model.ckpt", "gemma-2-2b-italian/1/x.ckpt"]
)
def test_without_such_a_name_it_is_taken_as_pretrained_and_that_is_said(path: str) -> None:
    config = guessed(SIZES["2b"], Path("/data") / path, None)
    assert config.eos_token_id == 1
    (warning,) = [text for text in config.warnings if "instruction-tuned" in text]
    assert "taken as pretrained" in warning and "--config 2b-it" in warning


def _embedding(*, trained: bool, spread: float = 0.01) -> ArrayTensor:
    """Rows as training leaves them: those of tokens that no text has are alike."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((200, 64))
    unused = [*range(7, 106), *(() if trained else (106, 107))]
    rows[unused] = random.standard_normal(64) + spread * random.standard_normal((len(unused), 64))
    return ArrayTensor(rows.astype(np.float32))


@pytest.mark.parametrize("spread", [0, 0.01, 0.05])
def test_the_rows_of_the_turn_marks_tell(spread: float) -> None:
    """Google's releases: pretraining leaves them among those of the unused tokens (magikarp's report on gemma-7b)."""
    path = Path("/data/model.ckpt")
    tuned = guessed(SIZES["2b"], path, _embedding(trained=True, spread=spread))
    pretrained = guessed(SIZES["2b"], path, _embedding(trained=False, spread=spread))
    assert (tuned.eos_token_id, pretrained.eos_token_id) == ((1, 107), 1)
    (warning,) = (text for text in tuned.warnings if "instruction-tuned" in text)
    assert "are trained, those of the unused tokens are not" in warning and "--config 2b" in warning
    (warning,) = (text for text in pretrained.warnings if "as pretrained" in text)
    assert "are like those of the unused tokens" in warning and "--config 2b-it" in warning


def test_a_name_that_the_rows_contradict_is_believed_and_that_is_said() -> None:
    config = guessed(SIZES["2b"], Path("/data/gemma-2-2b-it/model.ckpt"), _embedding(trained=False))
    assert config.eos_token_id == (1, 107)
    assert any("although the embedding's rows" in text for text in config.warnings)


def test_rows_that_tell_nothing() -> None:
    random = np.random.default_rng(1).standard_normal((200, 64)).astype(np.float32)
    half = _embedding(trained=True).load()
    half[106] = half[8]  # one of the two marks
    for rows in (random[:107], np.full_like(random, np.nan), half):
        assert turn_marks_trained(ArrayTensor(rows)) is None


@pytest.mark.slow
def test_the_trained_fixture_and_its_formats(tmp_path: Path) -> None:
    """Its questions and answers are in turns."""
    with registry.open_checkpoint(TINY / "model.ckpt") as fixture:
        embedding = fixture.tensors["model.embed_tokens.weight"]
        assert turn_marks_trained(embedding)
        (write_as("keras", fixture, tmp_path / "x") / "hf_config.json").unlink()
    preset = registry.open_checkpoint(tmp_path / "x")
    assert preset.config.eos_token_id == (1, 107)
    assert any("1 and 107 are assumed, because" in text for text in preset.config.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-pytorch", "flax", "maxtext"])
def test_every_format_of_weights_alone_asks_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with registry.open_checkpoint(TINY / "model.ckpt") as fixture:
        released = replace(fixture.config, eos_token_id=1)
        monkeypatch.setattr(config_module, "SIZES", {"2b": released})
        path = tmp_path / "x"
        if name == "gemma-pytorch":
            path.mkdir()
            shutil.copy(TINY / "model.ckpt", path)
        else:
            (write_as(name, fixture, path) / "config.json").unlink()
    config = registry.open_checkpoint(path).config
    assert config.eos_token_id == (1, 107)
    assert any("instruction-tuned (stops at 1 and 107) because the embedding" in text for text in config.warnings)


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
