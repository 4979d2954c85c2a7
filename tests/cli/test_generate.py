"""``gemma2tool generate``: the same tokens as transformers, in the chat template, from any format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.pipeline.prompt import PromptTokenizer
from tests.support.assets import file_assets

PROMPT = "What does os.path.join do?"


def run(*words: object) -> dict:
    result = CliRunner().invoke(app, ["generate", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def gguf(fixture_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "f32.gguf"
    words = ["convert", fixture_dir, path, "--dtype", "f32", "--no-verify", "--quiet"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return path


@pytest.mark.slow
def test_same_tokens_as_transformers_in_the_chat_template(fixture_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    out = tmp_path / "hf"
    words = ["convert", fixture_dir, out, "--no-verify", "--quiet"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    model = Gemma2ForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    result = run(out, "--prompt", PROMPT, "-n", 24)
    assert result["prompt_tokens"] == ids
    assert result["tokens"] == expected


@pytest.mark.slow
def test_every_format_says_the_same(fixture_dir: Path, gguf: Path) -> None:
    answers = [run(path, "--prompt", PROMPT, "-n", 12) for path in (fixture_dir / "model.ckpt", gguf)]
    assert answers[0] == answers[1]
    streamed = run(gguf, "--prompt", PROMPT, "-n", 12, "--stream-weights")
    assert streamed["tokens"] == answers[0]["tokens"]


@pytest.mark.slow
def test_raw_prompts_and_seeds(fixture_dir: Path) -> None:
    words = [fixture_dir, "--prompt", "def main(", "--raw", "-n", 10, "--temperature", 1.0, "--top-k", 20]
    first, again, other = (run(*words, "--seed", seed) for seed in (1, 1, 2))
    assert first == again and first["tokens"] != other["tokens"]
    assert 106 not in first["prompt_tokens"] and first["prompt_tokens"][0] == 2


def test_a_hostile_template_stays_in_its_sandbox(fixture_dir: Path) -> None:
    with registry.open_checkpoint(fixture_dir) as checkpoint:
        model = checkpoint.assets["tokenizer.model"]
        template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        config = json.dumps({"chat_template": template}).encode()
        checkpoint.assets = file_assets({"tokenizer.model": model, "tokenizer_config.json": config})
        with pytest.raises(InputRefused, match="template"):
            PromptTokenizer(checkpoint).chat("hi")


def test_unknown_and_missing_devices(fixture_dir: Path, tmp_path: Path) -> None:
    import numpy as np
    import torch

    np.save(tmp_path / "ids.npy", np.arange(3, 9))
    words = ["logits", fixture_dir, "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "l.npy", "--device"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "abacus")])
    assert result.exit_code == 2 and "option.device" in result.stderr
    result = CliRunner().invoke(app, [str(word) for word in (*words, "cuda")])
    assert result.exit_code == (0 if torch.cuda.is_available() else 4)
    assert (tmp_path / "l.npy").exists() == torch.cuda.is_available()


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no GPU")
def test_cuda_gives_the_logits_of_the_cpu(fixture_dir: Path, tmp_path: Path) -> None:
    import numpy as np

    from gemma2tool.reference.streaming import logits

    with registry.open_checkpoint(fixture_dir) as checkpoint:
        ids = np.load(fixture_dir / "heldout.npy")[:1, :100]
        on_cpu, on_cuda = logits(checkpoint, ids), logits(checkpoint, ids, device="cuda")
    assert np.abs(on_cpu - on_cuda).max() < 1e-3
