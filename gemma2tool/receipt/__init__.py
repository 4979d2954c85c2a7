"""The receipt: what was written, how it was checked, and enough to check it again without the source."""
