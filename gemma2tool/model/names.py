"""The canonical names of the two matrices of the vocabulary, which many rooms treat apart from the others."""

from __future__ import annotations

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""Absent where it is tied to the embedding."""
