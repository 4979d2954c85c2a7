"""gemma2tool: convert, quantize and verify Gemma 2 checkpoints."""

__version__ = "0.1.0"
