"""The model classes against transformers' own: every class, input and output, on random configs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.errors import UsageError
from gemma2tool.model.config import Gemma2Config
from gemma2tool.reference import layers
from gemma2tool.reference import model as model_module
from gemma2tool.reference.cache import KeyValueCache
from gemma2tool.reference.model import Gemma2ForCausalLM, Gemma2Model
from tests.support.reference_peers import (
    CLASSES,
    CONFIGS,
    assert_agree,
    padding,
    prompts,
    random_state,
    reference_model,
    transformers_model,
)

SMALL = Gemma2Config(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=31,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=6,
    sliding_window=4,
    max_position_embeddings=64,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=10.0,
)


@pytest.mark.peer
@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    kind=st.sampled_from(CLASSES),
    batch=st.integers(1, 3),
    length=st.integers(1, 21),
    side=st.sampled_from(["none", "left", "right"]),
    embeds=st.booleans(),
    shifted=st.booleans(),
    keep=st.sampled_from(["all", "last", "some", "mask"]),
    seed=st.integers(0, 999),
)
def test_every_output_agrees(config, kind, batch, length, side, embeds, shifted, keep, seed):
    state = random_state(config, kind, seed)
    model, peer = reference_model(config, kind, state), transformers_model(config, kind, state)
    mask = padding(side, batch, length)
    ids = prompts((batch, length), config.vocab_size, seed)
    if mask is not None:
        ids = ids * mask
    inputs = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    if embeds:
        generator = torch.Generator().manual_seed(seed)
        inputs["inputs_embeds"] = torch.randn(batch, length, config.hidden_size, generator=generator)
    else:
        inputs["input_ids"] = ids
    if shifted:
        inputs["position_ids"] = torch.arange(length)[None] + torch.arange(batch)[:, None] * 3
    if kind == "Gemma2ForCausalLM":
        some = torch.arange(0, length, 2)
        inputs["logits_to_keep"] = {"all": 0, "last": 1, "some": some, "mask": ids % 2 == 0}[keep]
    actual, expected = model(**inputs), peer(**inputs)

    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    for layer, (x, y) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_agree(x[real], y[real], f"hidden state {layer}")
    for layer, (x, y) in enumerate(zip(actual.attentions, expected.attentions, strict=True)):
        assert_agree(x.transpose(1, 2)[real], y.transpose(1, 2)[real], f"attention {layer}")
    if kind == "Gemma2Model":
        assert_agree(actual.last_hidden_state[real], expected.last_hidden_state[real], "last hidden state")
    elif (kind == "Gemma2ForCausalLM" and keep == "all") or kind == "Gemma2ForTokenClassification":
        assert_agree(actual.logits[real], expected.logits[real], "logits")
    elif (side == "none" or kind == "Gemma2ForSequenceClassification") and not (embeds and side == "right"):
        # With embeddings and padding on the right both read a padded position.
        assert_agree(actual.logits, expected.logits, "logits")


@pytest.mark.peer
@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    kind=st.sampled_from(CLASSES[1:]),
    problem=st.sampled_from([None, "regression", "single_label_classification", "multi_label_classification"]),
    floats=st.booleans(),
    side=st.sampled_from(["none", "left", "right"]),
    seed=st.integers(0, 999),
)
def test_losses_agree(config, kind, problem, floats, side, seed):
    batch, length, count = 3, 9, config.num_labels
    if problem == "single_label_classification" and count == 1:
        problem = None
    config = dataclasses.replace(config, problem_type=problem)
    state = random_state(config, kind, seed)
    mask = padding(side, batch, length)
    ids = prompts((batch, length), config.vocab_size, seed)
    if mask is not None:
        ids = ids * mask
    generator = torch.Generator().manual_seed(seed)
    if kind == "Gemma2ForSequenceClassification":
        single = problem == "single_label_classification" or (problem is None and count > 1 and not floats)
        labels = (
            torch.randint(0, count, (batch,), generator=generator)
            if single
            else torch.rand((batch, count), generator=generator)
        )
    else:
        classes = config.vocab_size if kind == "Gemma2ForCausalLM" else count
        labels = torch.randint(0, classes, (batch, length), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        labels[0, 1] = 0  # at least one label that counts
        if mask is not None:
            labels[mask == 0] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    actual, expected = reference_model(config, kind, state)(**inputs), transformers_model(config, kind, state)(**inputs)
    assert_agree(actual.loss, expected.loss, "loss")


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_sequence_class_is_that_of_the_last_real_token(side):
    """Padding tokens are found by id, without a mask, as in transformers."""
    kind = "Gemma2ForSequenceClassification"
    state = random_state(SMALL, kind)
    ids = prompts((3, 9), SMALL.vocab_size, 5)
    mask = padding(side, 3, 9)
    ids = ids if mask is None else ids * mask
    assert_agree(reference_model(SMALL, kind, state)(ids).logits, transformers_model(SMALL, kind, state)(ids).logits)
    assert reference_model(SMALL, kind, state)(ids).logits.shape == (3, 2)


@pytest.mark.oracle
@pytest.mark.parametrize("flavour", ["hd", "27b"])
def test_logits_of_gemma_pytorch(oracles, flavour):
    """Logits of Google's gemma_pytorch with the same weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = oracles / "checkpoints"
    config = Gemma2Config.from_hf(json.loads((folder / "hf" / flavour / "config.json").read_text()))
    model = reference_model(
        config, "Gemma2ForCausalLM", safetensors.load_file(folder / "hf" / flavour / "model.safetensors")
    )
    ids = torch.from_numpy(np.load(folder / "ids.npy")).long()
    for writer in ("", "_sharded"):
        expected = torch.from_numpy(np.load(folder / "gemma_pytorch" / f"{flavour}{writer}" / "logits.npy"))
        assert_agree(model(ids).logits, expected)


@pytest.mark.oracle
def test_flax_gave_the_same_logits(oracles):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = oracles / "checkpoints"
    ids = torch.from_numpy(np.load(folder / "ids.npy")).long()
    seen = 0
    for path in sorted(folder.glob("flax/*/logits.npy")):
        if "bf16" in path.parent.name:
            continue
        flavour = "27b" if "27b" in path.parent.name else "hd"
        config = Gemma2Config.from_hf(json.loads((folder / "hf" / flavour / "config.json").read_text()))
        state = safetensors.load_file(folder / "hf" / flavour / "model.safetensors")
        assert_agree(
            reference_model(config, "Gemma2ForCausalLM", state)(ids).logits, torch.from_numpy(np.load(path)).float()
        )
        seen += 1
    assert seen


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_where_transformers_does(dtype, monkeypatch):
    """Two units in the last place at the median are asked for; equal roundings in equal places give none at all."""
    for seed in range(3):
        state = random_state(SMALL, "Gemma2ForCausalLM", seed)
        model = reference_model(SMALL, "Gemma2ForCausalLM", state).to(dtype)
        ids = prompts((2, 17), SMALL.vocab_size, seed)
        expected = transformers_model(SMALL, "Gemma2ForCausalLM", state, dtype)(ids).logits
        assert model(ids).logits.dtype == expected.dtype == dtype
        assert _steps_apart(model(ids).logits, expected).median() == 0
        # The comparison can fail: one rounding left out, of the embedding's scale, is felt.
        with monkeypatch.context() as patch:
            patch.setattr(
                model_module, "scale_embeddings", lambda x, config: (x.float() * config.embed_scale).to(x.dtype)
            )
            assert _steps_apart(model(ids).logits, expected).median() > 0


def _steps_apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How many representable numbers are between each pair."""
    return (_ordered(x) - _ordered(y)).abs()


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers whose difference counts the representable numbers between them."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def test_embedding_scale_is_rounded_to_the_activation_type():
    for size, dtype, expected in [
        (2304, torch.bfloat16, 48.0),
        (3584, torch.bfloat16, 59.75),
        (3584, torch.float16, 59.875),
        (4608, torch.bfloat16, 68.0),
        (4608, torch.float16, 67.875),
    ]:
        config = dataclasses.replace(SMALL, hidden_size=size)
        assert model_module.scale_embeddings(torch.ones(1, dtype=dtype), config).item() == expected


def test_float64_is_the_limit_of_float32():
    state = random_state(SMALL, "Gemma2ForCausalLM")
    ids = prompts((2, 20), SMALL.vocab_size, 1)
    narrow = reference_model(SMALL, "Gemma2ForCausalLM", state)(ids).logits
    double = reference_model(SMALL, "Gemma2ForCausalLM", state).double()(ids).logits
    assert double.dtype == torch.float64
    assert_agree(narrow, double)
    # Nothing on the way fell back to float32: a change of 1e-12 in the weights is felt to its own size.
    moved = {name: tensor.double() * (1 + 1e-12) for name, tensor in state.items()}
    shift = (reference_model(SMALL, "Gemma2ForCausalLM", state).double()(ids).logits - double).abs().max()
    model = reference_model(SMALL, "Gemma2ForCausalLM", state).double()
    model.load_state_dict(moved)
    assert shift == 0 and 0 < (model(ids).logits - double).abs().max() < 1e-9


SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8.0, "truncate": False},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 9.0],
     "original_max_position_embeddings": 16},
]  # fmt: skip


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("length", [12, 40])
def test_rotary_scalings_agree(scaling, length):
    limit = 24 if scaling["rope_type"] == "dynamic" else 64
    config = dataclasses.replace(SMALL, rope_scaling=scaling, max_position_embeddings=limit)
    state = random_state(config, "Gemma2Model")
    ids = prompts((2, length), config.vocab_size, 3)
    actual = reference_model(config, "Gemma2Model", state)(ids).last_hidden_state
    assert_agree(actual, transformers_model(config, "Gemma2Model", state)(ids).last_hidden_state)
    plain = reference_model(SMALL, "Gemma2Model", state)(ids).last_hidden_state
    if not (scaling["rope_type"] == "dynamic" and length < limit):
        assert (actual - plain).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("length", [4, 5, 6, 11])
def test_bidirectional_attention_agrees(length):
    """transformers' eager attention goes by ``is_causal``; its two-sided window includes the distance W."""
    config = Gemma2Config.from_hf(SMALL.to_hf() | {"is_causal": False})
    assert config.sliding_window == 4
    state = random_state(config, "Gemma2Model")
    ids, mask = prompts((2, length), config.vocab_size, 3), padding("right", 2, length)
    expected = transformers_model(config, "Gemma2Model", state)(ids, attention_mask=mask).last_hidden_state
    actual = reference_model(config, "Gemma2Model", state)(ids, attention_mask=mask).last_hidden_state
    assert_agree(actual[mask.bool()], expected[mask.bool()])
    causal = reference_model(SMALL, "Gemma2Model", state)(ids).last_hidden_state
    assert (actual - causal).abs().max() > 0.1
    with pytest.raises(UsageError, match="bidirectional"):
        reference_model(config, "Gemma2Model", state)(ids, use_cache=True)


@pytest.mark.slow
@pytest.mark.peer
def test_packed_sequences_are_refused_where_transformers_separates_them():
    """Positions that restart, without a mask and without a cache; with one of them, both ignore the restart."""
    state = random_state(SMALL, "Gemma2Model")
    ids = prompts((1, 10), SMALL.vocab_size, 3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    model, peer = reference_model(SMALL, "Gemma2Model", state), transformers_model(SMALL, "Gemma2Model", state)
    with pytest.raises(UsageError, match="continue with 0 after 5") as packed:
        model(ids, position_ids=positions, use_cache=False)
    assert packed.value.id == "forward.packed"
    separate = peer(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert_agree(model(ids[:, 6:], use_cache=False).last_hidden_state, separate[:, 6:])
    for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        actual = model(ids, position_ids=positions, **more).last_hidden_state
        assert_agree(actual, peer(ids, position_ids=positions, **more).last_hidden_state)


def test_query_blocks_have_no_effect(monkeypatch):
    state = random_state(SMALL, "Gemma2ForCausalLM")
    model, ids, mask = (
        reference_model(SMALL, "Gemma2ForCausalLM", state),
        prompts((2, 23), 40, 2),
        padding("left", 2, 23),
    )
    whole = model(ids, attention_mask=mask, output_attentions=True)
    monkeypatch.setattr(layers, "SCORE_BYTES", 2 * 4 * 23 * 4 * 5)  # five queries at a time
    blocks = model(ids, attention_mask=mask, output_attentions=True)
    real = mask.bool()
    assert_agree(blocks.logits[real], whole.logits[real])
    for x, y in zip(blocks.attentions, whole.attentions, strict=True):
        assert_agree(x.transpose(1, 2)[real], y.transpose(1, 2)[real])


SETTLED = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Record(TorchDispatchMode):
    seen = set()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add((function.overloadpacket.__name__, args[0].dtype) if args and torch.is_tensor(args[0]) else None)
        return function(*args, **(kwargs or {}))

with Record() as record:
    import gemma2tool.reference.layers
missing = {(name, dtype) for name in ("cos", "sin", "tanh") for dtype in (torch.float32, torch.float64)} - record.seen
assert not missing, missing
"""


@pytest.mark.slow
def test_math_kernels_are_selected_before_threads_can_race():
    """Importing the forward pass calls every function that oneMKL computes once."""
    subprocess.run([sys.executable, "-c", SETTLED], check=True, timeout=120)


def test_initialize_follows_the_config():
    model = Gemma2ForCausalLM(dataclasses.replace(SMALL, initializer_range=0.5)).initialize(seed=1)
    weights = model.state_dict()
    assert weights["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.5, rel=0.1)
    assert not weights["model.embed_tokens.weight"][0].any()
    assert not weights["model.norm.weight"].any()


def test_dropout_acts_only_in_training():
    config = dataclasses.replace(SMALL, attention_dropout=0.5)
    state = random_state(config, "Gemma2Model")
    model, ids = reference_model(config, "Gemma2Model", state), prompts((1, 9), 40, 1)
    calm = model(ids).last_hidden_state
    assert torch.equal(calm, reference_model(SMALL, "Gemma2Model", state)(ids).last_hidden_state)
    assert not torch.equal(calm, model.train()(ids).last_hidden_state)


def test_outputs_as_tuples():
    model = reference_model(SMALL, "Gemma2ForCausalLM", random_state(SMALL, "Gemma2ForCausalLM"))
    ids = prompts((1, 5), 40, 1)
    logits, cache, hidden = model(ids, return_dict=False, output_hidden_states=True)
    assert logits.shape == (1, 5, 40) and isinstance(cache, KeyValueCache) and len(hidden) == 5
    assert model(ids, use_cache=False).past_key_values is None
    without = dataclasses.replace(SMALL, use_cache=False)
    assert Gemma2Model(without).initialize()(ids).past_key_values is None


def test_positions_may_be_given_in_every_documented_way():
    model = reference_model(SMALL, "Gemma2ForCausalLM", random_state(SMALL, "Gemma2ForCausalLM"))
    ids = prompts((2, 9), 40, 1)
    expected = model(ids).logits[:, 5:]
    cache = model(ids[:, :5], cache_position=torch.arange(5)).past_key_values
    actual = model(
        ids[:, 5:], past_key_values=cache, cache_position=torch.arange(5, 9), position_ids=torch.arange(5, 9)
    )
    assert_agree(actual.logits, expected)
    assert_agree(model(ids, position_ids=torch.arange(9)[None]).logits[:, 5:], expected)


def test_wrong_inputs_get_clear_errors():
    state = random_state(SMALL, "Gemma2ForCausalLM")
    model, ids = reference_model(SMALL, "Gemma2ForCausalLM", state), prompts((2, 6), 40, 1)
    embeds = torch.zeros(2, 6, 24)
    beyond = ids.clone()
    beyond[1, 3] = 40
    wrong = [
        ({"input_ids": beyond}, "token id 40 at position 3 of prompt 1 .* vocabulary of 40"),
        ({"input_ids": -ids}, "token id -"),
        ({"input_ids": ids.float()}, "integers"),
        ({"input_ids": ids[0]}, r"shape \(B, T\)"),
        ({"input_ids": ids[:, :0]}, r"shape \(B, T\)"),
        ({"input_ids": ids, "inputs_embeds": embeds}, "exactly one"),
        ({}, "exactly one"),
        ({"inputs_embeds": embeds[..., :20]}, r"\(B, T, 24\)"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 5)}, r"shape \(2, 5\); it must be \(2, 6\)"),
        ({"input_ids": ids, "attention_mask": torch.ones(6)}, r"it must be \(2, 6\)"),
        ({"input_ids": ids, "position_ids": torch.arange(5)}, "position_ids has shape"),
        ({"input_ids": ids, "position_ids": torch.arange(60, 66)}, "max_position_embeddings 64"),
        ({"input_ids": ids, "position_ids": torch.arange(-1, 5)}, "run from -1"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, "max_position_embeddings 64"),
        ({"input_ids": ids, "cache_position": torch.arange(1, 7)}, "cache_position must be 0 to 5"),
        ({"input_ids": ids, "labels": ids[:, :5]}, r"labels have shape \(2, 5\)"),
        ({"input_ids": ids, "labels": beyond}, "label 40"),
    ]
    for inputs, message in wrong:
        with pytest.raises(UsageError, match=message):
            model(**inputs)
    classifier = dataclasses.replace(SMALL, pad_token_id=None)
    kind = "Gemma2ForSequenceClassification"
    with pytest.raises(UsageError, match="pad_token_id"):
        reference_model(classifier, kind, random_state(classifier, kind))(ids)
