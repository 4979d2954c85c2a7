"""Checksums of a model's norms: how a file whose norms were tuned says which values they were given.

A text of eight hexadecimal digits a norm: the CRC-32 of its values, float32, little-endian, in the order of the tensor
table.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.tensors import tensor_specs

DIGITS = 8


def norm_names(config: Gemma2Config) -> list[str]:
    """The canonical names of all norms."""
    return [name for name in tensor_specs(config) if name.endswith("norm.weight")]


def norm_checksum(tensor: LazyTensor) -> str:
    """The checksum of one norm (D,)."""
    values = np.ascontiguousarray(tensor.load_rows_f32(0, tensor.rows), dtype="<f4")
    return f"{zlib.crc32(values.tobytes()):0{DIGITS}x}"


def norm_checksums(tensors: Mapping[str, LazyTensor], config: Gemma2Config) -> str:
    """The checksums of all norms, as a file states them."""
    return "".join(norm_checksum(tensors[name]) for name in norm_names(config))


def unknown_checksums(config: Gemma2Config) -> str:
    """A text as long as ``norm_checksums``, for a file whose norms are not known yet."""
    return "0" * (DIGITS * len(norm_names(config)))


def parse_checksums(text: object, config: Gemma2Config) -> dict[str, str]:
    """The checksum of each norm by canonical name; empty for anything but a text of ``norm_checksums``."""
    names = norm_names(config)
    if not isinstance(text, str) or len(text) != DIGITS * len(names):
        return {}
    return {name: text[DIGITS * number : DIGITS * (number + 1)] for number, name in enumerate(names)}
