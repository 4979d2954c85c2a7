"""Norm tuning's passes: gradients are autograd's over the whole model, and do not depend on threads."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32
from gemma2tool.pipeline.tuning import cost, passes, tune
from gemma2tool.pipeline.tuning.passes import Passes, head_of
from gemma2tool.reference.model import Gemma2ForCausalLM
from tests.support.checkpoints import SMALL, random_checkpoint

IDS = np.random.default_rng(0).integers(3, SMALL.vocab_size, (3, 24))


def pair(**changes: object) -> tuple[Checkpoint, Checkpoint]:
    config = dataclasses.replace(SMALL, num_hidden_layers=2, layer_types=(), **changes)
    return random_checkpoint(np.dtype(FLOAT32), config), random_checkpoint(np.dtype(FLOAT32), config, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": None, "tie_word_embeddings": False}])
def test_the_gradients_of_the_whole_model(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "POSITIONS", 10)
    source, candidate = pair(**changes)
    model = Gemma2ForCausalLM.from_checkpoint(candidate)
    norms = {name: weight.requires_grad_() for name, weight in model.named_parameters() if name.endswith("norm.weight")}
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        expected = Gemma2ForCausalLM.from_checkpoint(source)(ids).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - model(ids).logits.log_softmax(-1))).sum(-1).mean()
    gradients = dict(zip(norms, torch.autograd.grad(divergence, list(norms.values())), strict=True))
    states = Passes(source, map).hidden_states(IDS)
    value, streamed = Passes(candidate, map).gradients(IDS, states, head_of(source))
    assert value == pytest.approx(divergence.item(), rel=1e-4)
    assert streamed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(streamed[name], gradient, rtol=1e-3, atol=1e-5)
    with ThreadPoolExecutor(3) as pool:
        _, again = Passes(candidate, pool.map).gradients(IDS, states, head_of(source))
    assert all(torch.equal(again[name], gradient) for name, gradient in streamed.items())


def test_norms_of_ones_own() -> None:
    source, candidate = pair()
    norms = tune.starting_norms(source)
    tensors = candidate.tensors | {name: source.tensors[name] for name in norms}
    [with_them] = Passes(dataclasses.replace(candidate, tensors=tensors), map).hidden_states(IDS[:1])
    [given] = Passes(candidate, map, norms).hidden_states(IDS[:1])
    assert torch.equal(with_them, given)


def test_the_estimate_knows_the_settings() -> None:
    assert (cost._STEPS, cost._BATCH, cost._POSITIONS) == (tune.STEPS, tune.BATCH, passes.POSITIONS)


def test_a_fall_within_its_error_is_not_agreement() -> None:
    before = np.linspace(1, 2, 8)
    assert tune.agrees(before, before - 0.1)
    assert not tune.agrees(before, before)
    assert not tune.agrees(before, before - np.array([0.5, -0.4] * 4))
