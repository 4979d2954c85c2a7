"""An adapter applied to a checkpoint: which tensors change, and whether the head stays tied to the embedding."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.formats.adapters import vocabulary
from gemma2tool.formats.adapters.adapter import FLOAT32_MAX, Adapter, refused
from gemma2tool.formats.adapters.merged import MergedTensor, ReplacedRows
from gemma2tool.formats.adapters.reading import read_adapter
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor, row_ranges
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.storage.quoting import quoted

_VOCABULARY = (EMBEDDING, HEAD)
_CLASSIFIER = ("score.weight", "score.bias")
_COMPARE_BYTES = 4 << 20
_MAX_LABELS = 1 << 16


def merge(checkpoint: Checkpoint, adapter: Path, scale: float = 1.0) -> Checkpoint:
    """``checkpoint`` with the adapter at the path ``adapter`` merged into its tensors, its strength multiplied by
    ``scale``.

    The result shares the source's open files. Raises ``InputRefused`` (``lora.*``) for an adapter that cannot be
    merged, for tensors that the model does not have, and for shapes that differ.
    """
    if not math.isfinite(scale):
        raise UsageError("lora.scale", f"the adapter's scale is {scale}", hint="pass a finite number")
    return _Merge(read_adapter(Path(adapter), checkpoint), checkpoint, scale).result()


class _Merge:
    """One adapter applied to one checkpoint; ``tensors`` and ``config`` change step by step."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint, scale: float) -> None:
        self.adapter, self.checkpoint, self.scale = adapter, checkpoint, scale
        self.tensors = dict(checkpoint.tensors)
        self.config = checkpoint.config
        self.warnings = list(adapter.warnings)

    def result(self) -> Checkpoint:
        self._put_base_weights()
        self._drop_rows_of_the_tied_head()
        self._untie()
        self._put_replacements()
        self._add_deltas()
        self._put_token_rows()
        self._tie_again()
        assets, warnings = vocabulary.merged_assets(self.adapter.path, self.checkpoint, self.config.vocab_size)
        self.warnings += warnings
        if self.scale != 1 and (whole := [*self.adapter.replacements, *self.adapter.token_rows]):
            self.warnings.append(f"{', '.join(whole)}: trained as a whole; the scale has no effect on them")
        merged = replace(
            self.checkpoint,
            config=self.config,
            tensors=self.tensors,
            assets=assets,
            metadata={},  # what the source's format keeps there, its stored tensors among it, does not describe this
            files=(*self.checkpoint.files, *self.adapter.files),
            warnings=[*self.checkpoint.warnings, *self.warnings],
        )
        merged.check()
        return merged

    def _put_base_weights(self) -> None:
        weights = dict(self.adapter.base_weights)
        if self.config.tie_word_embeddings and HEAD in weights:  # one parameter, which is loaded under either name
            head = weights.pop(HEAD)
            if not _are_equal(weights.setdefault(EMBEDDING, head), head):
                raise refused(
                    "target",
                    self.adapter.path,
                    "contains a head and an embedding that differ, and the model has one matrix for both",
                    hint="set tie_word_embeddings to false in the base's config if they were trained separately",
                )
        for name, tensor in weights.items():
            self._check_tensor(name, tensor)
            self.tensors[name] = tensor
        self._resize(weights)

    def _drop_rows_of_the_tied_head(self) -> None:
        """peft stores the trained tokens of a resized model under both names of its one matrix."""
        rows = dict(self.adapter.token_rows)
        head, embedding = rows.pop(HEAD, None), rows.get(EMBEDDING)
        if not self.config.tie_word_embeddings or head is None or embedding is None:
            return
        if tuple(head.indices) == tuple(embedding.indices) and _are_equal(head.values, embedding.values):
            self.adapter = replace(self.adapter, token_rows=rows)

    def _untie(self) -> None:
        """Give the model a head of its own if the adapter treats head and embedding differently."""
        adapter = self.adapter
        has_own_head = any(HEAD in part for part in (adapter.deltas, adapter.replacements, adapter.token_rows))
        moves_embedding = EMBEDDING in adapter.deltas or EMBEDDING in adapter.replacements
        if not self.config.tie_word_embeddings or not (has_own_head or (moves_embedding and not adapter.ties)):
            return
        self.tensors[HEAD] = self.tensors[EMBEDDING]
        self.config = replace(self.config, tie_word_embeddings=False)

    def _put_replacements(self) -> None:
        for name, tensor in self.adapter.replacements.items():
            if name == "score.weight" and len(tensor.shape) == 2:
                self._name_classes(tensor.shape[0])
            self._check_tensor(name, tensor)
            self.tensors[name] = tensor
        self._resize(self.adapter.replacements)

    def _name_classes(self, count: int) -> None:
        kind = "Token" if "score.bias" in self.adapter.replacements else "Sequence"
        labels = {index: f"LABEL_{index}" for index in range(min(count, _MAX_LABELS))}
        if self.config.id2label is None or len(self.config.id2label) != len(labels):
            self.config = replace(self.config, id2label=labels, label2id=None)
        self.config = replace(self.config, architectures=(f"Gemma2For{kind}Classification",))

    def _add_deltas(self) -> None:
        for name, delta in self.adapter.deltas.items():
            if name not in self.tensors:
                raise refused(
                    "target", self.adapter.path, f"{quoted(name.removesuffix('.weight'))} is not a weight of this model"
                )
            base = self.tensors[name]
            if delta.shape != base.shape:
                raise refused(
                    "shape",
                    self.adapter.path,
                    f"{name.removesuffix('.weight')}: the adapter is for {delta.shape}, the model has {base.shape}",
                )
            scaling = delta.scaling * self.scale
            if not abs(scaling) <= FLOAT32_MAX:
                raise refused("config", self.adapter.path, f"{name}: scaled by {scaling:g}, which float32 cannot hold")
            self.tensors[name] = MergedTensor.with_delta(base, replace(delta, scaling=scaling, strength=self.scale))

    def _put_token_rows(self) -> None:
        for name, rows in self.adapter.token_rows.items():
            base = self.tensors[name]
            if rows.values.shape != (len(rows.indices), *base.shape[1:]):
                raise refused(
                    "shape",
                    self.adapter.path,
                    f"{name}: {len(rows.indices)} rows of {base.shape[1:]} are trained, the file has "
                    f"{rows.values.shape}",
                )
            if rows.indices and not 0 <= min(rows.indices) <= max(rows.indices) < base.rows:
                raise refused("shape", self.adapter.path, f"{name}: row {max(rows.indices)} is trained, of {base.rows}")
            self.tensors[name] = ReplacedRows(base, rows)

    def _tie_again(self) -> None:
        """Drop a head that the adapter stores and that equals the embedding; say so where it does not."""
        if self.config.tie_word_embeddings or not self.checkpoint.config.tie_word_embeddings:
            return
        if HEAD in self.adapter.replacements and _are_equal(self.tensors[HEAD], self.tensors[EMBEDDING]):
            del self.tensors[HEAD]
            self.config = replace(self.config, tie_word_embeddings=True)
            return
        trained = any(HEAD in part for part in (self.adapter.deltas, self.adapter.replacements))
        what = "trained a head of its own" if trained else "trained the embedding without the head"
        self.warnings.append(f"the adapter {what}: the head is no longer tied to the embedding")

    def _check_tensor(self, name: str, tensor: LazyTensor) -> None:
        """Refuse a weight that is not the model's, or of another shape; only the number of tokens may change."""
        if name not in self.tensors:
            if name in _CLASSIFIER:
                return
            raise refused("target", self.adapter.path, f"{quoted(name)} is not a weight of this model")
        here, there = tensor.shape, self.tensors[name].shape
        if here != there and not (name in _VOCABULARY and len(here) == 2 and here[1:] == there[1:]):
            raise refused("shape", self.adapter.path, f"{name}: the adapter has {here}, the model has {there}")

    def _resize(self, changed: Container[str]) -> None:
        """Take the number of tokens from the embedding and the head that the adapter brings, if it is another."""
        rows = {name: self.tensors[name].rows for name in _VOCABULARY if name in self.tensors}
        if not any(name in changed for name in rows) or set(rows.values()) == {self.config.vocab_size}:
            return
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
            raise refused(
                "shape",
                self.adapter.path,
                f"the adapter has a different number of tokens and contains only some of their rows: {counts}",
                hint="resize the base model's embedding as the training did, then merge",
            )
        self.config = replace(self.config, vocab_size=rows[EMBEDDING])


def _are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    return a.shape == b.shape and all(
        np.array_equal(a.load_rows_f32(*rows), b.load_rows_f32(*rows))
        for rows in row_ranges(a.rows, a.row_size * 4, _COMPARE_BYTES)
    )
