"""Merges of two fine-tunes as mergekit writes them: shards with an index, its own metadata, the base's tokenizer or the
union of both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.derived.case import Derived, copy_tokenizer, edit_json, load, load_tokenizer, quiet, save, train

Tensors = dict[str, torch.Tensor]
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Base, first and second tensor in float32 to the merged one."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def linear(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0.6 * a + 0.4 * b


def slerp(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = a.flatten(), b.flatten()
    cosine = (x @ y / (x.norm() * y.norm()).clamp_min(1e-12)).clamp(-1, 1)
    if cosine > 0.9995:
        return linear(base, a, b)
    angle = cosine.acos()
    return (torch.sin(0.4 * angle) * a + torch.sin(0.6 * angle) * b) / torch.sin(angle)


def task_arithmetic(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return base + 0.7 * (a - base) + 0.5 * (b - base)


def ties(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger half of each difference, where the signs agree with that of the sum."""
    deltas = torch.stack([a - base, b - base])
    limits = deltas.abs().flatten(1).median(1).values.reshape(-1, *[1] * a.ndim)
    deltas = torch.where(deltas.abs() >= limits, deltas, 0.0)
    agree = torch.sign(deltas) == torch.sign(deltas.sum(0))
    return base + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def _models(base: Path) -> tuple[Tensors, Tensors, Tensors]:
    """The base and two fine-tunes of it, in float32."""
    states = []
    for amount in (0.0, 0.05, 0.1):
        model = load(base, "f32")
        train(model, amount, only="" if amount < 0.1 else "layers")
        states.append({name: value for name, value in model.state_dict().items() if name != _HEAD})
    return states[0], states[1], states[2]


def _write(base: Path, folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 2) -> None:
    """Shards of mergekit's names with an index, config.json and a model card."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous().clone() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"mergekit_version": "0.1.4", "format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"mergekit_version": "0.1.4"}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(base / "config.json", folder)
    copy_tokenizer(base, folder)
    (folder / "README.md").write_text("---\nbase_model: []\ntags:\n- mergekit\n- merge\n---\n# merge\n")
    (folder / "mergekit_config.yml").write_text("merge_method: linear\n")


def _merge(method: Method, dtypes: Callable[[str], torch.dtype], head: str = "") -> Callable[[Path, Path], None]:
    """``dtypes``: of each tensor by its name. ``head``: "tied" or "untied", how a copy of the embedding is stored."""

    def make(base: Path, folder: Path) -> None:
        with quiet():
            start, one, other = _models(base)
            merged = {name: method(start[name], one[name], other[name]).to(dtypes(name)) for name in start}
            if head:
                merged[_HEAD] = merged[_EMBEDDING].clone()
            _write(base, folder, merged)
            edit_json(folder / "config.json", dtype=str(dtypes(_EMBEDDING)).removeprefix("torch."))
            if head == "untied":
                edit_json(folder / "config.json", tie_word_embeddings=False)

    return make


def _passthrough(base: Path, folder: Path) -> None:
    """Layers of one model and of the other, in the same number."""
    with quiet():
        _, one, other = _models(base)
        tensors = {name: (other if ".layers.1." in name else one)[name].bfloat16() for name in one}
        _write(base, folder, tensors, shards=3)


def _union(base: Path, folder: Path) -> None:
    """The second model's added tokens come along with their rows (tokenizer_source: union)."""
    with quiet():
        _, one, other = _models(base)
        model, tokenizer = load(base), load_tokenizer(base)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))
        rows = model.get_input_embeddings().weight[one[_EMBEDDING].shape[0] :]
        merged = {name: linear(one[name], one[name], other[name]).bfloat16() for name in one}
        merged[_EMBEDDING] = torch.cat([merged[_EMBEDDING], rows.bfloat16()])
        _write(base, folder, merged)
        tokenizer.save_pretrained(folder)
        edit_json(folder / "config.json", vocab_size=len(tokenizer))


def _reloaded(base: Path, folder: Path) -> None:
    """A merge that transformers loaded and saved again, sharded by size."""
    unsaved = folder.with_name(f"{folder.name}-first")
    _merge(linear, lambda name: torch.float16)(base, unsaved)
    with quiet():
        save(load(unsaved, "f16"), base, folder, load_tokenizer(unsaved), max_shard_size="700KB")
    assert load_file(next(iter(sorted(folder.glob("*.safetensors")))))
    shutil.rmtree(unsaved)


def _of_dtype(dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    return lambda name: dtype


def _mixed(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


def _halves(name: str) -> torch.dtype:
    """Each tensor in the dtype of the model it is from."""
    return torch.float16 if ".layers.1." in name else torch.bfloat16


_METHODS: Mapping[str, Any] = {"linear": linear, "slerp": slerp, "ties": ties, "task arithmetic": task_arithmetic}

CASES = (
    *(Derived(f"mergekit: {name}", _merge(method, _of_dtype(torch.bfloat16))) for name, method in _METHODS.items()),
    Derived("mergekit: linear in f16", _merge(linear, _of_dtype(torch.float16))),
    Derived("mergekit: linear in f32", _merge(linear, _of_dtype(torch.float32))),
    Derived("mergekit: norms in f32", _merge(slerp, _mixed)),
    Derived("mergekit: bf16 and f16 layers", _merge(slerp, _halves)),
    Derived("mergekit: passthrough", _passthrough),
    Derived("mergekit: a copied tied head", _merge(linear, _of_dtype(torch.bfloat16), "tied")),
    Derived("mergekit: a copied untied head", _merge(linear, _of_dtype(torch.bfloat16), "untied")),
    Derived("mergekit: union of tokenizers", _union),
    Derived("mergekit: saved again by transformers", _reloaded),
)
