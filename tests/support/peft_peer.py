"""Adapters that peft trains (by random steps) and saves, and the logits of the model as trained."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.formats import write_as

IDS = np.array([[2, 17, 99, 4, 158, 31, 5, 6, 120, 77]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Trained:
    """A saved adapter. ``logits``: of the model with it, before it was saved. ``plain``: of the base."""

    folder: Path
    logits: np.ndarray
    plain: np.ndarray


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import transformers

    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(
    base: Path,
    folder: Path,
    config: Any,
    *,
    kind: str = "ForCausalLM",
    prepare: Callable[[Any], None] | None = None,
    save: dict[str, Any] | None = None,
) -> Trained:
    """Give ``config``'s adapter random values and save it. ``prepare`` changes the base model in memory first."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import transformers

    with quiet(), torch.no_grad():
        torch.manual_seed(0)
        torch.set_num_threads(1)  # an SVD of a small matrix is far slower on two busy cores
        model = getattr(transformers, f"Gemma2{kind}").from_pretrained(base, dtype=torch.float32).eval()
        if prepare is not None:
            prepare(model)
        plain = _output(model)
        model = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.add_(0.1 * noise)
        logits = _output(model)
        model.save_pretrained(folder, **(save or {}))
    (folder / "README.md").unlink(missing_ok=True)
    return Trained(folder, logits, plain)


def _output(model: Any) -> np.ndarray:
    import torch

    output = model(input_ids=torch.tensor(IDS))
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float().numpy()


def consumed(checkpoint: Checkpoint, folder: Path, kind: str = "ForCausalLM") -> np.ndarray:
    """What transformers computes from a checkpoint, written as float32."""
    import torch
    import transformers

    shutil.rmtree(folder, ignore_errors=True)
    write_as("hf", checkpoint, folder, dtype="f32")
    with quiet(), torch.no_grad():
        model = getattr(transformers, f"Gemma2{kind}").from_pretrained(folder, dtype=torch.float32)
        return _output(model.eval())


def assert_merged(
    base: Path, trained: Trained, work: Path, kind: str = "ForCausalLM", *, limit: float = 1e-4
) -> Checkpoint:
    """The merged model computes what the adapter did as trained, and not what the base does."""
    merged = merge(registry.open_checkpoint(base), trained.folder)
    logits = consumed(merged, work / "merged", kind)
    assert logits.shape == trained.logits.shape
    assert np.abs(logits - trained.logits).max() <= limit
    assert np.abs(trained.plain - trained.logits).max() > 100 * limit
    return merged
