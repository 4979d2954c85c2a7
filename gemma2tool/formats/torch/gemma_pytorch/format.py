"""Google's own PyTorch format: ``model.ckpt`` (``{'model_state_dict': ...}``), or ``pytorch_model-*.bin`` shards with
an index.

q, k and v are fused by rows, the embedding's name has no prefix, and a complex ``freqs_cis`` buffer may be present.
The int8 variant stores ``X.weight`` as int8 with ``X.weight_scaler``, one float a row. The config comes from a
``config.json`` beside the weights, from the ``config`` that gemma2tool stores in the ``.ckpt`` files it writes, or
from the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.containers import strict_json
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.containers.torch_zip.layout import TorchZipLayout
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import assets
from gemma2tool.formats.base import Closers, Format, Output, OutputFile, OutputTensor, Placement, opening
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.formats.mapping.float8 import widened
from gemma2tool.formats.mapping.float_layout import TensorPlan, plan_floats
from gemma2tool.formats.mapping.transforms import TableRow, entries, to_canonical
from gemma2tool.formats.mapping.wrappers import HUGGING_FACE, Root, find_state, has_state, plain_names
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.torch.gemma_pytorch import FACTS
from gemma2tool.formats.torch.gemma_pytorch.freqs_cis import FreqsCis
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config, infer_from_shapes
from gemma2tool.model.instruction_tuned import guessed
from gemma2tool.model.lazy import FLOAT32, Array, LazyTensor, to_float32
from gemma2tool.model.tensors import HEADS
from gemma2tool.quantizers.floats import Float
from gemma2tool.storage.paths import path_within_folder

ROOT = Root("embedder.weight")
STATE_DICT = "model_state_dict"
CONFIG_KEY = "config"
INDEX = "pytorch_model.bin.index.json"
SINGLE = "model.ckpt"

_LAYER = "model.layers.{i}."
TABLE: tuple[TableRow, ...] = (
    TableRow("embedder.weight", ("model.embed_tokens.weight",)),
    TableRow(
        _LAYER + "self_attn.qkv_proj.weight",
        tuple(_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    *(
        TableRow(_LAYER + name, (_LAYER + name,))
        for name in (
            "self_attn.o_proj.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "pre_feedforward_layernorm.weight",
            "post_feedforward_layernorm.weight",
        )
    ),
    TableRow("model.norm.weight", ("model.norm.weight",)),
    *(TableRow(name, (name,)) for name in HEADS),
)


class ScaledRows(LazyTensor):
    """int8 codes (out, in) times one float a row: the weight of gemma_pytorch's int8 variant, in float32."""

    def __init__(self, codes: LazyTensor, scaler: LazyTensor) -> None:
        if scaler.shape != codes.shape[:1]:
            raise InputRefused(
                "gemma-pytorch.scaler",
                f"{scaler.origin}: shape {scaler.shape} does not fit codes of shape {codes.shape}",
                hint="the int8 checkpoint is damaged: download it again",
            )
        self.codes, self.scaler = codes, scaler
        self.shape, self.dtype, self.stored, self.origin = codes.shape, FLOAT32, "int8-rows", codes.origin

    def load_rows(self, first: int, last: int) -> Array:
        scale = to_float32(self.scaler.load_rows(first, last))
        return self.codes.load_rows(first, last).astype(FLOAT32) * scale[:, None]


BUFFER = "freqs_cis"
"""The rotary table, which gemma_pytorch computes and saves, and loads if it is saved."""


class GemmaPytorch(Format):
    """A ``.ckpt`` file, a folder with one, or a folder of ``.bin`` shards with their index."""

    facts = FACTS

    def detect(self, path: Path) -> bool:
        try:
            if path.is_dir():
                index = path / INDEX
                if index.is_file():
                    return any(".qkv_proj." in name for name in container_tensors.indexed_files(index)[1])
                files = list(path.glob("*.ckpt"))
                return len(files) == 1 and self.detect(files[0])
            if not path.is_file() or path.stat().st_size < 4:
                return False
            return _is_own(torch_zip.read_index(path), path)
        except InputRefused:
            return path.suffix == ".ckpt"
        except OSError:
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        folder = path if path.is_dir() else path.parent
        with opening() as closers:
            disk, files, embedded, remarks = _open_weights(path, closers)
            weights, wide = widened(_dequantized(disk), path.name)
            config_path = folder / "config.json"
            if config is None and embedded is not None:
                config = Gemma2Config.from_hf(embedded)
            elif config is None and config_path.is_file():
                config = assets.read_config(path_within_folder(config_path))
                files = [*files, config_path]
            elif config is None:
                inferred = infer_from_shapes(_canonical_shapes(weights), path)
                config = guessed(inferred, path, weights.get("embedder.weight"))
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                to_canonical(TABLE, weights, config),
                assets.folder_assets(folder),
                [*remarks, *wide],
                files=tuple(files),
                buffers={name: tensor for name, tensor in disk.items() if name == BUFFER},
                closers=closers,
            )
            checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        if not super().lacks_config(path):
            return False
        if path.is_dir() and (path / INDEX).is_file():
            return True
        return CONFIG_KEY not in torch_zip.read_index(_weights_file(path))

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        if options.type is not None:
            raise UsageError(
                "gemma-pytorch.type",
                f"the gemma-pytorch format cannot hold {options.type}",
                hint="choose a .gguf destination or a Hugging Face folder",
            )
        known = {name for entry in entries(TABLE, checkpoint.config) for name in entry.canonical}
        for name in checkpoint.tensors:
            if name not in known:
                raise InputRefused(
                    "gemma-pytorch.no-place",
                    f"the gemma-pytorch format has no place for {name}",
                    hint="write a Hugging Face folder instead",
                )
        freqs = FreqsCis(checkpoint.config, BUFFER)
        plans = [
            TensorPlan(BUFFER, (), freqs, Float(freqs.dtype)),
            *plan_floats(TABLE, checkpoint, options, self.name),
        ]
        is_file = options.single_file
        weights, tensors = _weights_layout(plans, options.name if is_file else SINGLE, checkpoint.config)
        small_files = {}
        if not is_file:
            small_files = {name: data for name, data in checkpoint.assets.items() if name != "README.md"}
            small_files["config.json"] = assets.dump_json(checkpoint.config.to_hf())
        heads = [name for name in HEADS if name in checkpoint.tensors]
        warnings = [f"gemma_pytorch has no classification head: it ignores {', '.join(heads)}"] if heads else []
        return Output(self.name, is_file, [weights], tensors, small_files, warnings=warnings)


def _is_own(tree: Mapping[str, Any], path: Path) -> bool:
    """Whether a file of torch.save is of this format: by its embedding, or as ``.ckpt`` that is not of another."""
    return has_state(tree, ROOT) or (path.suffix == ".ckpt" and not has_state(tree, HUGGING_FACE))


def _open_weights(
    path: Path, closers: Closers
) -> tuple[dict[str, LazyTensor], list[Path], dict[str, Any] | None, list[str]]:
    """The tensors by the file's names, the files, the config stored in the file, and remarks."""
    if path.is_dir() and (path / INDEX).is_file():
        tensors, files = container_tensors.open_torch_shards(path / INDEX, closers)
        plain, remarks = plain_names(tensors, ROOT, path.name)
        return plain, files, None, remarks
    file = _weights_file(path)
    tree = torch_zip.read_index(file)
    if STATE_DICT in tree and not isinstance(tree[STATE_DICT], Mapping):
        raise InputRefused(
            "gemma-pytorch.state-dict", f"{file.name}: {STATE_DICT} holds no tensors", hint="is it a Gemma 2 .ckpt?"
        )
    state, remarks = find_state(tree, ROOT, file.name)
    names, more = plain_names(state, ROOT, file.name)
    tensors = container_tensors.open_torch(names, file, closers)
    return tensors, [file], _embedded_config(tree, file), remarks + more


def _weights_file(path: Path) -> Path:
    return path if path.is_file() else path_within_folder(next(path.glob("*.ckpt")))


def _weights_layout(
    plans: Sequence[TensorPlan], file: str, config: Gemma2Config
) -> tuple[OutputFile, list[OutputTensor]]:
    """The ``.ckpt`` and the places of its tensors."""
    parts = {plan.disk: plan.encoder.parts(plan.source.shape)[0] for plan in plans}
    specs = {name: (part.dtype, part.shape) for name, part in parts.items()}
    zipped = TorchZipLayout({STATE_DICT: specs, CONFIG_KEY: json.dumps(config.to_hf(), sort_keys=True)})
    tensors = []
    for plan in plans:
        place = Placement(plan.disk, file, zipped.offsets[(STATE_DICT, plan.disk)], parts[plan.disk].nbytes)
        tensors.append(OutputTensor(plan.disk, plan.canonical, plan.source, plan.encoder, {"": place}))

    def finish(crcs: Mapping[str, int]) -> Sequence[tuple[int, bytes]]:
        return zipped.finish({(STATE_DICT, name): crc for name, crc in crcs.items()})

    return OutputFile(file, zipped.total_size, (), finish), tensors


def _dequantized(disk: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Weights with their scalers applied. A scaler beside a float weight is unused (early releases have some) and
    dropped.
    """
    weights: dict[str, LazyTensor] = {}
    for name, tensor in disk.items():
        if name == BUFFER or name.endswith(".weight_scaler"):
            continue
        if tensor.dtype == np.int8:
            scaler = disk.get(name + "_scaler")
            if scaler is None:
                raise InputRefused(
                    "gemma-pytorch.scaler",
                    f"{tensor.origin}: int8 codes without {name}_scaler",
                    hint="the int8 checkpoint is incomplete: download it again",
                )
            tensor = ScaledRows(tensor, scaler)
        weights[name] = tensor
    return weights


def _embedded_config(tree: Mapping[str, object], file: Path) -> dict[str, Any] | None:
    text = tree.get(CONFIG_KEY)
    if not isinstance(text, str):
        return None
    content = strict_json.load(text.encode(), what=f"{file.name}: {CONFIG_KEY}", max_bytes=assets.MAX_CONFIG_BYTES)
    return content if isinstance(content, dict) else None


def _canonical_shapes(disk: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name, without a config: o_proj shows how many rows of the fused matrix are queries."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in disk.items():
        if name == "embedder.weight":
            shapes["model.embed_tokens.weight"] = tensor.shape
        elif name.endswith(".qkv_proj.weight"):
            prefix = name.removesuffix("qkv_proj.weight")
            output = disk.get(prefix + "o_proj.weight")
            if output is None or len(output.shape) != 2 or len(tensor.shape) != 2:
                continue
            queries, width = output.shape[1], tensor.shape[1]
            keys = (tensor.shape[0] - queries) // 2
            shapes[prefix + "q_proj.weight"] = (queries, width)
            shapes[prefix + "k_proj.weight"] = shapes[prefix + "v_proj.weight"] = (keys, width)
        else:
            shapes[name] = tensor.shape
    return shapes


FORMAT = GemmaPytorch()
