"""Quantizers: pure functions from rows to codes and scales, and back."""
