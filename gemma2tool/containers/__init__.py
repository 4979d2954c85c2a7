"""Bounded parsers and layouts of files that strangers write. Nothing here knows what a model is."""
