"""``verify``: planted faults are caught and named, correct copies pass, and the result is deterministic."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Self

import numpy as np
import pytest

from gemma2tool.errors import UsageError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import MappedRows
from gemma2tool.verify.compare.logits import reduced_windows
from gemma2tool.verify.compare.token_ids import default_ids
from gemma2tool.verify.gates import GATES, Gates, parse_gates
from gemma2tool.verify.run import LEVELS, VerifySettings, verify
from tests.support.checkpoints import SMALL
from tests.support.verification import (
    BF16,
    LAYER,
    Arrays,
    arrays,
    blamed,
    block_quantized,
    candidate,
    change,
    failed,
    sensitive_checkpoint,
)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return sensitive_checkpoint()


# -- correct copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [(BF16, "lossless"), (np.float32, "lossless"), (np.float16, "f16")])
def test_correct_copies_pass(source: Checkpoint, dtype: np.dtype, kind: str) -> None:
    converted = candidate({name: array.astype(np.float32).astype(dtype) for name, array in arrays(source).items()})
    result = verify(source, converted)
    assert result.passed and result.kind == kind, result.to_json()["gates"]
    assert result.skipped == ("tokenizer",)
    if kind == "lossless":
        assert result.gate("logits").metrics["max_abs_difference"] == 0, "equal weights, equal bits"


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)])
def test_correct_casts_of_float32_pass(dtype: np.dtype) -> None:
    wide = sensitive_checkpoint(np.dtype(np.float32))
    result = verify(wide, candidate({name: array.astype(dtype) for name, array in arrays(wide).items()}))
    assert result.passed, [gate.summary for gate in result.gates]
    assert result.kind == {BF16: "bf16"}.get(dtype, "f16")


@pytest.mark.slow
def test_norms_stored_as_one_plus_w_are_reported_and_pass() -> None:
    wide = sensitive_checkpoint(np.dtype(np.float32))
    norms = {name: tensor for name, tensor in wide.tensors.items() if "norm" in name}
    expected = {
        name: MappedRows(norm, lambda w: (w + np.float32(1)) - np.float32(1), np.float32)
        for name, norm in norms.items()
    }
    converted = candidate(arrays(wide) | {name: norm.load() for name, norm in expected.items()})
    result = verify(wide, converted, VerifySettings(expected=expected))
    assert result.passed and result.kind == "convention"
    notes = [finding for finding in result.gate("tensors").findings if finding.severity == "note"]
    assert {note.subject for note in notes} == set(norms)
    assert failed(verify(wide, converted)) >= {"tensors"}


def test_correct_quantization_passes_even_on_untrained_weights(source: Checkpoint) -> None:
    converted = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    result = verify(source, converted)
    assert result.passed and result.kind == "q8_0", [gate.summary for gate in result.gates]


@pytest.mark.slow
def test_divergence_beyond_the_limit_passes_if_noise_explains_it(source: Checkpoint) -> None:
    """Four-bit codes on random weights: beyond every limit for trained ones, but only by the effect of such noise."""
    converted = candidate(block_quantized(arrays(source), 32, 8), stored="q4_0")
    result = verify(source, converted)
    spread = result.gate("distribution")
    assert result.passed and spread.metrics["kl_mean"] > GATES["q4_0"].kl
    assert "noise_envelope" in spread.metrics and spread.findings[0].severity == "warning"
    strict = verify(source, converted, VerifySettings(gates={"kl": GATES["q4_0"].kl}))
    assert failed(strict) == {"distribution"}, "a limit named by the caller is strict"
    wrong = verify(
        source, dataclasses.replace(converted, config=dataclasses.replace(SMALL, final_logit_softcapping=None))
    )
    assert "config" in failed(wrong)


# -- planted faults ----------------------------------------------------------------------------------------------------


def swap(first: str, second: str) -> Callable[[Arrays], set[str]]:
    def plant(tensors: Arrays) -> set[str]:
        a, b = LAYER + first, LAYER + second
        tensors[a], tensors[b] = tensors[b], tensors[a]
        return {a, b}

    return plant


def interleave(rows: np.ndarray) -> np.ndarray:
    """Rotary rows from half-split to interleaved order, for heads of 32."""
    heads = rows.reshape(-1, 2, 16, rows.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(rows.shape)


def shift_layers(tensors: Arrays) -> set[str]:
    before = dict(tensors)
    for name in tensors:
        for layer in range(SMALL.num_hidden_layers):
            if f".{layer}." in name:
                tensors[name] = before[name.replace(f".{layer}.", f".{(layer + 1) % SMALL.num_hidden_layers}.")]
    return {name for name in tensors if "layers" in name}


FAULTS: dict[str, Callable[[Arrays], set[str]]] = {
    "norms + 1": change("norm.weight", lambda w: w + 1),
    "norms - 1": change("norm.weight", lambda w: w - 1),
    "norms doubled": change("norm.weight", lambda w: 2 * w),
    "one norm + 1": change(LAYER + "input_layernorm.weight", lambda w: w + 1),
    "gate and up swapped": swap("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "k and v swapped": swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "norms exchanged": swap("post_attention_layernorm.weight", "pre_feedforward_layernorm.weight"),
    "q interleaved": change("q_proj.weight", interleave),
    "k of one layer interleaved": change(LAYER + "self_attn.k_proj.weight", interleave),
    "heads reversed": change("q_proj.weight", lambda w: w.reshape(4, 32, -1)[::-1].reshape(w.shape)),
    "embedding scaled": change("embed_tokens.weight", lambda w: w * 8),
    "embedding shifted": change("embed_tokens.weight", lambda w: np.roll(w, 1, axis=0)),
    "one layer's matrix negated": change(LAYER + "mlp.down_proj.weight", lambda w: -w),
    "matrix of zeros": change(LAYER + "mlp.down_proj.weight", lambda w: 0 * w),
    "layers shifted": shift_layers,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stored", [None, "q8_0"])
def test_a_fault_in_the_weights_is_caught_and_its_tensors_named(
    source: Checkpoint, fault: str, stored: str | None
) -> None:
    tensors = arrays(source)
    touched = FAULTS[fault](tensors)
    converted = candidate(block_quantized(tensors, 32, 127) if stored else tensors, stored=stored)
    result = verify(source, converted)
    assert failed(result) >= ({"tensors", "distribution"} if stored else {"tensors", "logits", "distribution"})
    assert blamed(result, "tensors") == touched


@pytest.mark.slow
@pytest.mark.parametrize("fault", [
    {"query_pre_attn_scalar": 24}, {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 30.0},
    {"final_logit_softcapping": None}, {"sliding_window": 7}, {"sliding_window": 9}, {"rope_theta": 1e6},
    {"rms_norm_eps": 1e-5},
    {"hidden_activation": "gelu"}, {"hidden_activation": "silu"},
    {"layer_types": ("full_attention", "sliding_attention", "full_attention")},
    {"layer_types": ("sliding_attention",) * 3},
])  # fmt: skip
@pytest.mark.parametrize("levels", [("config",), ("logits",)])
def test_a_fault_in_the_config_is_caught_by_its_field_and_by_the_logits(
    source: Checkpoint, fault: dict[str, object], levels: tuple[str, ...]
) -> None:
    result = verify(source, candidate(arrays(source), **fault), VerifySettings(levels=levels))
    assert failed(result) >= set(levels)
    if levels == ("config",):
        assert blamed(result, "config") == set(fault)


def test_a_window_larger_than_the_prompt_is_reduced_and_a_wrong_one_stays_wrong() -> None:
    real = dataclasses.replace(SMALL, sliding_window=4096, max_position_embeddings=8192)
    real_source = sensitive_checkpoint(BF16, real)
    right = verify(
        real_source,
        candidate(arrays(real_source), sliding_window=4096, max_position_embeddings=8192),
        VerifySettings(levels=("logits",)),
    )
    assert right.passed and right.gate("logits").metrics["sliding_window"] == [16, 16]
    assert right.gate("logits").metrics["sliding_window_reduced"] and "window set to 16" in right.gate("logits").summary
    wrong = verify(
        real_source,
        candidate(arrays(real_source), sliding_window=4095, max_position_embeddings=8192),
        VerifySettings(levels=("logits",)),
    )
    assert "logits" in failed(wrong) and wrong.gate("logits").metrics["sliding_window"] == [16, 15]


def test_windows() -> None:
    real = dataclasses.replace(SMALL, sliding_window=4096)
    assert reduced_windows(SMALL, SMALL, 64) == (8, 8)
    assert reduced_windows(real, dataclasses.replace(real, sliding_window=8192), 64) == (16, 4112)
    assert reduced_windows(real, dataclasses.replace(real, sliding_window=32), 64) == (16, 1)
    full = dataclasses.replace(SMALL, layer_types=("full_attention",) * 3)
    assert reduced_windows(full, full, 64) is None


# -- missing and unexpected tensors ------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_tensors_are_named(source: Checkpoint) -> None:
    tensors = arrays(source)
    del tensors[LAYER + "mlp.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors[LAYER + "self_attn.o_proj.weight"] = tensors[LAYER + "self_attn.o_proj.weight"].T
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-3]
    result = verify(source, candidate(tensors))
    assert failed(result) == {"completeness"}
    assert blamed(result, "completeness") == {
        LAYER + "mlp.up_proj.weight", "lm_head.weight", LAYER + "self_attn.o_proj.weight", "model.embed_tokens.weight",
    }  # fmt: skip
    assert {"logits", "distribution"} <= set(result.skipped)


def test_a_truncated_vocabulary_with_a_matching_config_is_caught(source: Checkpoint) -> None:
    tensors = arrays(source)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:150]
    result = verify(source, candidate(tensors, vocab_size=150))
    assert {"completeness", "config"} <= failed(result)


@pytest.mark.slow
def test_nan_is_reported_for_the_side_that_has_it(source: Checkpoint) -> None:
    tensors = arrays(source)
    tensors["model.norm.weight"][5] = np.nan
    result = verify(source, candidate(tensors))
    assert blamed(result, "tensors") == {"model.norm.weight"} and "NaN" in result.gate("tensors").summary
    assert failed(result) == {"tensors", "logits", "probe"} and "distribution" in result.skipped
    json.dumps(result.to_json(), allow_nan=False)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_only_the_requested_levels_run(source: Checkpoint) -> None:
    for level in LEVELS:
        names = [gate.name for gate in verify(source, source, VerifySettings(levels=(level,))).gates]
        assert names == (["logits", "probe", "distribution"] if level == "logits" else [level])
    with pytest.raises(ValueError, match="unknown levels"):
        verify(source, source, VerifySettings(levels=("vibes",)))


@pytest.mark.slow
def test_the_result_is_deterministic_and_is_json(source: Checkpoint) -> None:
    converted = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    ids = np.arange(2, 50)
    first = json.dumps(verify(source, converted, VerifySettings(ids=ids)).to_json(), sort_keys=True, allow_nan=False)
    second = json.dumps(verify(source, converted, VerifySettings(ids=ids)).to_json(), sort_keys=True, allow_nan=False)
    assert first == second
    content = json.loads(first)
    assert content["schema_version"] == 1 and content["passed"] is True
    assert content["gates"][-1]["metrics"]["perplexity_ratio"] > 0, "ids from the caller are text"
    before, after = (copy.deepcopy(content) for _ in range(2))
    after["gates"] = json.loads(json.dumps(verify(source, converted, VerifySettings(ids=ids, threads=2)).to_json()))[
        "gates"
    ]
    assert before["gates"][:4] == after["gates"][:4], "threads change only the forward pass"


def test_batches_of_ids(source: Checkpoint) -> None:
    result = verify(source, source, VerifySettings(ids=np.arange(24).reshape(2, 12), levels=("logits",)))
    assert result.gate("logits").metrics["shape"] == [2, 12] and result.gate("distribution").metrics["positions"] == 24
    with pytest.raises(UsageError):
        verify(source, source, VerifySettings(ids=np.zeros((2, 2, 2), int), levels=("logits",)))
    with pytest.raises(UsageError):
        verify(source, source, VerifySettings(ids=np.array([1, 1000]), levels=("logits",)))


def test_default_ids_are_fixed() -> None:
    assert default_ids(SMALL)[0, :6].tolist() == default_ids(SMALL, 6)[0].tolist()
    assert default_ids(SMALL).shape == (1, 64) and default_ids(SMALL)[0, 0] == SMALL.bos_token_id
    assert len(set(default_ids(dataclasses.replace(SMALL, vocab_size=256000))[0].tolist())) == 64
    assert default_ids(dataclasses.replace(SMALL, max_position_embeddings=10)).shape == (1, 10)


def test_progress_covers_both_levels(source: Checkpoint) -> None:
    labels: dict[str, list[int]] = {}

    class Bar:
        def __init__(self, total: int, label: str, /, unit: str = "bytes") -> None:
            self.done = labels.setdefault(label, [total, 0])

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def advance(self, nbytes: int, name: str = "") -> None:
            self.done[1] += nbytes

    verify(
        source,
        candidate({name: array.astype(np.float32) for name, array in arrays(source).items()}),
        VerifySettings(progress=Bar),
    )
    assert labels["tensors"][0] == labels["tensors"][1]
    total, done = labels["forward passes"]
    assert 0.95 * total < done <= total


# -- gates -------------------------------------------------------------------------------------------------------------


def test_gates_from_the_command_line() -> None:
    assert parse_gates(["kl=0.05", "top1=0.9", "logits-rtol=1e-4"]) == {"kl": 0.05, "top1": 0.9, "logits-rtol": 1e-4}
    assert Gates(kl=1.0).overridden({"kl-p99": 3.0}) == Gates(kl=1.0, kl_p99=3.0)
    for wrong in ("kl", "kl=", "kl=low", "kl=-1", "kl=nan", "frobnication=1"):
        with pytest.raises(UsageError):
            parse_gates([wrong])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [
    ("kl", 1e-9), ("kl-p99", 1e-9), ("kl-max", 1e-9), ("top1", 1.1), ("ppl-ratio", 0.5), ("logits", 1e-6),
    ("rmse", 1e-4),
])  # fmt: skip
def test_each_gate_can_be_made_to_fail(source: Checkpoint, name: str, limit: float) -> None:
    converted = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    assert verify(source, converted, VerifySettings(ids=np.arange(40))).passed
    assert not verify(source, converted, VerifySettings(ids=np.arange(40), gates={name: limit})).passed


def test_limits_are_in_the_order_of_loss() -> None:
    assert GATES["lossless"].kl < GATES["f16"].kl < GATES["bf16"].kl <= GATES["q8_0"].kl < GATES["q6_k"].kl
    assert (
        GATES["q6_k"].kl < GATES["q5_k"].kl < GATES["q4_k"].kl < GATES["q4_0"].kl < GATES["q3_k"].kl < GATES["q2_k"].kl
    )
