"""What the tests of the exchange formats share: writing in a named format, equality bit for bit, the truth of the
oracles.
"""

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


def assert_same_tensors(expected: Checkpoint, found: Checkpoint, *, dtypes: bool = True) -> None:
    """Equal names and, bit for bit, equal values; ``dtypes``: stored in the same types too."""
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        mine, other = tensor.load(), found.tensors[name].load()
        if dtypes:
            assert mine.dtype == other.dtype, name
            assert mine.tobytes() == other.tobytes(), name
        else:
            assert mine.shape == other.shape, name
            assert mine.astype(np.float32).tobytes() == other.astype(np.float32).tobytes(), name


def assert_ranges_agree(checkpoint: Checkpoint) -> None:
    """Every tensor gives the same rows in any order and in ranges of any length."""
    for name, tensor in checkpoint.tensors.items():
        whole = tensor.load()
        assert whole.shape == tensor.shape and whole.dtype == tensor.dtype, name
        for first in reversed(range(0, tensor.rows, max(tensor.rows // 3, 1))):
            last = min(first + max(tensor.rows // 3, 1) + 5, tensor.rows)
            assert np.array_equal(tensor.load_rows(first, last), whole[first:last]), name


def assert_true_logits(oracles: Path, checkpoint: Checkpoint, flavour: str) -> None:
    """Float32 logits as Google's gemma_pytorch gives them for these weights."""
    from gemma2tool.reference.streaming import logits

    ids = np.load(oracles / "checkpoints" / "ids.npy")
    truth = np.load(oracles / "checkpoints" / "gemma_pytorch" / flavour / "logits.npy")
    found = logits(checkpoint, ids)
    assert (np.abs(found - truth) <= 5e-5 + 1e-5 * np.abs(truth)).all(), np.abs(found - truth).max()


def truth_of(oracles: Path, flavour: str) -> Checkpoint:
    """The weights of the oracles as the transformers conversion script made them."""
    return registry.open_checkpoint(oracles / "checkpoints" / "hf" / flavour)


def oracle_config(oracles: Path, flavour: str):
    """The config of the oracles, for formats that store none."""
    return truth_of(oracles, flavour).config


@contextmanager
def refused(match: str):
    """A ``ToolError`` that says ``match``, in less than a second of work."""
    started = time.process_time()
    with pytest.raises(ToolError, match=match) as caught:
        yield caught
    assert time.process_time() - started < 1
    assert "\n" not in caught.value.message
