"""Calibrated outputs: codes chosen by what the model does with a text, layer by layer."""
