"""The probe: it reaches the soft cap and the end of the window, and computes as the model does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.reference.amplify import Amplifier
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.compare import passes
from gemma2tool.verify.compare.logits import LogitOptions, compare_logits
from gemma2tool.verify.compare.passes import pass_count
from gemma2tool.verify.compare.token_ids import default_ids
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL
from tests.support.verification import BF16, arrays, block_quantized, candidate, failed, sensitive_checkpoint

IDS = default_ids(SMALL, 24)


def with_small_scores(factor: float = 0.02, **config: object) -> Checkpoint:
    """A model whose attention scores are too small for the cap to matter."""
    checkpoint = sensitive_checkpoint(BF16, dataclasses.replace(SMALL, **config))
    tensors = {
        name: ArrayTensor((tensor.load().astype(np.float32) * (factor if "q_proj" in name else 1)).astype(BF16))
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return with_small_scores()


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 30.0, 49.0])
def test_the_probe_finds_a_wrong_cap_that_the_prompts_do_not_reach(source: Checkpoint, cap: float | None) -> None:
    result = verify(source, candidate(arrays(source), attn_logit_softcapping=cap), VerifySettings(levels=("logits",)))
    assert failed(result) == {"probe"}
    both_uncapped = verify(
        *(with_small_scores(attn_logit_softcapping=None) for _ in range(2)), VerifySettings(levels=("logits",))
    )
    assert both_uncapped.passed and both_uncapped.gate("probe").metrics["amplified_to"] == 50


@pytest.mark.parametrize("changes", [
    {"sliding_window": 7}, {"rope_theta": 10001.0}, {"query_pre_attn_scalar": 31},
    {"layer_types": ("full_attention",) * 3},
])  # fmt: skip
def test_the_probe_finds_changes_of_attention(source: Checkpoint, changes: dict[str, object]) -> None:
    assert "probe" in failed(verify(source, candidate(arrays(source), **changes), VerifySettings(levels=("logits",))))


def test_amplified_scores_equal_those_of_larger_queries(source: Checkpoint) -> None:
    """Multiplying keys by the layer's gain gives the same bits as a q_proj that is larger by that factor."""
    amplifier = Amplifier(slice(0, None), 50.0)
    logits = StreamedForward(source, IDS, amplifier=amplifier).logits()
    assert sorted(amplifier.gains) == [0, 1, 2] and all(np.log2(gain) % 1 == 0 for gain in amplifier.gains.values())
    assert min(amplifier.gains.values()) > 16
    longer = {
        name: ArrayTensor(tensor.load().astype(np.float32) * np.float32(amplifier.gains[int(name.split(".")[2])]))
        if "q_proj" in name
        else tensor
        for name, tensor in source.tensors.items()
    }
    expected = StreamedForward(dataclasses.replace(source, tensors=longer), IDS).logits()
    assert np.array_equal(logits, expected)
    plain = StreamedForward(source, IDS).logits()
    assert np.abs(logits - plain).max() > 0.1


def test_scores_reach_the_cap(source: Checkpoint) -> None:
    """The amplified RMS is within a factor sqrt(2) of the target, for scores before the rotary embedding."""
    amplifier = Amplifier(slice(0, None), 50.0)
    StreamedForward(source, IDS, amplifier=amplifier).logits()
    x = StreamedForward(source, IDS).embeddings()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SMALL.rms_norm_eps)
    x = x * (1 + torch.from_numpy(source.tensors["model.layers.0.input_layernorm.weight"].load().astype(np.float32)))
    q, k = (
        (x @ torch.from_numpy(source.tensors[f"model.layers.0.self_attn.{name}.weight"].load().astype(np.float32)).T)
        .unflatten(-1, (-1, SMALL.head_dim))
        .transpose(1, 2)
        for name in ("q_proj", "k_proj")
    )
    scores = (
        q @ k.repeat_interleave(SMALL.num_key_value_groups, 1).transpose(2, 3) * SMALL.query_scale * amplifier.gains[0]
    )
    assert 50 / 2**0.51 < scores.pow(2).mean().sqrt().item() < 50 * 2**0.51


def test_each_row_has_its_own_window(source: Checkpoint) -> None:
    ids = np.concatenate([IDS, IDS[:, ::-1].copy()])
    together = StreamedForward(source, ids, sliding_window=[3, 11]).logits()
    for row, window in enumerate((3, 11)):
        alone = StreamedForward(source, ids[row : row + 1], sliding_window=window).logits()
        assert np.abs(together[row] - alone[0]).max() < 2e-5
    assert np.abs(together[0] - StreamedForward(source, ids[:1], sliding_window=11).logits()[0]).max() > 1e-3


def test_the_probe_does_not_change_the_prompts_results(source: Checkpoint) -> None:
    other = candidate(block_quantized(arrays(source), 32, 8), stored="q4_0")
    with_probe, alone = (compare_logits(source, other, IDS, LogitOptions(probe=probe)) for probe in (True, False))
    assert with_probe.probe is not None and alone.probe is None
    assert np.allclose(with_probe.metrics.kl, alone.metrics.kl, atol=1e-6)
    assert np.allclose(with_probe.drift.relative, alone.drift.relative, rtol=1e-4)


@pytest.mark.slow
def test_text_runs_with_the_models_own_window_and_the_probe_with_a_reduced_one() -> None:
    wide = with_small_scores(sliding_window=4096, max_position_embeddings=8192)
    run = compare_logits(wide, wide, IDS, LogitOptions(text=True))
    assert run.windows == (4096, 4096) and not run.window_reduced
    assert run.probe.windows == (6, 6) and run.probe.last_position == 8191
    assert compare_logits(wide, wide, IDS).windows == (6, 6)


@pytest.mark.slow
def test_many_prompts_take_several_passes_with_the_same_result(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, SMALL.vocab_size, (5, 20))
    other = candidate(block_quantized(arrays(source), 32, 8), stored="q4_0")
    whole = compare_logits(source, other, ids)
    monkeypatch.setattr(passes, "PASS_BYTES", 4 * SMALL.intermediate_size * 40)
    assert pass_count(ids.shape, SMALL) == 3
    parts = compare_logits(source, other, ids)
    assert np.allclose(whole.metrics.kl, parts.metrics.kl, atol=1e-6) and parts.metrics.positions == 100
    assert whole.metrics.log_p.shape == parts.metrics.log_p.shape == (2, 95)
    assert np.allclose(whole.metrics.log_p, parts.metrics.log_p, atol=1e-4)
    assert parts.metrics.max_at == whole.metrics.max_at and parts.metrics.logits == whole.metrics.logits
    for name in ("relative", "source_rms", "candidate_rms", "largest"):
        assert np.allclose(getattr(whole.drift, name), getattr(parts.drift, name), rtol=1e-4)


@pytest.mark.slow
def test_the_probe_of_a_long_prompt_is_short(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PROBE_SHARED_TOKENS", 16)
    assert pass_count(IDS.shape, SMALL) == 2 and pass_count(IDS.shape, SMALL, probe=False) == 1
    run = compare_logits(source, source, IDS)
    assert run.probe.metrics.positions == 24 and run.metrics.positions == 24
    result = verify(
        source, candidate(arrays(source), attn_logit_softcapping=None), VerifySettings(ids=IDS, levels=("logits",))
    )
    assert failed(result) == {"probe"}


def test_measurements_for_reports(source: Checkpoint) -> None:
    other = candidate(block_quantized(arrays(source), 32, 8), stored="q4_0")
    result = verify(source, other, VerifySettings(ids=IDS))
    measured = result.measurements
    layers = SMALL.num_hidden_layers
    assert (
        len(measured.drift.relative)
        == layers + 1
        == len(measured.drift.source_rms)
        == len(measured.drift.candidate_rms)
    )
    assert measured.drift.relative[-1] > 0 and result.to_json()["drift"]["relative"][-1] > 0
    hidden = list(StreamedForward(source, IDS).hidden_states())
    assert measured.drift.source_rms == pytest.approx(
        [state.double().pow(2).mean().sqrt().item() for state in hidden], rel=1e-4
    )
    tokens = measured.tokens
    assert tokens.ids.shape == tokens.kl.shape == tokens.source_log_p.shape == IDS.shape and tokens.text
    assert tokens.kl.mean() == pytest.approx(result.gate("distribution").metrics["kl_mean"], rel=1e-5)
    assert np.isnan(tokens.candidate_log_p[:, -1]).all() and np.isfinite(tokens.candidate_log_p[:, :-1]).all()
    expected = torch.from_numpy(StreamedForward(source, IDS).logits()).double().log_softmax(-1)
    assert tokens.source_log_p[0, 4] == pytest.approx(expected[0, 4, IDS[0, 5]].item(), abs=1e-4)
    grid = measured.grid()
    assert grid[1, "q_proj"].comparison.name == "model.layers.1.self_attn.q_proj.weight"
    assert (None, "embed_tokens") in grid and (None, "norm") in grid and len(grid) == len(source.tensors)
