"""A trained tokenizer."""

from __future__ import annotations

import pytest

from tests.support.tokenizers import trained


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()
