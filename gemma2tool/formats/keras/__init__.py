"""Keras presets of keras-hub."""
