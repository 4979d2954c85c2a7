"""Which bytes of a remote file are fetched, in which order and how often."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.pipeline import write
from gemma2tool.pipeline.conversion import save
from gemma2tool.sources import readahead
from gemma2tool.sources.readahead import ReadAhead
from gemma2tool.sources.remote import Digest
from gemma2tool.storage.attached import AttachedFolder, SourceFile
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import suffix_of, write_as

SEGMENT, WINDOW = 100_000, 500_000
DATA = bytes(range(251)) * 4000


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "SEGMENT", SEGMENT)
    monkeypatch.setattr(readahead, "AHEAD", 2 * SEGMENT)
    monkeypatch.setattr(readahead, "WINDOW", WINDOW)
    monkeypatch.setattr(write, "ANNOUNCED", WINDOW)


class RecordedFile:
    """A remote file in memory; ``ranges`` are those that were fetched, in the order of the requests."""

    where, version = "memory", "1"
    digest: Digest | None = None

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.ranges: list[tuple[int, int]] = []

    @contextmanager
    def stream(self, offset: int, nbytes: int) -> Iterator[Iterator[bytes]]:
        self.ranges.append((offset, offset + nbytes))
        yield iter([self.data[offset : offset + nbytes]])

    def wait_for(self, count: int) -> None:
        """Wait until there were ``count`` requests, and a little for one more."""
        end = time.monotonic() + 20
        while len(self.ranges) < count and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(self.ranges) == count


def take(source: ReadAhead, file: RecordedFile, first: int, nbytes: int) -> None:
    """Read ``nbytes`` bytes as a reader does."""
    data = bytearray(nbytes)
    done = 0
    while done < nbytes:
        done += source.read(file, first + done, memoryview(data)[done:], 0)
    assert data == file.data[first : first + nbytes]


def test_the_window_is_full_of_what_was_announced_and_stays_full() -> None:
    source, file = ReadAhead(), RecordedFile(DATA)
    source.announce(file, 0, 700_000)
    source.announce(file, 100_000, len(DATA))  # what is known already is not announced twice
    file.wait_for(WINDOW // SEGMENT)
    take(source, file, 0, SEGMENT)
    file.wait_for(WINDOW // SEGMENT + 1)
    take(source, file, SEGMENT, len(DATA) - SEGMENT)
    assert sorted(file.ranges) == [(first, min(first + SEGMENT, len(DATA))) for first in range(0, len(DATA), SEGMENT)]
    source.close()


def test_a_reader_that_takes_another_order_ends_what_it_announced() -> None:
    """Otherwise the rest would be fetched for the window, given up for what is read, and fetched again."""
    source, file = ReadAhead(), RecordedFile(DATA)
    source.announce(file, 0, len(DATA))
    file.wait_for(WINDOW // SEGMENT)
    for first in range(900_000, 400_000, -SEGMENT):
        take(source, file, first, SEGMENT)
    take(source, file, 0, 5 * SEGMENT)
    assert sum(end - first for first, end in file.ranges) <= len(DATA) + WINDOW
    source.close()


def test_small_ranges_that_were_announced_are_fetched_as_they_are() -> None:
    """A small read is otherwise widened, into what will be read much later."""
    source, file = ReadAhead(), RecordedFile(DATA)
    ranges = [(0, 300_000), (300_000, 2_000), (700_000, 1_000)]
    for first, nbytes in ranges:
        source.announce(file, first, nbytes)
    for first, nbytes in ranges:
        take(source, file, first, nbytes)
    assert sum(end - first for first, end in file.ranges) == sum(nbytes for _, nbytes in ranges)
    source.close()


@pytest.mark.parametrize("name", ["hf", "gemma-pytorch", "gguf"])
def test_tensors_are_fetched_once_while_others_are_written(name: str, tmp_path: Path) -> None:
    """Parts of a fused tensor too."""
    config = replace(SMALL, num_hidden_layers=2, layer_types=SMALL.layer_types[:2])
    local = write_as(name, random_checkpoint(BFLOAT16, config), tmp_path / f"model{suffix_of(name)}")
    paths = [local] if local.is_file() else [path for path in sorted(local.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(local.parent)): RecordedFile(path.read_bytes()) for path in paths}
    source = ReadAhead()
    attached = {key: SourceFile(file.size, source.opener(file)) for key, file in files.items()}
    folder = AttachedFolder("model", "memory", attached, place=tmp_path)
    with registry.open_checkpoint(folder.path / local.name, config=config if local.is_file() else None) as checkpoint:
        before = sum(end - first for file in files.values() for first, end in file.ranges)
        announced = count_announced(source)
        save(checkpoint, tmp_path / "out", to="hf")
        fetched = sum(end - first for file in files.values() for first, end in file.ranges) - before
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert fetched <= total
    assert sum(announced) >= 0.9 * total
    folder.close()
    source.close()


def count_announced(source: ReadAhead) -> list[int]:
    """Bytes of each announcement from now on."""
    counts: list[int] = []
    announce = source.announce

    def counted(file: RecordedFile, offset: int, nbytes: int) -> None:
        counts.append(nbytes)
        announce(file, offset, nbytes)

    source.announce = counted  # type: ignore[method-assign, assignment]
    return counts
