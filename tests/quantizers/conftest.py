"""What the tests of error feedback round: rows of a matrix, and the inputs that their Hessian is of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gemma2tool.reference.readahead import one_thread_each
from tests.support.calibration import COLUMNS, ROWS, correlated_inputs


@pytest.fixture
def one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return correlated_inputs(2000, COLUMNS).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((ROWS, COLUMNS)) * 0.05).astype(np.float32)
