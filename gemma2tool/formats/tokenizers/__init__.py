"""Tokenizer files: SentencePiece models, tokenizer.json, and what lies beside them."""
