"""The same random model in gemma2tool's classes and in transformers', and the bound within which they must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.reference import model as model_classes

torch.set_num_threads(1)  # models this small are slower with more

CLASSES = ("Gemma2Model", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "Gemma2ForTokenClassification")

# Windows shorter than the prompts, kv heads from 1 to all, sizes without common divisors, caps low enough to have an
# effect. No narrower than this, because norms over a few values magnify float32's rounding: over 400 of these configs
# float32 and float64 differ by at most a seventh of the bound, at half these widths by half of it.
CONFIGS = st.builds(
    lambda heads, per_head, kv, **rest: Gemma2Config(
        hidden_size=heads * per_head,
        num_attention_heads=heads,
        num_key_value_heads=heads if kv == "all" else 1 if kv == "one" else heads // 2,
        max_position_embeddings=64,
        **rest,
    ),
    heads=st.sampled_from([2, 4, 6]),
    per_head=st.integers(6, 11),
    kv=st.sampled_from(["one", "half", "all"]),
    vocab_size=st.integers(11, 61),
    intermediate_size=st.integers(24, 60),
    num_hidden_layers=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 8, 14]),
    query_pre_attn_scalar=st.sampled_from([6, 12, 16]),
    sliding_window=st.integers(1, 9),
    attn_logit_softcapping=st.sampled_from([None, 2.0, 50.0]),
    final_logit_softcapping=st.sampled_from([None, 5.0, 30.0]),
    rms_norm_eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    rope_theta=st.sampled_from([100.0, 10000.0]),
    hidden_activation=st.sampled_from(["gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu", "silu", "relu"]),
    attention_bias=st.booleans(),
    tie_word_embeddings=st.booleans(),
    id2label=st.integers(1, 4).map(lambda count: {index: f"LABEL_{index}" for index in range(count)}),
)


def random_state(config: Gemma2Config, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights so large that soft caps, norms and activations all leave their linear range."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in getattr(model_classes, kind)(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else 1.0 if "embed" in name else 1.6 / shape[1] ** 0.5
        state[name] = torch.randn(shape, generator=generator) * scale
    return state


def reference_model(config: Gemma2Config, kind: str, state: dict[str, torch.Tensor]):
    model = getattr(model_classes, kind)(config)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def transformers_model(
    config: Gemma2Config, kind: str, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
):
    transformers = pytest.importorskip("transformers")
    transformers_config = transformers.Gemma2Config(**config.to_hf())
    transformers_config._attn_implementation = "eager"
    model = getattr(transformers, kind)(transformers_config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for parameter in model.parameters():  # not buffers: from_pretrained keeps the rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def assert_agree(actual: torch.Tensor, expected: torch.Tensor, what: str = "values") -> None:
    """Assert that every value agrees within 5e-5 plus 1e-5 of the value."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    excess = (actual - expected).abs() - (5e-5 + 1e-5 * expected.abs())
    assert bool((excess <= 0).all()), f"{what}: {(actual - expected).abs().max().item():.2e} apart"


def checkpoint_of(config: Gemma2Config, state: dict[str, torch.Tensor]) -> Checkpoint:
    tensors = {name: ArrayTensor(np.ascontiguousarray(tensor.numpy())) for name, tensor in state.items()}
    return Checkpoint(Path("memory"), FormatFacts("memory"), config, tensors)


def prompts(draw_shape: tuple[int, int], vocab: int, seed: int) -> torch.Tensor:
    """Random ids (B, T) without the padding token 0."""
    return torch.randint(1, vocab, draw_shape, generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int, length: int) -> torch.Tensor | None:
    """A mask (B, T) with row r padded by 2 r tokens on ``side``; None for "none"."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        count = min(2 * row, length - 1)
        if count:
            mask[row, slice(0, count) if side == "left" else slice(length - count, length)] = 0
    return mask
