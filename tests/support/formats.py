"""What tests of formats share: writing in a named format, equality bit for bit, and the oracles."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ToolError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.write import write_output
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.options import write_options


def write_as(
    name: str, checkpoint: Checkpoint, path: Path, *, threads: int = 2, memory: int = 1 << 20, **options: object
) -> Path:
    """Write ``checkpoint`` in the format ``name`` through the pipeline's writer; returns ``path``."""
    output = registry.by_name(name).layout(checkpoint, write_options(name=path.name, **options))
    with Staging(path, expected_bytes=output.nbytes, folder=not output.single_file) as staging:
        sinks = {file.name: staging.file(file.name, file.size) for file in output.files}
        write_output(output, sinks, threads=threads, memory=memory)
        for asset, data in output.assets.items():
            staging.write_bytes(asset, data)
        staging.commit()
    return path


def suffix_of(name: str) -> str:
    """What the name of a destination in the format ``name`` ends in; empty for a folder."""
    return next(iter(registry.FACTS[name].suffixes), "")


def assert_same_tensors(expected: Checkpoint, actual: Checkpoint, *, dtypes: bool = True) -> None:
    """Equal names and, bit for bit, equal values; with ``dtypes``, also equal types."""
    assert expected.tensors.keys() == actual.tensors.keys()
    for name, tensor in expected.tensors.items():
        expected_values, actual_values = tensor.load(), actual.tensors[name].load()
        if dtypes:
            assert expected_values.dtype == actual_values.dtype, name
            assert expected_values.tobytes() == actual_values.tobytes(), name
        else:
            assert expected_values.shape == actual_values.shape, name
            assert expected_values.astype(np.float32).tobytes() == actual_values.astype(np.float32).tobytes(), name


def assert_ranges_agree(checkpoint: Checkpoint) -> None:
    """Every tensor gives the same rows in any order and in ranges of any length."""
    for name, tensor in checkpoint.tensors.items():
        whole = tensor.load()
        assert whole.shape == tensor.shape and whole.dtype == tensor.dtype, name
        for first in reversed(range(0, tensor.rows, max(tensor.rows // 3, 1))):
            last = min(first + max(tensor.rows // 3, 1) + 5, tensor.rows)
            assert np.array_equal(tensor.load_rows(first, last), whole[first:last]), name


def assert_true_logits(oracles: Path, checkpoint: Checkpoint, flavour: str) -> None:
    """Float32 logits within rounding of those that Google's gemma_pytorch gives for these weights."""
    from gemma2tool.reference.streaming import logits

    ids = np.load(oracles / "checkpoints" / "ids.npy")
    truth = np.load(oracles / "checkpoints" / "gemma_pytorch" / flavour / "logits.npy")
    actual = logits(checkpoint, ids)
    assert (np.abs(actual - truth) <= 5e-5 + 1e-5 * np.abs(truth)).all(), np.abs(actual - truth).max()


def truth_of(oracles: Path, flavour: str) -> Checkpoint:
    """The oracles' weights as the transformers conversion script wrote them."""
    return registry.open_checkpoint(oracles / "checkpoints" / "hf" / flavour)


def oracle_config(oracles: Path, flavour: str):
    """The oracles' config, for formats that store none."""
    return truth_of(oracles, flavour).config


@contextmanager
def refused(match: str):
    """Expects a ``ToolError`` whose message matches, after less than a second of work."""
    started = time.process_time()
    with pytest.raises(ToolError, match=match) as caught:
        yield caught
    assert time.process_time() - started < 1
    assert "\n" not in caught.value.message
