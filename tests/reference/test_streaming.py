"""Streaming: the same numbers as the model in memory, in little memory, whatever the size of the blocks."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.errors import UsageError
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.reference import readahead, streaming
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.readahead import ReadAhead
from gemma2tool.reference.streaming import StreamedForward
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


@pytest.mark.peer
@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    config=CONFIGS,
    block=st.sampled_from([1, 200, 1000, 1 << 20]),
    side=st.sampled_from(["none", "left", "right"]),
    seed=st.integers(0, 999),
)
def test_streamed_equals_whole_equals_transformers(config, block, side, seed):
    state = random_state(config, CAUSAL, seed)
    mask = padding(side, 3, 13)
    ids = prompts((3, 13), config.vocab_size, seed)
    real = torch.ones(3, 13, dtype=torch.bool) if mask is None else mask.bool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readahead, "BLOCK_BYTES", block)
        seen = {}
        actual = streaming.logits(
            checkpoint_of(config, state), ids.numpy(), attention_mask=mask, on_layer=seen.__setitem__, threads=1
        )
    assert actual.dtype == np.float32
    actual = torch.from_numpy(actual)
    expected = transformers_model(config, CAUSAL, state)(ids, attention_mask=mask, output_hidden_states=True)
    assert_agree(actual[real], expected.logits[real])
    whole = reference_model(config, CAUSAL, state)(ids, attention_mask=mask, output_hidden_states=True)
    assert_agree(actual[real], whole.logits[real])
    assert list(seen) == list(range(config.num_hidden_layers + 1))
    for layer in range(config.num_hidden_layers):  # the model's last hidden state has the final norm applied
        assert_agree(seen[layer][real], expected.hidden_states[layer][real])


@pytest.mark.slow
@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_stored_types_widen_exactly(stored):
    state = random_state(SMALL, CAUSAL)
    narrow = {name: tensor.numpy().astype(stored) for name, tensor in state.items()}
    checkpoint = checkpoint_of(SMALL, state)
    checkpoint.tensors = {name: ArrayTensor(array) for name, array in narrow.items()}
    rounded = {name: torch.from_numpy(array.astype(np.float32)) for name, array in narrow.items()}
    ids = prompts((2, 11), SMALL.vocab_size, 2)
    expected = reference_model(SMALL, CAUSAL, rounded)(ids).logits
    assert_agree(torch.from_numpy(streaming.logits(checkpoint, ids)), expected)
    assert_agree(Gemma2ForCausalLM.from_checkpoint(checkpoint)(ids).logits, expected)
    double = StreamedForward(checkpoint, ids, dtype=torch.float64).last_hidden_state()
    assert double.dtype == torch.float64
    assert_agree(double, reference_model(SMALL, CAUSAL, rounded).model(ids).last_hidden_state)


def test_low_precision_streams_the_same_bits():
    state = random_state(SMALL, CAUSAL)
    ids = prompts((2, 11), SMALL.vocab_size, 2)
    checkpoint = checkpoint_of(SMALL, state)
    whole = Gemma2ForCausalLM.from_checkpoint(checkpoint, dtype=torch.bfloat16)
    assert whole.model.norm.weight.dtype == torch.bfloat16
    streamed = streaming.logits(checkpoint, ids, dtype=torch.bfloat16)
    assert np.array_equal(streamed, whole(ids).logits.float().numpy())


@pytest.mark.parametrize("stored", [np.uint8, np.uint16, np.int32, np.uint32, np.uint64])
def test_ids_of_any_integer_type(stored):
    checkpoint, ids = checkpoint_of(SMALL, random_state(SMALL, CAUSAL)), prompts((2, 6), 40, 1).numpy()
    assert np.array_equal(streaming.logits(checkpoint, ids.astype(stored)), streaming.logits(checkpoint, ids))
    with pytest.raises(UsageError, match="token id 200"):
        streaming.logits(checkpoint, np.full((1, 2), 200, stored))


def test_a_shorter_window_may_be_set():
    state = random_state(SMALL, CAUSAL)
    ids = prompts((1, 12), SMALL.vocab_size, 2)
    shorter = dataclasses.replace(SMALL, sliding_window=2)
    actual = torch.from_numpy(streaming.logits(checkpoint_of(SMALL, state), ids, sliding_window=2))
    assert_agree(actual, reference_model(shorter, CAUSAL, state)(ids).logits)
    with pytest.raises(AssertionError):
        assert_agree(actual, reference_model(SMALL, CAUSAL, state)(ids).logits)


def test_logits_by_vocabulary_and_by_position(monkeypatch):
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 600)
    state, ids = random_state(SMALL, CAUSAL), prompts((2, 11), SMALL.vocab_size, 2)
    checkpoint = checkpoint_of(SMALL, state)
    whole = streaming.logits(checkpoint, ids)
    run = StreamedForward(checkpoint, ids)
    bounds = []
    for first, last, logits in run.vocabulary_slices():
        bounds.append((first, last))
        assert np.array_equal(logits.numpy(), whole[:, :, first:last])
    assert len(bounds) > 2 and bounds[0][0] == 0 and bounds[-1][1] == SMALL.vocab_size
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    chunks = list(run.position_chunks(4))
    assert [(first, last) for first, last, _ in chunks] == [(0, 4), (4, 8), (8, 11)]
    assert_agree(torch.from_numpy(np.concatenate([part for *_, part in chunks], axis=1)), torch.from_numpy(whole))


@pytest.mark.slow
@pytest.mark.peer
def test_untied_head_and_biases_stream():
    config = dataclasses.replace(SMALL, tie_word_embeddings=False, attention_bias=True)
    state, ids = random_state(config, CAUSAL), prompts((2, 9), SMALL.vocab_size, 2)
    assert_agree(
        torch.from_numpy(streaming.logits(checkpoint_of(config, state), ids)),
        transformers_model(config, CAUSAL, state)(ids).logits,
    )


def test_hidden_states_show_where_two_models_diverge():
    state = random_state(SMALL, CAUSAL)
    wrong = dict(state)
    name = "model.layers.2.mlp.up_proj.weight"
    wrong[name] = state[name].flip(0)
    ids = prompts((1, 9), SMALL.vocab_size, 2)
    reference, candidate = (
        StreamedForward(checkpoint_of(SMALL, state), ids),
        StreamedForward(checkpoint_of(SMALL, wrong), ids),
    )
    differences = list(streaming.compare_hidden_states(reference, candidate))
    assert [difference.layers for difference in differences] == [0, 1, 2, 3, 4]
    assert all(step.largest == step.rms == step.relative == 0 for step in differences[:3])
    assert all(step.relative > 0.1 for step in differences[3:])
    assert np.abs(reference.logits() - candidate.logits()).max() > 0.1


def test_inputs_of_every_projection_are_passed():
    """Calibration gets the input of each projection, by the name of its weight."""
    state, ids = random_state(SMALL, CAUSAL), prompts((2, 7), SMALL.vocab_size, 2)
    seen = {}
    streaming.logits(checkpoint_of(SMALL, state), ids, on_input=seen.__setitem__)
    model, hooked = reference_model(SMALL, CAUSAL, state), {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: hooked.__setitem__(f"{name}.weight", args[0]))
    model(ids)
    matrices = {spec.name for spec in tensor_specs(SMALL).values() if len(spec.shape) == 2 and spec.required}
    assert set(seen) == matrices
    for name, x in hooked.items():
        assert_agree(seen[name], x, name)


@pytest.mark.slow
@pytest.mark.parametrize("few", [1, 256])
def test_same_bits_from_run_to_run(few, monkeypatch):
    """And, while only the projections are shared among threads, with any number of them."""
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 600)
    monkeypatch.setattr(streaming, "FEW_TOKENS", few)
    state, ids = random_state(SMALL, CAUSAL), prompts((2, 30), SMALL.vocab_size, 2)
    checkpoint = checkpoint_of(SMALL, state)
    before = torch.get_num_threads()
    runs = [streaming.logits(checkpoint, ids, threads=3) for _ in range(4)]
    assert all(np.array_equal(runs[0], run) for run in runs[1:])
    alone = streaming.logits(checkpoint, ids, threads=1)
    assert_agree(torch.from_numpy(alone), torch.from_numpy(runs[0]))
    assert few == 1 or np.array_equal(alone, runs[0])
    assert torch.get_num_threads() == before


def test_equal_weights_give_equal_bits_for_any_stored_type(monkeypatch):
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 600)
    state, ids = random_state(SMALL, CAUSAL), prompts((2, 12), SMALL.vocab_size, 2)
    narrow = {name: tensor.numpy().astype(ml_dtypes.bfloat16) for name, tensor in state.items()}
    results = []
    for stored in (ml_dtypes.bfloat16, np.float32):
        checkpoint = checkpoint_of(SMALL, state)
        checkpoint.tensors = {name: ArrayTensor(array.astype(stored)) for name, array in narrow.items()}
        results.append(streaming.logits(checkpoint, ids))
    assert np.array_equal(*results)


def test_wrong_inputs_get_clear_errors():
    checkpoint = checkpoint_of(SMALL, random_state(SMALL, CAUSAL))
    ids = prompts((2, 6), 40, 1)
    for inputs, options, message in [
        (ids + 40, {}, "vocabulary of 40"),
        (ids[0], {}, r"shape \(B, T\)"),
        (ids, {"attention_mask": torch.ones(2, 7)}, r"must be \(2, 6\)"),
        (ids.repeat(1, 11), {}, "max_position_embeddings 64"),
    ]:
        with pytest.raises(UsageError, match=message):
            StreamedForward(checkpoint, inputs, **options)
    del checkpoint.tensors["model.norm.weight"]
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        Gemma2ForCausalLM.from_checkpoint(checkpoint)


# -- reading ahead ----------------------------------------------------------------------------------------------------


class Counted(ArrayTensor):
    """Records how many of its bytes have been read, and fails at a given row."""

    def __init__(self, array, fails_at=None):
        super().__init__(array)
        self.fails_at, self.read = fails_at, 0

    def load_rows(self, first, last):
        if self.fails_at is not None and first <= self.fails_at < last:
            raise OSError("disk gone")
        rows = super().load_rows(first, last)
        self.read += rows.nbytes
        return rows


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_come_in_order_and_no_more_than_the_budget_ahead(threads, monkeypatch):
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 4000)
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 1200)
    tensors = {
        name: Counted(np.arange(20000, dtype=np.float32).reshape(200, 100) * k) for name, k in [("a", 1), ("b", 2)]
    }
    used, by = 0, set()

    def copy(first, last, rows):
        assert last - first <= 3
        by.add(threading.get_ident())
        return rows.copy()

    with ReadAhead(tensors, threads) as ahead:
        for name, tensor in tensors.items():
            got = []
            for first, last, rows in ahead.map(name, copy):
                assert first == sum(map(len, got)) and last == first + len(rows)
                got.append(rows)
                used += rows.nbytes
                read = sum(tensor.read for tensor in tensors.values())
                # read and unused, at most a block more for each thread; and as many results as may wait to be taken
                assert read - used <= max(4000, 1200 * 2 * threads) + 1200 * threads + 1200 * 2 * threads
            assert np.array_equal(np.concatenate(got), tensor.array)
    assert threading.get_ident() not in by and len(by) <= threads


def test_one_product_is_shared_among_threads(monkeypatch):
    """Two blocks are in use at the same time: each waits for the other."""
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 16)
    together = threading.Barrier(2, timeout=20)
    with ReadAhead({"a": ArrayTensor(np.zeros((2, 4), np.float32))}, 2) as ahead:
        assert len(list(ahead.map("a", lambda *_: together.wait()))) == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_read_is_raised_where_the_block_is_used(threads, monkeypatch):
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 32)
    tensors = {"a": Counted(np.zeros((10, 4), np.float32)), "b": Counted(np.zeros((10, 4), np.float32), fails_at=7)}
    with ReadAhead(tensors, threads) as ahead:
        assert len(list(ahead.map("a", lambda *_: None))) == 5
        blocks = ahead.map("b", lambda *_: None)
        assert [next(blocks)[0] for _ in range(3)] == [0, 2, 4]
        with pytest.raises(OSError, match="disk gone"):
            next(blocks)


def test_a_failing_use_is_raised_too():
    with ReadAhead({"a": ArrayTensor(np.zeros((2, 4), np.float32))}, 2) as ahead, pytest.raises(ZeroDivisionError):
        list(ahead.map("a", lambda *_: 1 // 0))
    with ReadAhead({"a": ArrayTensor(np.zeros((2, 4), np.float32))}, 2) as ahead, pytest.raises(KeyError):
        next(ahead.map("b", lambda *_: None))


def test_the_thread_setting_is_restored_by_the_last_user():
    tensor = ArrayTensor(np.zeros((2, 4), np.float32))
    with streaming.use_threads(2), ReadAhead({"a": tensor}, 1) as one, ReadAhead({"a": tensor}, 1) as other:
        left, right = one.map("a", lambda *_: None), other.map("a", lambda *_: None)
        next(left), next(right)
        assert torch.get_num_threads() == 1
        left.close()
        assert torch.get_num_threads() == 1
        right.close()
        assert torch.get_num_threads() == 2


def test_an_abandoned_run_leaves_no_thread(monkeypatch):
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 100)
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 600)
    run = StreamedForward(checkpoint_of(SMALL, random_state(SMALL, CAUSAL)), prompts((1, 5), 40, 1))
    states = run.hidden_states()
    next(states), next(states)
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    states.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


MEMORY = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import BFLOAT16, LazyTensor
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.reference import streaming

class Made(LazyTensor):
    dtype, stored, origin = BFLOAT16, "bf16", "synthetic"
    def __init__(self, shape): self.shape = shape
    def load_rows(self, first, last): return np.full((last - first, *self.shape[1:]), 0.01, BFLOAT16)

torch.set_num_threads(1)
config = Gemma2Config(vocab_size=64000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=12, head_dim=128)
tensors = {{name: Made(spec.shape) for name, spec in tensor_specs(config).items() if spec.required}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
streaming.logits(Checkpoint(Path("m"), FormatFacts("synthetic"), config, tensors), np.ones((1, 4), np.int64))
print(peak() - before, sum(tensor.nbytes for tensor in tensors.values()))
"""


@pytest.mark.slow
def test_peak_memory_is_a_fraction_of_the_model():
    """A model of 900 MiB in bfloat16 (1.8 GiB as float32) runs in the memory of the read-ahead and a few blocks."""
    script = MEMORY.format()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    grown, model = map(int, done.stdout.split())
    assert model > 700 << 20
    assert grown < readahead.AHEAD_BYTES + 128 * (1 << 20)
