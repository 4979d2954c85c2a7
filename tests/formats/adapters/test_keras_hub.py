"""Adapters that keras-hub wrote: merged, the model computes what keras-hub's does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats.adapters.merging import merge
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import write_as
from tests.support.peft_peer import IDS, consumed

TARGETS = {
    "default": None,
    "all": ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"],
}
WRITE = """
import sys
import keras, keras_hub, numpy as np
folder, targets = sys.argv[1], {targets!r}
for name, layers in targets.items():
    backbone = keras_hub.models.GemmaBackbone.from_preset(f"{{folder}}/base", dtype="float32")
    backbone.enable_lora(4, target_layer_names=layers)
    rng = np.random.default_rng(0)
    for layer in backbone._flatten_layers(include_self=False):
        if getattr(layer, "lora_enabled", False):
            for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
                variable.assign(0.1 * rng.standard_normal(variable.shape))
    backbone.save_lora_weights(f"{{folder}}/{{name}}.lora.h5")
    ids = np.load(f"{{folder}}/ids.npy")
    hidden = backbone({{"token_ids": ids, "padding_mask": np.ones_like(ids)}})
    np.save(f"{{folder}}/{{name}}.npy", np.asarray(backbone.token_embedding(hidden, reverse=True)))
"""


@pytest.mark.slow
@pytest.mark.peer
def test_adapters_of_keras_hub(tmp_path: Path) -> None:
    """Saved by save_lora_weights, in a process of its own because of its backend; the logits are keras-hub's."""
    if importlib.util.find_spec("keras_hub") is None:
        pytest.skip("keras-hub is not installed")
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=2, layer_types=()))
    write_as("keras", source, tmp_path / "base")
    np.save(tmp_path / "ids.npy", IDS)
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", WRITE.format(targets=TARGETS), tmp_path]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in TARGETS:
        merged = merge(source, tmp_path / f"{name}.lora.h5")
        assert len([key for key in merged.tensors if merged.tensors[key] is not source.tensors[key]]) > 3
        logits, expected = consumed(merged, tmp_path / f"out-{name}"), np.load(tmp_path / f"{name}.npy")
        assert np.abs(logits - expected).max() <= 2e-4, name
