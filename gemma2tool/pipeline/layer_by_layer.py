"""The forward pass over any number of prompts that reads each layer once.

A layer is held in memory while all prompts run through it, a few at a time; their residual streams wait in a temporary
file without a name. Prompts give the same bits as when they are run a few at a time through all layers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import on_device
from gemma2tool.model.lazy import ArrayTensor, LazyTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.pipeline.layer_sizes import FLOAT, group_size, layer_tensors
from gemma2tool.reference.model import scale_embeddings
from gemma2tool.reference.readahead import ReadAhead, one_thread_each
from gemma2tool.reference.streaming import FEW_TOKENS, OnInput, StreamedForward
from gemma2tool.reference.tensors import to_torch
from gemma2tool.storage.buffers import byte_view
from gemma2tool.storage.syscalls import preallocate, translate_os_errors, write_at

Advance = Callable[[int, str], None]


def run_layers(
    checkpoint: Checkpoint, ids: NDArray[np.int64], *, batch: int, folder: Path, on_input: OnInput, advance: Advance
) -> Iterator[Tensor]:
    """Run ``ids`` (N, T) through all layers, ``batch`` prompts at a time; yields their states (batch, T, D) after the
    final norm. ``folder``: for the temporary file. ``advance``: called with tokens, of N * T in all, and what was done.

    Raises ``ResourceError`` if the disk has no room.
    """
    size = max(group_size(checkpoint.config, ids.shape[1]) // batch, 1) * batch  # batches do not depend on the groups
    for first in range(0, len(ids), size):
        with _Streams(checkpoint.config, ids[first : first + size], folder) as streams:
            yield from _Group(checkpoint, streams, batch, on_input, advance).run()


class _Streams:
    """The residual streams of prompts ``ids`` (N, T), float32, in a file."""

    def __init__(self, config: Gemma2Config, ids: NDArray[np.int64], folder: Path) -> None:
        self.ids, self.width, self.folder = ids, config.hidden_size, folder

    def __enter__(self) -> _Streams:
        nbytes = self.ids.size * self.width * FLOAT
        with translate_os_errors(self.folder, "making room for the residual streams", nbytes):
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix=".gemma2tool-streams-")
            try:
                preallocate(self._file.fileno(), nbytes)
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, position: int, x: Tensor) -> None:
        """Write ``x`` (..., D) from the token ``position`` on, counted through all prompts."""
        with translate_os_errors(self.folder, "keeping the residual streams"):
            data = byte_view(np.ascontiguousarray(x.cpu().numpy()))
            write_at(self._file.fileno(), data, position * self.width * FLOAT)

    def read(self, first: int, count: int) -> Tensor:
        """The streams (count, T, D) of the prompts from ``first`` on."""
        length = self.ids.shape[1]
        out = np.empty((min(count, len(self.ids) - first), length, self.width), np.float32)
        view = byte_view(out)
        with translate_os_errors(self.folder, "reading the residual streams"):
            self._file.seek(first * length * self.width * FLOAT)
            while view:
                got = self._file.readinto(view)
                if not got:
                    raise OSError("the file of residual streams has become shorter")
                view = view[got:]
        return on_device(torch.from_numpy(out))


class _Group:
    """Prompts that run through the layers together."""

    def __init__(
        self, checkpoint: Checkpoint, streams: _Streams, batch: int, on_input: OnInput, advance: Advance
    ) -> None:
        self.checkpoint, self.streams, self.batch = checkpoint, streams, batch
        self.on_input, self.advance = on_input, advance

    def run(self) -> Iterator[Tensor]:
        config, ids = self.checkpoint.config, self.streams.ids
        self._embed()
        layers = [layer_tensors(self.checkpoint, index) for index in range(config.num_hidden_layers)]
        tensors = {name: tensor for layer in layers for name, tensor in layer.items()}
        done = 0
        with ReadAhead(tensors, torch.get_num_threads()) as weights:
            for index, layer in enumerate(layers):
                values: dict[str, LazyTensor] = {name: _held(tensor, name, weights) for name, tensor in layer.items()}
                held = replace(self.checkpoint, tensors=values)
                for first in range(0, len(ids), self.batch):
                    prompts = ids[first : first + self.batch]
                    self._run_layer(held, index, first, prompts)
                    share = (index * ids.size + ids[:first].size + prompts.size) // config.num_hidden_layers
                    self.advance(share - done, f"layer {index + 1} of {config.num_hidden_layers}")
                    done = share
        for first in range(0, len(ids), self.batch):
            forward = StreamedForward(self.checkpoint, ids[first : first + self.batch])
            yield forward.final_norm(self.streams.read(first, self.batch))

    @torch.no_grad()
    def _embed(self) -> None:
        """Write the scaled embeddings; reads the rows of the tokens that occur once, in their order."""
        flat, table = self.streams.ids.ravel(), self.checkpoint.tensors[EMBEDDING]
        order = np.argsort(flat, kind="stable")
        tokens, starts = np.unique(flat[order], return_index=True)
        for token, positions in zip(tokens.tolist(), np.split(order, starts[1:]), strict=True):
            row = scale_embeddings(
                to_torch(table.load_rows(token, token + 1)).to(torch.float32), self.checkpoint.config
            )
            for position in positions.tolist():
                self.streams.write(position, row)

    def _run_layer(self, held: Checkpoint, index: int, first: int, prompts: NDArray[np.int64]) -> None:
        forward = StreamedForward(held, prompts, on_input=self.on_input)
        with one_thread_each() if prompts.size <= FEW_TOKENS else contextlib.nullcontext():
            x = forward.run_layer(index, self.streams.read(first, self.batch))
        self.streams.write(first * prompts.shape[1], x)


def _held(tensor: LazyTensor, name: str, weights: ReadAhead) -> ArrayTensor:
    """A tensor in memory; ``weights`` reads it and what comes after it."""
    values = np.empty((tensor.rows, *tensor.shape[1:]), tensor.dtype)
    for first, last, rows in weights.map(name, lambda first, last, rows: rows):
        values[first:last] = rows
    return ArrayTensor(values, stored=tensor.stored, origin=tensor.origin)
