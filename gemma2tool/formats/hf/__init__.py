"""Hugging Face's formats: config.json beside safetensors or pytorch_model.bin."""
