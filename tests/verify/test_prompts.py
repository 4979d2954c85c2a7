"""The prompts that a verification runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.conversion import save
from gemma2tool.verify.prompts import BUILT_IN, BUILT_IN_TOKENS, built_in_prompt, prompt_for, text_prompts
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL
from tests.support.verification import sensitive_checkpoint
from tests.verify.compare.test_tokenizer import trained

CONFIG = dataclasses.replace(SMALL, vocab_size=330, max_position_embeddings=256)


def reader(model: bytes | None, **config: object) -> Checkpoint:
    assets = file_assets({} if model is None else {"tokenizer.model": model})
    return dataclasses.replace(sensitive_checkpoint(config=dataclasses.replace(CONFIG, **config)), assets=assets)


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


def test_the_built_in_text_has_several_kinds_of_text() -> None:
    assert (
        1500 < len(BUILT_IN) < 4000
        and "```python" in BUILT_IN
        and any(ord(character) > 0x3000 for character in BUILT_IN)
    )


def test_built_in_prompt(model: bytes) -> None:
    checkpoint = reader(model)
    ids = built_in_prompt(checkpoint.config, checkpoint)
    assert ids.shape == (1, BUILT_IN_TOKENS) and ids[0, 0] == CONFIG.bos_token_id
    short = dataclasses.replace(CONFIG, max_position_embeddings=9)
    assert built_in_prompt(short, checkpoint).shape == (1, 9)
    without = dataclasses.replace(CONFIG, bos_token_id=None)
    assert built_in_prompt(without, checkpoint).tolist()[0][:100] == ids.tolist()[0][1:101]


@pytest.mark.parametrize("broken", [None, b"", b"\x00" * 40])
def test_without_a_tokenizer_the_ids_are_random_and_not_text(broken: bytes | None) -> None:
    checkpoint = reader(broken)
    ids, text = prompt_for(checkpoint, checkpoint)
    assert ids.shape == (1, 64) and not text
    result = verify(checkpoint, checkpoint, VerifySettings(levels=("logits",)))
    assert "perplexity_ratio" not in result.gate("distribution").metrics and result.measurements.tokens.pieces is None


def test_a_tokenizer_too_large_for_the_model_is_not_used(model: bytes) -> None:
    checkpoint = reader(model, vocab_size=64)
    assert not prompt_for(checkpoint, checkpoint)[1]
    with pytest.raises(InputRefused, match="outside the vocabulary"):
        text_prompts(checkpoint, "zebra crossings 123")


def test_text_is_cut_into_rows_that_start_with_bos(model: bytes) -> None:
    checkpoint = reader(model)
    ids = text_prompts(checkpoint, "the quick brown fox " * 200)
    assert ids.shape[1] == 256 and ids.shape[0] > 1 and set(ids[:, 0]) == {CONFIG.bos_token_id}
    joined = ids[:, 1:].reshape(-1).tolist()
    expected = text_prompts(reader(model, max_position_embeddings=8192), "the quick brown fox " * 20)[0, 1:].tolist()
    assert joined[: len(expected) - 2] == expected[:-2]
    for text, kind in (("", UsageError),):
        with pytest.raises(kind):
            text_prompts(checkpoint, text)
    with pytest.raises(UsageError, match=r"no tokenizer\.model"):
        text_prompts(reader(None), "text")


def test_the_default_verification_reads_text_and_reports_its_tokens(model: bytes) -> None:
    checkpoint = reader(model)
    result = verify(checkpoint, checkpoint, VerifySettings(levels=("logits",)))
    spread = result.gate("distribution").metrics
    assert (
        spread["positions"] == BUILT_IN_TOKENS
        and spread["perplexity_ratio"] == 1
        and spread["perplexity_ratio_se"] == 0
    )
    pieces = result.measurements.tokens.pieces
    assert len(pieces) == 1 and len(pieces[0]) == BUILT_IN_TOKENS
    assert BUILT_IN.startswith("".join(pieces[0][1:20]).split("<0x")[0][:8])


@pytest.fixture(scope="module")
def folder(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "model"
    save(reader(model), path)
    return path


@pytest.mark.slow
def test_the_text_option(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\ufeffpack my box with five dozen liquor jugs. " * 60, encoding="utf-8")
    result = CliRunner().invoke(
        app, ["verify", str(folder), "--reference", str(folder), "--text", str(text), "--json", "-q"]
    )
    assert result.exit_code == 0, result.output
    gates = {gate["name"]: gate for gate in json.loads(result.stdout)["gates"]}
    assert gates["logits"]["metrics"]["shape"][1] == 256 and "perplexity_ratio" in gates["distribution"]["metrics"]


@pytest.mark.slow
def test_a_conversion_is_verified_on_the_text(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps. " * 60, encoding="utf-8")
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out.gguf"), "--text", str(text), "-v"])
    assert result.exit_code == 0, result.output
    assert "positions)" in result.output and "(128 positions)" not in result.output and "perplexity" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "more", "code"),
    [(b"\xff\xfe\x00", [], 3), (b"wo\0rds", [], 3), (b"words", ["--tokens", "x.npy"], 2), (b"", [], 2)],
)
def test_a_file_that_is_not_text_is_refused(
    folder: Path, tmp_path: Path, content: bytes, more: list[str], code: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    arguments = ["verify", str(folder), "--reference", str(folder), "--text", str(text), "-q", *more]
    assert CliRunner().invoke(app, arguments).exit_code == code


@pytest.mark.slow
def test_the_callers_ids_are_text_by_default(model: bytes) -> None:
    checkpoint = reader(model)
    ids = np.arange(2, 40)
    for text in (True, False):
        spread = (
            verify(checkpoint, checkpoint, VerifySettings(ids=ids, text=text, levels=("logits",)))
            .gate("distribution")
            .metrics
        )
        assert ("perplexity_ratio" in spread) == text
