"""Receipts: what was written, how it was verified, and enough to verify it again without the source."""
