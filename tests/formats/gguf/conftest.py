"""A tokenizer of Gemma's kind."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

ADDED = ("<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\u2581\u2581", "<table>")


@pytest.fixture(scope="session")
def gemma_like_model() -> bytes:
    """A tokenizer.model with Gemma's settings, trained by SentencePiece itself on the text of a test."""
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter((Path(__file__).parent / "test_tokenizer.py").read_text().splitlines() * 2),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(ADDED),
        minloglevel=2,
    )
    return model.getvalue()
