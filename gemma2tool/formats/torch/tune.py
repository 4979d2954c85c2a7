"""torchtune's native state dicts: q and k in the row order of interleaved rotary pairs.

Names: torchtune ``torchtune/models/gemma2/_convert_weights.py``. Its releases 0.5.0 to 0.6.1, all that know Gemma 2,
give the two norms around the MLP each other's names; what follows them does not (torchtune 2850). torchtune's Hugging
Face checkpointer undoes its own names; these dicts are what its recipes hold, what its torchtune checkpointer writes
(``model-00001-of-00001.bin``) and what ``torch.save`` makes of them. Nothing in a dict says which names it has, but the
values of trained norms do.

The releases' own model applies mlp_norm before the MLP and mlp_scale after it, as the later code does. So it computes
Gemma 2 from a dict with the later names, and another model from what its own converter makes of a Hugging Face file
(the trained fixture, torchtune 0.6.1: 1.3e-5 and 5.6 from transformers' uncapped logits).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma2tool.formats.mapping.layout_transforms import InterleaveRotary
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.formats.mapping.wrappers import Root
from gemma2tool.formats.torch.tune_facts import FILE, FILE_0_6
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import LazyTensor

ROOT = Root("tok_embeddings.weight")

MAX_LAYERS, MAX_ROWS = 6, 256
"""What is read of a dict to tell its names."""

FOLLOWS = 0.3
"""Correlation above which a norm follows the matrices after it, and by which it must do so better than the other. In
the trained fixture the one has 0.68 to 0.82, the other -0.27 to 0.25."""

SIGMAS = 6.0
"""Standard deviations of the correlation of random values that a correlation must have to say anything: those of a few
columns are large by chance."""

_HF, _TUNE = "model.layers.{i}.", "layers.{i}."


def table(*, norms_exchanged: bool) -> tuple[TableRow, ...]:
    """The tensors of a native dict; ``norms_exchanged``: of the releases 0.5.0 to 0.6.1."""
    before, after = ("mlp_scale", "mlp_norm") if norms_exchanged else ("mlp_norm", "mlp_scale")
    return (
        TableRow("tok_embeddings.weight", ("model.embed_tokens.weight",)),
        TableRow(_TUNE + "attn.q_proj.weight", (_HF + "self_attn.q_proj.weight",), (InterleaveRotary("H"),)),
        TableRow(_TUNE + "attn.k_proj.weight", (_HF + "self_attn.k_proj.weight",), (InterleaveRotary("K"),)),
        TableRow(_TUNE + "attn.v_proj.weight", (_HF + "self_attn.v_proj.weight",)),
        TableRow(_TUNE + "attn.output_proj.weight", (_HF + "self_attn.o_proj.weight",)),
        TableRow(_TUNE + "mlp.w1.weight", (_HF + "mlp.gate_proj.weight",)),
        TableRow(_TUNE + "mlp.w3.weight", (_HF + "mlp.up_proj.weight",)),
        TableRow(_TUNE + "mlp.w2.weight", (_HF + "mlp.down_proj.weight",)),
        TableRow(_TUNE + "sa_norm.scale", (_HF + "input_layernorm.weight",)),
        TableRow(_TUNE + "sa_scale.scale", (_HF + "post_attention_layernorm.weight",)),
        TableRow(_TUNE + f"{before}.scale", (_HF + "pre_feedforward_layernorm.weight",)),
        TableRow(_TUNE + f"{after}.scale", (_HF + "post_feedforward_layernorm.weight",)),
        TableRow("norm.rms_norm.scale", ("model.norm.weight",)),
    )


def norms_exchanged(stored: Mapping[str, LazyTensor], config: Gemma2Config) -> bool | None:
    """Whether a dict has the releases' names, by the norm whose scales follow the columns of gate and up, as those of
    the norm before them do in a trained model. None where neither does, as in random weights. Reads a few rows.
    """
    count = min(config.num_hidden_layers, MAX_LAYERS)
    layers = dict.fromkeys(round(layer) for layer in np.linspace(0, config.num_hidden_layers - 1, count))
    fits = [fit for layer in layers if (fit := _fits(stored, _TUNE.format(i=layer))) is not None]
    if not fits:
        return None
    norm, scale = np.mean(fits, axis=0)
    limit = max(FOLLOWS, SIGMAS / math.sqrt(len(fits) * config.hidden_size))
    if max(norm, scale) < limit or not abs(norm - scale) >= limit:
        return None
    return bool(scale > norm)


def _fits(stored: Mapping[str, LazyTensor], layer: str) -> tuple[float, float] | None:
    """How the scales of mlp_norm and mlp_scale correlate with the columns of gate and up in one layer; None where they
    are missing or do not fit together, which the check of the tensors reports.
    """
    norms = [stored.get(f"{layer}{name}.scale") for name in ("mlp_norm", "mlp_scale")]
    matrices = [stored.get(f"{layer}mlp.{name}.weight") for name in ("w1", "w3")]
    parts = [tensor for tensor in (*norms, *matrices) if tensor is not None]
    if len(parts) < 4 or len({tensor.shape[-1:] for tensor in parts}) > 1:
        return None
    columns = sum(
        np.square(tensor.load_rows_f32(0, min(tensor.rows, MAX_ROWS)).astype(np.float64)).sum(0) for tensor in parts[2:]
    )
    scales = [np.abs(1 + tensor.load_rows_f32(0, tensor.rows).astype(np.float64)) for tensor in parts[:2]]
    if any(np.ptp(values) == 0 or not np.isfinite(values).all() for values in (*scales, columns)):
        return None
    norm, scale = (float(np.corrcoef(values, np.sqrt(columns))[0, 1]) for values in scales)
    return norm, scale


def exchanged_remark(weights: Path) -> str:
    """That ``weights`` has the releases' names, by its values."""
    return (
        f"{weights.name}: its norms have the names of torchtune 0.5.0 to 0.6.1, which exchange mlp_norm and mlp_scale:"
        " their values follow the matrices so, and it is read so; torchtune itself applies them in each other's place"
    )


def contrary_remark(weights: Path) -> str:
    """That ``weights`` is called as the releases' and has the later names, by its values."""
    return (
        f"{weights.name}: read as torchtune 0.5.0 to 0.6.1 name the norms, because of its name, but its values follow"
        f" the matrices as later code names them; if that is right, call it {FILE}"
    )


def names_remark(weights: Path) -> str:
    """That ``weights`` could have the other names."""
    return (
        f"{weights.name}: torchtune 0.5.0 to 0.6.1 exchange the names mlp_norm and mlp_scale, and neither the file nor"
        f" its values say whether they wrote it; it is read as later code names them. If they did, call the file"
        f" {FILE_0_6}"
    )
