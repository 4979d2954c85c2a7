"""A collection: its gradients, what it predicts, and that it continues where it was interrupted."""

from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.pipeline.calibration.head import final_norm
from gemma2tool.pipeline.sensitivity.candidates import Inputs, values
from gemma2tool.pipeline.sensitivity.collect import Collection, SensitivityOptions
from gemma2tool.pipeline.sensitivity.head import Head, divergence
from gemma2tool.pipeline.sensitivity.layer import LoadedLayer
from gemma2tool.pipeline.sensitivity.measured import window_divergence
from gemma2tool.pipeline.sensitivity.partial import Partial
from gemma2tool.pipeline.sensitivity.run import SensitivityPaths, collect_sensitivity
from gemma2tool.pipeline.sensitivity.windows import read_windows
from gemma2tool.reference.model import Gemma2ForCausalLM
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.compare.logits import compare_logits
from tests.support.checkpoints import SMALL, random_checkpoint

QUICK = SensitivityOptions(rounding="nearest", types=("q4_0", "q8_0"), windows=4, measure="none")


@pytest.fixture
def source() -> Checkpoint:
    return random_checkpoint(ml_dtypes.bfloat16)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A long row of token ids: 24 windows of 32."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, SMALL.vocab_size, 24 * 32))
    return path


def collection(source: Checkpoint, ids: Path, options: SensitivityOptions) -> Collection:
    windows = read_windows(source, ids, None, samples=options.samples, length=32, windows=options.windows)
    return Collection(source, windows, options.types, options, map)


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_model(source: Checkpoint, ids: Path) -> None:
    collected = collection(source, ids, QUICK)
    collected.start()
    drawn = Head(source, collected.final).drawn
    model = Gemma2ForCausalLM.from_checkpoint(source)
    x = collected.embeddings(collected.windows.evaluation).requires_grad_()
    logits = model(inputs_embeds=x).logits
    loss = logits.flatten(0, 1).log_softmax(1).gather(1, drawn[:, None]).sum()
    (expected,) = torch.autograd.grad(loss, x)
    assert torch.allclose(collected.gradients[0], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    following = torch.from_numpy(collected.windows.evaluation[:, 1:])[..., None]
    perplexity = torch.exp(-logits[:, :-1].log_softmax(-1).gather(2, following).mean())
    assert collected.perplexity == pytest.approx(float(perplexity.detach()), rel=1e-4)


def test_drawn_tokens_follow_the_model(source: Checkpoint) -> None:
    hidden = torch.randn(1, SMALL.hidden_size).expand(4000, -1)
    head = Head(source, hidden)
    probabilities = torch.zeros(SMALL.vocab_size).index_add_(0, head.drawn, torch.full((4000,), 1 / 4000))
    embedding = torch.from_numpy(source.tensors[EMBEDDING].load_rows_f32(0, SMALL.vocab_size))
    logits = hidden[:1] @ embedding.T
    cap = SMALL.final_logit_softcapping
    assert cap is not None
    expected = (torch.tanh(logits / cap) * cap).softmax(1)[0]
    assert torch.allclose(probabilities, expected, atol=0.03)


def test_divergence_is_that_of_the_verification(source: Checkpoint, ids: Path) -> None:
    other = random_checkpoint(ml_dtypes.bfloat16, seed=1)
    windows = np.load(ids)[: 5 * 32].reshape(5, 32)
    expected = compare_logits(source, other, windows).metrics.kl.reshape(5, 32).mean(1)
    assert np.allclose(window_divergence(source, other, windows), expected, rtol=1e-4)


def test_each_side_of_a_divergence_has_its_own_soft_cap(source: Checkpoint, ids: Path) -> None:
    windows = np.load(ids)[: 2 * 32].reshape(2, 32)
    uncapped = dataclasses.replace(source, config=dataclasses.replace(SMALL, final_logit_softcapping=None))
    a, b = (torch.from_numpy(StreamedForward(side, windows).logits()).log_softmax(-1) for side in (source, uncapped))
    expected = (a.exp() * (a - b)).sum(-1).mean(1)
    kl = window_divergence(source, uncapped, windows, threads=1)
    assert kl.min() > 1e-3 and np.allclose(kl, expected, rtol=1e-3)


def test_a_divergence_has_the_threads_that_are_asked_for(
    source: Checkpoint, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    original = StreamedForward.hidden_states

    def watched(self: StreamedForward) -> object:
        used.append(torch.get_num_threads())
        return original(self)

    monkeypatch.setattr(StreamedForward, "hidden_states", watched)
    window_divergence(source, source, np.load(ids)[None, :32], threads=3)
    assert set(used) == {3}


def test_a_divergence_that_is_not_a_number_is_refused(source: Checkpoint, ids: Path) -> None:
    broken = {**source.tensors, EMBEDDING: ArrayTensor(np.full(source.tensors[EMBEDDING].shape, np.nan, np.float32))}
    with pytest.raises(InputRefused) as refused:
        window_divergence(source, dataclasses.replace(source, tensors=broken), np.load(ids)[None, :32])
    assert refused.value.id == "sensitivity.nonfinite"


@pytest.mark.slow
def test_second_order_is_what_is_measured(fixture_dir: Path) -> None:
    """In the trained fixture; a random model's predictions are too certain for a drawn token to say much."""
    options = dataclasses.replace(QUICK, types=("q4_k",), measure="all")
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as trained:
        windows = read_windows(
            trained, fixture_dir / "heldout.txt", None, samples=8, length=96, windows=options.windows
        )
        collected = Collection(trained, windows, options.types, options, map)
        streams = collected.start()
        for index in range(5):
            collected.skip(index, streams)
        layer = collected.layer(5, streams, lambda *_: None)
        entries = [types["q4_k"] for types in layer.values()]
        entries.append(collected.head(streams, lambda *_: None)["q4_k"])
    second_order, measured = (np.array([getattr(e, n).mean for e in entries]) for n in ("second_order", "measured"))
    assert np.all((second_order / measured > 0.4) & (second_order / measured < 2.5))
    assert second_order.sum() == pytest.approx(measured.sum(), rel=0.15)


@pytest.mark.slow
def test_types_that_do_not_divide_rows_are_replaced(source: Checkpoint, ids: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, types=("q4_k",), length=32)
    result = collect_sensitivity(source, SensitivityPaths(tmp_path / "t.json", ids), options)
    assert result.table.types == ("q5_0",)  # 64 and 96 columns


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["calibration", "imatrix"])
def test_an_interrupted_collection_is_continued(
    rounding: str, source: Checkpoint, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(QUICK, rounding=rounding, length=32)
    whole = collect_sensitivity(source, SensitivityPaths(tmp_path / "whole.json", ids), options).table
    layers: list[int] = []
    original = Collection.layer

    def stopped(self: Collection, index: int, *arguments: object) -> object:
        layers.append(index)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return original(self, index, *arguments)

    monkeypatch.setattr(Collection, "layer", stopped)
    paths = SensitivityPaths(tmp_path / "t.json", ids)
    with pytest.raises(KeyboardInterrupt) as stop:
        collect_sensitivity(source, paths, options)
    assert "the same command continues" in stop.value.__notes__[0]
    assert not paths.out.exists() and (tmp_path / "t.json.partial").exists()
    table = collect_sensitivity(source, paths, options).table
    assert layers == [0, 1, 1, 2]
    assert table == whole and paths.out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "t.json", "whole.json"]


@pytest.fixture
def unfinished(source: Checkpoint, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SensitivityPaths:
    """A collection with ``QUICK`` that was interrupted after two layers."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    paths = SensitivityPaths(tmp_path / "t.json", ids)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Collection, "head", stopped)
        collect_sensitivity(source, paths, dataclasses.replace(QUICK, length=32))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"types": ("q4_0",)}, "candidates was q4_0,q8_0, is q4_0"),
        ({"measure": "all"}, "measure was none, is all"),
        ({"rounding": "calibration", "damping": 0.1}, "damping was 0.01, is 0.1"),
        ({"rounding": "calibration", "hessian_block": 32}, "hessian-block was None, is 32"),
        ({"windows": 3}, "text was 4 windows of 32 tokens"),
    ],
)
def test_what_another_collection_left_is_not_continued(
    change: dict[str, object], words: str, source: Checkpoint, unfinished: SensitivityPaths
) -> None:
    options = dataclasses.replace(QUICK, length=32, **change)
    with pytest.raises(UsageError) as refused:
        collect_sensitivity(source, unfinished, options)
    assert (
        refused.value.id == "resume.mismatch" and words in refused.value.message and "--restart" in refused.value.hint
    )
    table = collect_sensitivity(source, unfinished, dataclasses.replace(options, restart=True)).table
    assert table.complete and table.types == options.types
    assert not (unfinished.out.with_name("t.json.partial")).exists()


@pytest.mark.slow
def test_a_damaged_file_of_an_interrupted_collection_is_not_continued(
    source: Checkpoint, unfinished: SensitivityPaths, logged: StringIO
) -> None:
    path = unfinished.out.with_name("t.json.partial")
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], b"{}", whole.replace(b"sensitivity/1", b"sensitivity/9")):
        path.write_bytes(damaged)
        assert Partial(unfinished.out, False).read({}) is None
        assert "starts over" in logged.getvalue()
        logged.truncate(0)


def test_a_text_that_is_too_short_is_refused(source: Checkpoint, ids: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, windows=13, length=32)
    with pytest.raises(UsageError) as refused:
        collect_sensitivity(source, SensitivityPaths(tmp_path / "t.json", ids), options)
    assert refused.value.id == "sensitivity.short" and "24 windows" in refused.value.message


def test_values_that_are_not_finite_are_refused(source: Checkpoint, ids: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    huge = np.full(source.tensors[name].shape, 3e38, ml_dtypes.bfloat16)
    broken = dataclasses.replace(source, tensors={**source.tensors, name: ArrayTensor(huge)})
    with pytest.raises(InputRefused) as refused:
        collect_sensitivity(broken, SensitivityPaths(tmp_path / "t.json", ids), dataclasses.replace(QUICK, length=32))
    assert refused.value.id == "sensitivity.nonfinite" and "layer 1" in refused.value.message


@pytest.mark.slow
def test_a_text_that_the_model_does_not_know_is_named(
    source: Checkpoint, ids: Path, tmp_path: Path, logged: StringIO
) -> None:
    collect_sensitivity(source, SensitivityPaths(tmp_path / "t.json", ids), dataclasses.replace(QUICK, length=32))
    assert "perplexity" in logged.getvalue() and "ids.npy" in logged.getvalue()


@pytest.mark.slow
def test_a_layer_is_loaded_once_for_all_measurements_of_a_type(
    source: Checkpoint, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    heads: list[Head] = []
    load, build = LoadedLayer.__init__, Head.__init__

    def counted_load(self: LoadedLayer, checkpoint: Checkpoint, index: int, *arguments: object) -> None:
        loaded.append(index)
        load(self, checkpoint, index, *arguments)

    def counted_build(self: Head, *arguments: object) -> None:
        heads.append(self)
        build(self, *arguments)

    monkeypatch.setattr(LoadedLayer, "__init__", counted_load)
    monkeypatch.setattr(Head, "__init__", counted_build)
    collected = collection(source, ids, dataclasses.replace(QUICK, measure="all"))
    streams = collected.start()
    loaded.clear()
    entries = collected.layer(0, streams, lambda *_: None)
    assert loaded == [0, 1, 2, 1, 2]  # the layer, then those behind it for each of two types
    collected.head(streams, lambda *_: None)
    assert len(heads) == 1
    name = "model.layers.0.mlp.up_proj.weight"
    changed = ArrayTensor(values("q4_0", source.tensors[name].load_rows_f32(0, SMALL.intermediate_size), Inputs()))
    other = dataclasses.replace(source, tensors={**source.tensors, name: changed})
    kl = window_divergence(source, other, collected.windows.evaluation)
    assert entries[name]["q4_0"].measured.mean == pytest.approx(kl.mean(), rel=1e-4)


def test_the_head_of_the_candidate_counts(source: Checkpoint) -> None:
    x = torch.randn(8, SMALL.hidden_size)
    embedding = torch.from_numpy(source.tensors[EMBEDDING].load_rows_f32(0, SMALL.vocab_size))
    same = divergence(source, x, x, lambda first, last: embedding[first:last])
    other = divergence(source, x, x, lambda first, last: 1.1 * embedding[first:last])
    assert float(same.max()) < 1e-9 < float(other.min())
    logits = StreamedForward(source, np.array([[2, 5, 7]]))
    assert torch.allclose(final_norm(source)(list(logits.hidden_states())[-1]), logits.last_hidden_state())
