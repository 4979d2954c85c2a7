"""Measuring: completeness, config, tokenizer, tensors, logits."""
