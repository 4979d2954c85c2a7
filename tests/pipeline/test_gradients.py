"""The output side of the model's Hessian: the streamed backward pass is autograd's over the whole model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32
from gemma2tool.pipeline.calibration import gradients
from gemma2tool.pipeline.calibration.layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE
from gemma2tool.reference.layers import Linear
from gemma2tool.reference.model import Gemma2ForCausalLM
from tests.support.checkpoints import SMALL, random_checkpoint

IDS = np.random.default_rng(0).integers(3, SMALL.vocab_size, (5, 24))
NAMES = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)


def small(**changes: object) -> Checkpoint:
    config = dataclasses.replace(SMALL, num_hidden_layers=3, layer_types=(), **changes)
    return random_checkpoint(np.dtype(FLOAT32), config)


def autograd_hessians(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The sum of g g^T over all positions of each projection's output, by its name in the model."""
    model = Gemma2ForCausalLM.from_checkpoint(checkpoint)
    sums: dict[str, np.ndarray] = {}

    def watch(name: str) -> None:
        def add(gradient: torch.Tensor) -> None:
            outputs = gradient[0].double().numpy()
            sums[name] = sums.get(name, 0) + outputs.T @ outputs

        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: output.register_hook(add) and None
        )

    for name, module in model.named_modules():
        if isinstance(module, Linear) and ".layers." in name:
            module.weight.requires_grad_(True)
            watch(name)
    for number, row in enumerate(IDS):
        logits = model(torch.from_numpy(row[None])).logits[0]
        sums_of_chances = np.cumsum(torch.softmax(logits.detach(), -1).numpy(), axis=1, dtype=np.float64)
        draws = np.random.default_rng(number).random(len(row))
        drawn = [
            int(np.searchsorted(line, draw * line[-1], "right"))
            for line, draw in zip(sums_of_chances, draws, strict=True)
        ]
        torch.nn.functional.cross_entropy(logits, torch.tensor(drawn), reduction="sum").backward()
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": None, "tie_word_embeddings": False}])
def test_the_gradients_of_the_whole_model(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "STREAM", torch.float32)
    monkeypatch.setattr(gradients, "POSITIONS", 10)
    checkpoint = small(**changes)
    expected, perplexities = autograd_hessians(checkpoint), list[float]()
    monkeypatch.setattr(gradients, "warn_of_foreign_text", perplexities.append)
    blocks = dict.fromkeys(NAMES, None)
    layers = list(gradients.output_hessians(checkpoint, checkpoint.tensors, IDS, blocks, map))
    assert [layer for layer, _ in layers] == [2, 1, 0]
    logits = Gemma2ForCausalLM.from_checkpoint(checkpoint)(torch.from_numpy(IDS)).logits[:, :-1]
    chances = logits.log_softmax(-1).gather(2, torch.from_numpy(IDS[:, 1:, None]))
    assert perplexities == [pytest.approx(float(torch.exp(-chances.mean()).detach()), rel=1e-3)]
    for layer, hessians in layers:
        assert hessians.keys() == set(NAMES)
        for name, hessian in hessians.items():
            hessian.symmetrize()
            want = expected[f"model.layers.{layer}.{name}"]
            assert np.abs(hessian.squares[0].numpy() - want).max() < 1e-4 * np.abs(want).max()


def test_some_sequences_of_a_long_text() -> None:
    ids = np.arange(200)[:, None] * np.ones((1, 512), int)
    chosen = gradients.some_sequences(ids)
    assert chosen.shape == (16, 512) and chosen[0, 0] == 0 and chosen[-1, 0] == 199
    assert gradients.some_sequences(ids[:3]) is not None and len(gradients.some_sequences(ids[:3])) == 3
