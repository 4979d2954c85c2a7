"""Weights stored as plain float8, without scales: what a cast of a state dict to float8 leaves.

Every float8 value is exact in bfloat16 and float16. transformers widens them when it loads a model in such a type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gemma2tool.model.lazy import BFLOAT16, FLOAT32, DType, LazyTensor, MappedRows

FLOAT8 = frozenset({np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)})


def widened(tensors: Mapping[str, LazyTensor], where: str) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors with those of float8 in the wider type that most of the others have, bfloat16 where there is none,
    and a remark that ``where`` has such.
    """
    narrow = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8]
    if not narrow:
        return dict(tensors), []
    others = Counter(tensor.dtype for tensor in tensors.values() if _is_wide_float(tensor.dtype))
    dtype = others.most_common(1)[0][0] if others else BFLOAT16
    wide = {name: _widened(tensors[name], dtype) for name in narrow}
    kinds = ", ".join(sorted({str(tensors[name].dtype) for name in narrow}))
    remark = f"{where}: {len(narrow)} tensors are plain {kinds} without scales: read as {dtype}, which is exact"
    return {**tensors, **wide}, [remark]


def _widened(source: LazyTensor, dtype: DType) -> LazyTensor:
    return MappedRows(source, lambda rows: rows.astype(FLOAT32).astype(dtype), dtype)


def _is_wide_float(dtype: DType) -> bool:
    return dtype.itemsize in (2, 4) and (dtype == BFLOAT16 or dtype.kind == "f")
