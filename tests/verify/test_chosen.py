"""What a user chose is reported as chosen: differences that an option asked for, limits tighter than the usual ones,
gates that contradict each other; and arguments in each other's place (llama.cpp PR 7627).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.pipeline.chosen import chosen_differences
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.verification import ResolvedChecks, verify_output
from gemma2tool.verify.gates import Gates, parse_gates
from gemma2tool.verify.result import Verification
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(random_checkpoint(BF16), tmp_path_factory.mktemp("s") / "src")


def converted(tmp_path: Path, changes: dict, options: WriteOptions, name: str = "out.gguf") -> Verification:
    """A random model whose config has ``changes``, written with ``options`` and verified as a conversion does."""
    checkpoint = random_checkpoint(BF16)
    checkpoint.config = dataclasses.replace(checkpoint.config, **changes)
    if changes.get("tie_word_embeddings") is False:
        checkpoint.tensors["lm_head.weight"] = random_checkpoint(BF16, seed=5).tensors["model.embed_tokens.weight"]
    save(checkpoint, tmp_path / name, options)
    with registry.open_checkpoint(tmp_path / name) as candidate:
        return verify_output(checkpoint, candidate, ResolvedChecks(), threads=1, progress=None, options=options)


MISMATCHES = {
    "query scale": {"query_pre_attn_scalar": 24},
    "caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "activation": {"hidden_activation": "silu"},
    "rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "head": {"tie_word_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", MISMATCHES.values(), ids=MISMATCHES)
def test_an_allowed_mismatch_is_reported(tmp_path: Path, changes: dict) -> None:
    result = converted(tmp_path, changes, WriteOptions(allow_mismatch=True, name="out.gguf"))
    assert result.passed, result.failures
    assert set(changes) <= set(result.chosen) and "but for what was chosen" in result.verdict
    warnings = [finding for finding in result.findings if finding.severity == "warning"]
    assert any("chosen with --allow-mismatch" in finding.message for finding in warnings)
    assert not result.causes and result.to_json()["chosen"] == list(result.chosen)


@pytest.mark.slow
def test_without_the_option_the_same_file_fails(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(BF16)
    checkpoint.config = dataclasses.replace(checkpoint.config, query_pre_attn_scalar=24)
    save(checkpoint, tmp_path / "out.gguf", WriteOptions(allow_mismatch=True))
    with registry.open_checkpoint(tmp_path / "out.gguf") as candidate:
        result = verify_output(checkpoint, candidate, ResolvedChecks(), threads=1, progress=None)
    assert not result.passed and result.causes[0].id == "config.query-scale" and not result.chosen


OVERRIDES = {
    "context": ("gemma2.context_length=int:16", "max_position_embeddings"),
    "window": ("gemma2.attention.sliding_window=int:3", "sliding_window"),
    "cap": ("gemma2.attn_logit_softcapping=float:40", "attn_logit_softcapping"),
    "eos": ("tokenizer.ggml.eos_token_id=int:5", "eos_token_id"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("override", "subject"), OVERRIDES.values(), ids=OVERRIDES)
def test_an_override_is_reported(tmp_path: Path, override: str, subject: str) -> None:
    result = converted(tmp_path, {}, WriteOptions(gguf=GGUFOptions(override_kv=(override,)), name="out.gguf"))
    assert result.passed, result.failures
    assert subject in result.chosen
    assert any(f"chosen with --override-kv {override.partition('=')[0]}" in item.message for item in result.findings)


def test_an_override_excuses_nothing_else(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(BF16)
    options = WriteOptions(gguf=GGUFOptions(override_kv=("gemma2.context_length=int:16",)))
    save(checkpoint, tmp_path / "out.gguf", options)
    with registry.open_checkpoint(tmp_path / "out.gguf") as candidate:
        candidate.config = dataclasses.replace(candidate.config, rms_norm_eps=1e-3)
        assert chosen_differences(options, checkpoint, candidate).subjects.keys() == {"max_position_embeddings"}
        result = verify_output(checkpoint, candidate, ResolvedChecks(), threads=1, progress=None, options=options)
    assert not result.passed and [cause.id for cause in result.causes] == ["config.eps"]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["kl=1e-12", "rmse=1e-4"])
def test_a_tighter_gate_is_not_explained_as_damage(source: Path, tmp_path: Path, gate: str) -> None:
    words = ("quantize", source, tmp_path / "out.gguf", "--type", "q4_0", "--gate", gate)
    result = run(*words, "--json")
    assert result.exit_code == 1, result.output
    verification = json.loads(result.stdout)["verification"]
    assert verification["causes"] == []
    text = run(*words).stdout
    assert "was chosen with --gate" in text and "FAILED: beyond a limit that --gate sets" in text


@pytest.mark.slow
def test_damage_is_explained_whatever_the_gates(source: Path, tmp_path: Path) -> None:
    assert run("convert", source, tmp_path / "out.gguf", "--dtype", "f32", "--quiet").exit_code == 0
    with registry.open_checkpoint(source) as a, registry.open_checkpoint(tmp_path / "out.gguf") as b:
        b.tensors["model.layers.0.mlp.up_proj.weight"] = b.tensors["model.layers.0.mlp.gate_proj.weight"]
        result = verify_output(a, b, ResolvedChecks(gates={"kl": 1e-12}), threads=1, progress=None)
    assert not result.beyond_chosen_limits and result.causes


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (["kl=0.1", "kl=0.2"], "two limits"),
        (["kl=0.1", "kl-max=0.05"], "no effect"),
        (["kl-p99=1", "kl-max=0.5"], "no effect"),
        (["top1=1.5"], "more than all"),
    ],
)
def test_gates_that_contradict_each_other(gates: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        parse_gates(gates)
    assert refused.value.id == "gate.contradiction"


def test_gates_that_do_not_contradict_each_other() -> None:
    assert parse_gates(["kl=0.1", "kl-p99=0.05", "kl-max=0.2", "top1=1"])["kl"] == 0.1
    with pytest.raises(UsageError):
        Gates().overridden({"kl": 1.0, "kl-max": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "type"), [(("--dtype", "q8_0"), "q8_0"), (("--dtype", "f16"), "f16")], ids=["quantized", "rounded"]
)
def test_swapped_arguments_are_named(tmp_path: Path, words: tuple[str, ...], type: str) -> None:
    original = write_checkpoint(random_checkpoint(np.dtype(np.float32)), tmp_path / "src")
    assert run("convert", original, tmp_path / "out.gguf", *words, "--quiet").exit_code == 0
    assert run("verify", tmp_path / "out.gguf", "--reference", original, "--quiet").exit_code == 0
    result = run("verify", original, "--reference", tmp_path / "out.gguf", "--json")
    assert result.exit_code == 1
    (cause,) = json.loads(result.stdout)["causes"]
    assert cause["id"] == "arguments.swapped" and "verify out.gguf --reference src" in cause["message"]
    assert type in cause["message"]
