"""Logits of another program (transformers): the mistake behind them is found by making it in the reference forward
pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gemma2tool.errors import UsageError
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.verify.diagnosis.counterfactual import counterfactual
from tests.reference.test_faults import CONFIG, trained_like_state
from tests.support.reference_peers import checkpoint_of, transformers_model

pytestmark = pytest.mark.peer

CAUSAL = "Gemma2ForCausalLM"
IDS = np.concatenate([[CONFIG.bos_token_id], np.random.default_rng(1).integers(3, CONFIG.vocab_size, 23)])
STATE = trained_like_state(CONFIG)
State = dict[str, torch.Tensor]


def peer_logits(ids: np.ndarray = IDS, state: State | None = None, **fields: object) -> np.ndarray:
    """transformers' logits (T, V), float32, of a config with other ``fields`` and another ``state`` if given."""
    model = transformers_model(dataclasses.replace(CONFIG, **fields), CAUSAL, STATE if state is None else state)
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def source():
    return checkpoint_of(CONFIG, STATE)


@pytest.mark.slow
def test_correct_logits_have_no_cause(source) -> None:
    assert counterfactual(source, IDS, peer_logits(), threads=1) is None


@pytest.mark.slow
def test_noise_is_not_a_mistake(source) -> None:
    noisy = peer_logits() * (1 + 0.01 * np.random.default_rng(2).standard_normal(peer_logits().shape))
    assert counterfactual(source, IDS, noisy, threads=1) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "fields"),
    [
        ("config.attention-softcap-missing", {"attn_logit_softcapping": None}),
        ("config.final-softcap-missing", {"final_logit_softcapping": None}),
        ("config.softcaps-swapped", {"attn_logit_softcapping": 30.0, "final_logit_softcapping": 50.0}),
        ("config.query-scale", {"query_pre_attn_scalar": 16}),
        ("config.query-scale", {"query_pre_attn_scalar": 224}),
        ("config.window-off-by-one", {"sliding_window": 7}),
        ("config.window-missing", {"layer_types": (FULL,) * 4}),
        ("config.window-parity", {"layer_types": (FULL, SLIDING) * 2}),
        ("config.rope-theta", {"rope_theta": 1000000.0}),
        ("config.eps", {"rms_norm_eps": 1e-5}),
        ("config.activation", {"hidden_activation": "gelu"}),
    ],
)
def test_configs(source, id: str, fields: dict[str, object]) -> None:
    cause = counterfactual(source, IDS, peer_logits(**fields), threads=1)
    assert cause is not None and cause.id == id
    assert set(cause.fields) <= set(fields) or id == "config.window-missing"
    assert cause.evidence["difference_with"] < 0.2 * cause.evidence["difference_without"]


def changed(kinds: tuple[str, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return {name: function(w) if any(kind in name for kind in kinds) else w for name, w in STATE.items()}


def permuted(w: torch.Tensor) -> torch.Tensor:
    """The inverse of the permutation in transformers' conversion scripts for Llama."""
    return w.view(-1, 2, CONFIG.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def swapped(one: str, other: str) -> State:
    return {name: STATE[name.replace(one, "#").replace(other, one).replace("#", other)] for name in STATE}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "state"),
    [
        ("norm.minus-one", changed(("norm",), lambda w: w - 1)),
        ("norm.plus-one", changed(("norm",), lambda w: w + 1)),
        ("rope.interleaved", changed(("q_proj", "k_proj"), permuted)),
        ("rope.interleaved", changed(("q_proj",), permuted)),
        ("mlp.gate-up-swapped", swapped("gate_proj", "up_proj")),
        ("attention.qkv-swapped", swapped("k_proj", "v_proj")),
    ],
)
def test_weights(source, id: str, state: State) -> None:
    cause = counterfactual(source, IDS, peer_logits(state=state), threads=1)
    assert cause is not None and cause.id == id and cause.tensors


@pytest.mark.slow
def test_bos_left_out_or_added_twice(source) -> None:
    assert counterfactual(source, IDS, peer_logits(IDS[1:]), threads=1).id == "tokenizer.bos-missing"
    twice = np.concatenate([IDS[:1], IDS])
    assert counterfactual(source, IDS, peer_logits(twice), threads=1).id == "tokenizer.bos-doubled"


ORDER = np.random.default_rng(3).permutation(CONFIG.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id", "moved"),
    [
        ("logits.shifted-by-one", lambda logits: np.roll(logits, 1, axis=0)),
        ("logits.shifted-by-one", lambda logits: np.roll(logits, -1, axis=0)),
        ("logits.shifted-by-one", lambda logits: logits[:-1]),
        ("logits.shifted-by-one", lambda logits: logits[-2:-1]),
        ("logits.vocabulary-permuted", lambda logits: logits[:, ::-1]),
        ("logits.vocabulary-permuted", lambda logits: logits[:, ORDER]),
    ],
)
def test_right_logits_in_the_wrong_place(source, id: str, moved: Callable[[np.ndarray], np.ndarray]) -> None:
    passes = []

    def once(checkpoint, ids: np.ndarray) -> np.ndarray:
        passes.append(ids)
        return peer_logits()[None]

    cause = counterfactual(source, IDS, moved(peer_logits()), run=once)
    assert cause is not None and cause.id == id and len(passes) == 1


@pytest.mark.slow
def test_the_last_position_is_enough(source) -> None:
    assert (
        counterfactual(source, IDS, peer_logits(final_logit_softcapping=None)[-1], threads=1).id
        == "config.final-softcap-missing"
    )


def test_logits_of_another_shape_are_refused(source) -> None:
    with pytest.raises(UsageError):
        counterfactual(source, IDS, np.zeros((3, 5), np.float32))
