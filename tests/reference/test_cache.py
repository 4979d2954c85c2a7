"""The key-value cache and generation: token by token equals one full pass, far beyond the window, with padding, as in
transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.errors import UsageError
from gemma2tool.reference import cache as cache_module
from gemma2tool.reference import layers
from gemma2tool.reference.generate import Sampling, generate, restrict_logits, sample_tokens
from gemma2tool.reference.streaming import StreamedForCausalLM
from tests.reference.test_model import SMALL
from tests.support.reference_peers import (
    CONFIGS,
    assert_agree,
    checkpoint_of,
    padding,
    prompts,
    random_state,
    reference_model,
    transformers_model,
)

CAUSAL = "Gemma2ForCausalLM"


def stepwise(model, ids, mask, pieces):
    """Logits of every position, given to the model in ``pieces`` (their lengths), and the last cache."""
    cache, start, logits = None, 0, []
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for length in pieces:
        end = start + length
        output = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if mask is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        cache, start = output.past_key_values, end
    return torch.cat(logits, dim=1), cache


@pytest.mark.peer
@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    side=st.sampled_from(["none", "left"]),
    prefill=st.integers(1, 12),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_pieces_equal_one_pass_beyond_three_windows(config, side, prefill, chunk, seed):
    length = max(3 * config.sliding_window + 4, prefill + 5)
    state = random_state(config, CAUSAL, seed)
    model, mask = reference_model(config, CAUSAL, state), padding(side, 3, length)
    ids = prompts((3, length), config.vocab_size, seed)
    real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask.bool()
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    exact = reference_model(config, CAUSAL, state).double()
    exact_whole = exact(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    rest = length - prefill
    pieces = [prefill, *[chunk] * (rest // chunk), *([rest % chunk] if rest % chunk else [])]
    logits, cache = stepwise(model, ids, mask, pieces)
    assert_agree(logits[real], whole[real], "logits by pieces")
    exact_logits, _ = stepwise(exact, ids, mask, pieces)
    assert (exact_logits[real] - exact_whole[real]).abs().max() < 1e-9
    if config.sliding_window > 1:  # transformers 5.23 keeps every slot of a window of one, by slicing with [-0:]
        their_logits, _ = stepwise(transformers_model(config, CAUSAL, state), ids, mask, pieces)
        assert_agree(logits[real], their_logits[real], "logits by pieces, of transformers")
    assert cache.get_seq_length() == length
    for layer, (keys, values) in enumerate(cache.layers):
        kept = min(config.sliding_window - 1, length) if config.layer_is_sliding(layer) else length
        assert keys.shape == values.shape == (3, config.num_key_value_heads, kept, config.head_dim)


def test_right_padding_then_more_tokens():
    """A shorter row padded on the right stays masked while both rows continue."""
    model = reference_model(SMALL, CAUSAL, random_state(SMALL, CAUSAL))
    ids, mask = prompts((2, 20), SMALL.vocab_size, 4), torch.ones(2, 20, dtype=torch.long)
    mask[1, 6:9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, _ = stepwise(model, ids, mask, [9] + [1] * 11)
    # What row 1 would be without its padding; the window counts slots, so only global layers make this exact.
    everywhere = dataclasses.replace(SMALL, layer_types=("full_attention",) * 4)
    model = reference_model(everywhere, CAUSAL, random_state(SMALL, CAUSAL))
    logits, _ = stepwise(model, ids, mask, [9] + [1] * 11)
    alone = model(ids[1:, mask[1].bool()], position_ids=positions[1:, mask[1].bool()]).logits
    assert_agree(logits[1:, mask[1].bool()], alone)


def test_the_cache_frees_the_memory_of_dropped_slots():
    cache = cache_module.KeyValueCache(SMALL)
    cache.update(0, torch.zeros(1, 2, 50, 8), torch.zeros(1, 2, 50, 8))
    keys, _ = cache.layers[0]
    assert keys.shape[2] == 3 and keys.untyped_storage().nbytes() == keys.numel() * 4


FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


def _kept(change):
    """A cache whose sliding layers keep the window changed by ``change``, without the current token."""

    def plant(patch):
        original = cache_module.KeyValueCache.__init__

        def init(self, config):
            original(self, config)
            self.windows = [None if window is None else change(window) for window in self.windows]

        patch.setattr(cache_module.KeyValueCache, "__init__", init)

    return plant


@fault
def one_slot_too_few(patch):
    _kept(lambda window: window - 1)(patch)


@fault
def slots_counted_from_what_is_kept(patch):
    """gemma_pytorch's 2024 release and Flax before 2024-09: the mask is built relative to the current rows."""
    original = cache_module.KeyValueCache.update

    def update(self, layer, keys, values):
        keys, values, _ = original(self, layer, keys, values)
        return keys, values, 0

    patch.setattr(cache_module.KeyValueCache, "update", update)
    seen = layers.visible
    patch.setattr(layers, "visible", lambda q, k, window, causal: seen(q - q[0] + (len(k) > 4) * 4, k, window, causal))


@fault
def window_forgotten_while_decoding(patch):
    _kept(lambda window: 10**6)(patch)
    original = layers.Attention._attend

    def attend(self, query, *rest):
        patch.setattr(self, "window", None if query.shape[2] == 1 else self.window)
        return original(self, query, *rest)

    patch.setattr(layers.Attention, "_attend", attend)


@fault
def positions_restart(patch):
    patch.setattr(cache_module.KeyValueCache, "get_seq_length", lambda self: 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_cache_faults_are_detected(name, monkeypatch):
    model, ids = reference_model(SMALL, CAUSAL, random_state(SMALL, CAUSAL)), prompts((2, 17), SMALL.vocab_size, 7)
    whole = model(ids, use_cache=False).logits
    assert_agree(stepwise(model, ids, None, [6] + [1] * 11)[0], whole)
    FAULTS[name](monkeypatch)
    with pytest.raises(AssertionError, match="apart"):
        assert_agree(stepwise(model, ids, None, [6] + [1] * 11)[0], whole)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy_generation_is_that_of_transformers(side):
    config = dataclasses.replace(SMALL, eos_token_id=(5, 11), bos_token_id=2)
    for seed in range(3):
        state = random_state(config, CAUSAL, seed)
        ids, mask = prompts((3, 9), config.vocab_size, seed), padding(side, 3, 9)
        mask = torch.ones_like(ids) if mask is None else mask
        ids = ids * mask
        expected = transformers_model(config, CAUSAL, state).generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=25, use_cache=True
        )[:, 9:]
        model = reference_model(config, CAUSAL, state)
        actual = torch.stack(list(generate(model, ids, attention_mask=mask, max_new_tokens=25)), dim=1)
        assert torch.equal(actual, expected)


@pytest.mark.slow
def test_generation_ends_at_any_eos_token_and_at_the_context():
    state = random_state(SMALL, CAUSAL, 3)
    model, ids = reference_model(SMALL, CAUSAL, state), prompts((1, 9), SMALL.vocab_size, 3)
    endless = list(generate(model, ids, max_new_tokens=1000, eos_token_ids=()))
    assert len(endless) == SMALL.max_position_embeddings - 8  # the last token is not fed back
    fifth = int(endless[4])
    first = next(index for index, token in enumerate(endless) if int(token) == fifth)
    assert len(list(generate(model, ids, max_new_tokens=1000, eos_token_ids=(39 - fifth, fifth)))) <= first + 1


@pytest.mark.slow
def test_a_streamed_model_generates_the_same():
    state = random_state(SMALL, CAUSAL, 2)
    ids, mask = prompts((2, 9), SMALL.vocab_size, 2), padding("left", 2, 9)
    model, streamed = reference_model(SMALL, CAUSAL, state), StreamedForCausalLM(checkpoint_of(SMALL, state))
    actual, expected = (
        list(generate(either, ids, attention_mask=mask, max_new_tokens=12, eos_token_ids=()))
        for either in (streamed, model)
    )
    assert len(actual) == 12 and torch.equal(torch.stack(actual), torch.stack(expected))


@pytest.mark.slow
@pytest.mark.peer
def test_sampling_restricts_as_transformers_does():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(3, 40, generator=generator) * 4
        top_k = int(torch.randint(1, 45, (), generator=generator))
        top_p = float(torch.rand((), generator=generator)) * 0.98 + 0.01
        expected = TemperatureLogitsWarper(0.7)(None, logits.clone())
        expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, expected))
        actual = restrict_logits(logits / 0.7, top_k, top_p)
        assert torch.equal(actual.isinf(), expected.isinf())
        assert torch.allclose(actual.softmax(-1), expected.softmax(-1))


@pytest.mark.slow
def test_sampling_follows_the_probabilities_and_the_seed():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([sample_tokens(logits, Sampling(1.0, top_k=3), generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03)
    model, ids = reference_model(SMALL, CAUSAL, random_state(SMALL, CAUSAL)), prompts((2, 5), SMALL.vocab_size, 1)
    runs = [
        torch.stack(list(generate(model, ids, max_new_tokens=12, sampling=Sampling(1.5, seed=s)))) for s in (3, 3, 4)
    ]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape != runs[2].shape or not torch.equal(runs[0], runs[2])


def test_generation_refuses_what_the_model_cannot_do():
    state = random_state(SMALL, CAUSAL)
    with pytest.raises(UsageError, match="max_position_embeddings 64"):
        next(generate(reference_model(SMALL, CAUSAL, state), prompts((1, 65), 40, 1)))
    with pytest.raises(UsageError, match="vocabulary of 40"):
        next(generate(reference_model(SMALL, CAUSAL, state), torch.tensor([[40]])))
    both_ways = dataclasses.replace(SMALL, use_bidirectional_attention=True)
    with pytest.raises(UsageError, match="bidirectional"):
        next(generate(reference_model(both_ways, CAUSAL, state), prompts((1, 5), 40, 1)))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)
