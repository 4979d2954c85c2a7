"""Adapters that keras-hub wrote: merged, the model computes what keras-hub's does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats.adapters.merging import merge
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import write_as
from tests.support.peft_peer import IDS, consumed


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(
    "targets",
    [None, ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]],
    ids=["default", "all"],
)
def test_an_adapter_of_keras_hub(tmp_path: Path, targets: list[str] | None) -> None:
    """Saved by save_lora_weights, in a process of its own because of its backend; the logits are keras-hub's."""
    if importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras-hub is not installed")
    source = random_checkpoint(np.dtype(np.float32))
    base = write_as("keras", source, tmp_path / "base")
    np.save(tmp_path / "ids.npy", IDS)
    code = f"""
import keras, keras_hub, numpy as np
backbone = keras_hub.models.GemmaBackbone.from_preset({str(base)!r}, dtype="float32")
backbone.enable_lora(4, target_layer_names={targets!r})
rng = np.random.default_rng(0)
for layer in backbone._flatten_layers(include_self=False):
    if getattr(layer, "lora_enabled", False):
        for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
            variable.assign(0.1 * rng.standard_normal(variable.shape))
backbone.save_lora_weights({str(tmp_path / "x.lora.h5")!r})
ids = np.load({str(tmp_path / "ids.npy")!r})
hidden = backbone({{"token_ids": ids, "padding_mask": np.ones_like(ids)}})
np.save({str(tmp_path / "logits.npy")!r}, np.asarray(backbone.token_embedding(hidden, reverse=True)))
"""
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    merged = merge(source, tmp_path / "x.lora.h5")
    assert len([name for name in merged.tensors if merged.tensors[name] is not source.tensors[name]]) > 3
    logits, expected = consumed(merged, tmp_path / "out"), np.load(tmp_path / "logits.npy")
    assert np.abs(logits - expected).max() <= 2e-4
