"""Adapters that Hugging Face's PEFT saved: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``."""
