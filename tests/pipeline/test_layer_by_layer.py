"""The forward pass that reads each layer once: the bits of the other one, every value read once, bounded groups."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ResourceError
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import BFLOAT16, Array, LazyTensor
from gemma2tool.pipeline import importance, layer_by_layer, layer_sizes
from gemma2tool.reference.streaming import StreamedForward
from tests.support.checkpoints import SMALL, random_checkpoint


class Counted(LazyTensor):
    """A tensor that counts the rows that are read."""

    def __init__(self, source: LazyTensor, name: str, rows: Counter[str]) -> None:
        self.source, self.name, self.counted = source, name, rows
        self.shape, self.dtype, self.stored, self.origin = source.shape, source.dtype, source.stored, source.origin

    def load_rows(self, first: int, last: int) -> Array:
        self.counted[self.name] += last - first
        return self.source.load_rows(first, last)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 20), (9, 40)])
def test_the_same_bits_as_a_few_prompts_at_a_time(
    checkpoint: Checkpoint, tmp_path: Path, shape: tuple[int, int]
) -> None:
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, shape)
    seen: tuple[list, list] = ([], [])
    states = layer_by_layer.run_layers(
        checkpoint,
        ids,
        batch=4,
        folder=tmp_path,
        advance=lambda *_: None,
        on_input=lambda *input: seen[0].append(input),
    )
    for first, hidden in zip(range(0, len(ids), 4), states, strict=True):
        run = StreamedForward(checkpoint, ids[first : first + 4], on_input=lambda *input: seen[1].append(input))
        assert (run.last_hidden_state() == hidden).all()
    inputs = [{name: [x for other, x in part if other == name] for name, _ in part} for part in seen]
    assert inputs[0].keys() == inputs[1].keys()
    for name, parts in inputs[0].items():
        assert all((a == b).all() for a, b in zip(parts, inputs[1][name], strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_row_of_the_layers_is_read_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Counter[str] = Counter()
    counted = {name: Counted(tensor, name, rows) for name, tensor in checkpoint.tensors.items()}
    ids, done = np.random.default_rng(0).integers(0, SMALL.vocab_size, (10, 16)), []
    options = {"threads": 2, "folder": tmp_path, "advance": lambda count, _: done.append(count)}
    sums = importance.collect(replace(checkpoint, tensors=counted), ids, **options)
    layers = {name: count for name, count in rows.items() if ".layers." in name}
    assert layers == {name: counted[name].rows for name in layers} and sum(done) == ids.size
    assert rows["model.embed_tokens.weight"] == len(np.unique(ids))
    monkeypatch.setattr(layer_sizes, "MAX_STREAM_BYTES", 4 * 16 * SMALL.hidden_size * 4)
    assert layer_sizes.pass_count(SMALL, 10, 16) == 3
    again = importance.collect(replace(checkpoint, tensors=counted), ids, **options)
    assert all((again[name].total() == total.total()).all() for name, total in sums.items())
    assert all(rows[name] == 4 * count for name, count in layers.items())


def test_a_disk_without_room_is_one_line(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layer_by_layer, "preallocate", full)
    with pytest.raises(ResourceError) as caught:
        importance.collect(checkpoint, np.full((2, 8), 3), threads=1, folder=tmp_path)
    assert caught.value.exit_code == 4
