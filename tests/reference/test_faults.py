"""Checks that the suite detects mistakes: each known mistake, planted in the forward pass, must break agreement with
peers.

The mistakes are those that converters and ports of Gemma 2 have made. Each is compared by the same function and bound
as the real thing: with transformers' logits and hidden states on one small model, and with the logits gemma_pytorch
stored.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.reference import layers
from gemma2tool.reference import model as model_module
from tests.support.reference_peers import assert_agree, prompts, reference_model, transformers_model

CAUSAL = "Gemma2ForCausalLM"
CONFIG = Gemma2Config(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=12,
    sliding_window=6,
    max_position_embeddings=64,
)


def trained_like_state(config: Gemma2Config) -> dict[str, torch.Tensor]:
    """Random weights at the scale of trained ones: small embeddings (so that eps counts), scores near the soft cap."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model_module.Gemma2ForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(20)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else 0.02 if "embed" in name else 1.5 / shape[1] ** 0.5
        if "q_proj" in name or "k_proj" in name:
            scale *= 3
        state[name] = torch.randn(shape, generator=generator) * scale
    # Small embeddings make small logits; the final norm's weight brings them to where the cap bends them.
    state["model.norm.weight"] = torch.full((config.hidden_size,), 60.0)
    return state


FAULTS = {}


def fault(function):
    """Register a mistake: it may patch the code, and returns the config and weights the mistaken program would use."""
    FAULTS[function.__name__] = function
    return function


def _norm(patch, formula):
    patch.setattr(layers.RMSNorm, "forward", lambda self, x: formula(self, x).to(x.dtype))


def _rms(self, x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@fault
def norm_weight_without_one(patch, config, state):
    _norm(patch, lambda self, x: _rms(self, x, self.eps) * self.weight)
    return config, state


@fault
def no_embedding_scale(patch, config, state):
    patch.setattr(model_module, "scale_embeddings", lambda x, config: x)
    return config, state


@fault
def no_final_soft_cap(patch, config, state):
    return dataclasses.replace(config, final_logit_softcapping=None), state


@fault
def no_attention_soft_cap(patch, config, state):
    return dataclasses.replace(config, attn_logit_softcapping=None), state


@fault
def soft_cap_after_the_mask(patch, config, state):
    """The masked scores become -cap instead of minus infinity."""
    seen = layers.visible
    lost = []

    def everything(*args):
        lost.append(seen(*args))
        return torch.ones_like(lost[-1])

    softmax = torch.softmax
    patch.setattr(layers, "visible", everything)
    patch.setattr(
        layers.torch,
        "softmax",
        lambda scores, **options: softmax(scores.masked_fill(~lost[-1], -config.attn_logit_softcapping), **options),
    )
    return config, state


@fault
def soft_cap_on_the_hidden_state(patch, config, state):
    """torchtune: 30 * tanh(x / 30) of the final hidden state instead of the logits."""
    last = model_module.Gemma2Model.forward

    def forward(self, *args, **kwargs):
        output = last(self, *args, **kwargs)
        output.last_hidden_state = layers.soft_cap(output.last_hidden_state, 30.0)
        return output

    patch.setattr(model_module.Gemma2Model, "forward", forward)
    return dataclasses.replace(config, final_logit_softcapping=None), state


def _swapped(state, one, other):
    swapped = dict(state)
    for name in state:
        if f".{one}." in name:
            twin = name.replace(f".{one}.", f".{other}.")
            swapped[name], swapped[twin] = state[twin], state[name]
    return swapped


@fault
def key_and_value_swapped(patch, config, state):
    return config, _swapped(state, "k_proj", "v_proj")


@fault
def gate_and_up_swapped(patch, config, state):
    return config, _swapped(state, "gate_proj", "up_proj")


@fault
def first_gemmas_norm_names(patch, config, state):
    """In the first Gemma, post_attention_layernorm is the norm before the feed-forward."""
    return config, _swapped(state, "post_attention_layernorm", "pre_feedforward_layernorm")


@fault
def no_post_norms(patch, config, state):
    original = layers.DecoderLayer.__init__

    def init(self, *args):
        original(self, *args)
        self.post_attention_layernorm = self.post_feedforward_layernorm = torch.nn.Identity()

    patch.setattr(layers.DecoderLayer, "__init__", init)
    return config, {name: tensor for name, tensor in state.items() if ".post_" not in name}


@fault
def sliding_on_odd_layers(patch, config, state):
    kinds = tuple(FULL if kind == SLIDING else SLIDING for kind in config.layer_types)
    return dataclasses.replace(config, layer_types=kinds), state


@fault
def no_sliding(patch, config, state):
    return dataclasses.replace(config, layer_types=(FULL,) * config.num_hidden_layers), state


@fault
def all_sliding(patch, config, state):
    return dataclasses.replace(config, layer_types=(SLIDING,) * config.num_hidden_layers), state


@fault
def window_one_too_short(patch, config, state):
    return dataclasses.replace(config, sliding_window=config.sliding_window - 1), state


@fault
def window_one_too_long(patch, config, state):
    return dataclasses.replace(config, sliding_window=config.sliding_window + 1), state


@fault
def query_heads_tiled(patch, config, state):
    """Query head i reads kv head i mod K instead of i // (H / K)."""
    patch.setattr(layers, "key_value_head", lambda head, config: head % config.num_key_value_heads)
    return config, state


@fault
def interleaved_rotary(patch, config, state):
    def rotate(x, cos, sin):
        half = x.shape[-1] // 2
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        cos, sin = (angle[..., :half].repeat_interleave(2, -1).unsqueeze(1) for angle in (cos, sin))
        return x * cos + turned * sin

    patch.setattr(layers, "rotate", rotate)
    return config, state


@fault
def rotary_base_of_a_million(patch, config, state):
    return dataclasses.replace(config, rope_theta=1e6), state


@fault
def silu_for_gelu(patch, config, state):
    return dataclasses.replace(config, hidden_activation="silu"), state


@fault
def exact_gelu_for_its_tanh_form(patch, config, state):
    return dataclasses.replace(config, hidden_activation="gelu"), state


@fault
def query_scale_from_head_dim(patch, config, state):
    """keras-hub and llama.cpp with a 27B of another depth; transformers after reading a GGUF has 256."""
    return dataclasses.replace(config, query_pre_attn_scalar=config.head_dim), state


@fault
def norm_eps_of_1e_5(patch, config, state):
    """litgpt."""
    return dataclasses.replace(config, rms_norm_eps=1e-5), state


@fault
def norm_computed_in_the_activation_type(patch, config, state):
    """Has an effect in low precision; in float32 it is the rounding of a bfloat16 norm."""
    _norm(patch, lambda self, x: _rms(self, x.bfloat16(), self.eps) * (1 + self.weight))
    return config, state


@fault
def positions_stretched(patch, config, state):
    """Rotary angles are relative, so a constant offset has no effect and is not a fault."""
    original = model_module.cos_sin
    patch.setattr(
        model_module, "cos_sin", lambda config, positions, dtype: original(config, positions + positions // 5, dtype)
    )
    return config, state


@fault
def final_norm_left_out(patch, config, state):
    return config, state | {"model.norm.weight": torch.zeros_like(state["model.norm.weight"])}


@fault
def padded_embedding_row_off_by_one(patch, config, state):
    return config, state | {"model.embed_tokens.weight": state["model.embed_tokens.weight"].roll(1, 0)}


@pytest.fixture(scope="module")
def peers():
    """Ids, weights, and the outputs of transformers."""
    state, ids = trained_like_state(CONFIG), prompts((2, 20), CONFIG.vocab_size, 9)
    output = transformers_model(CONFIG, CAUSAL, state)(ids, output_hidden_states=True)
    return ids, state, output


def compare(config, state, ids, expected):
    actual = reference_model(config, CAUSAL, state)(ids, output_hidden_states=True)
    for layer, (x, y) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_agree(x, y, f"hidden state {layer}")
    assert_agree(actual.logits, expected.logits, "logits")


@pytest.mark.slow
@pytest.mark.peer
def test_without_a_fault_it_agrees(peers):
    ids, state, expected = peers
    compare(CONFIG, state, ids, expected)
    assert expected.logits.abs().max() > 15, "the logits must reach where the final soft cap bends"


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", FAULTS)
def test_fault_breaks_agreement_with_transformers(name, peers, monkeypatch):
    ids, state, expected = peers
    config, faulty = FAULTS[name](monkeypatch, CONFIG, dict(state))
    with pytest.raises(AssertionError, match="apart"):
        compare(config, faulty, ids, expected)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", FAULTS)
def test_fault_breaks_agreement_with_gemma_pytorch(name, oracles, monkeypatch):
    """By logits alone, because a stored oracle has nothing else."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = oracles / "checkpoints"
    config = Gemma2Config.from_hf(json.loads((folder / "hf" / "27b" / "config.json").read_text()))
    state = safetensors.load_file(folder / "hf" / "27b" / "model.safetensors")
    ids = torch.from_numpy(np.load(folder / "ids.npy")).long()
    expected = torch.from_numpy(np.load(folder / "gemma_pytorch" / "27b" / "logits.npy"))
    config, faulty = FAULTS[name](monkeypatch, config, state)
    with pytest.raises(AssertionError, match="apart"):
        assert_agree(reference_model(config, CAUSAL, faulty)(ids).logits, expected)
