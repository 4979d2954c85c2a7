"""Hostile checkpoints as a user meets them: files and folders, and the id of the error for entry."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from gemma2tool.containers import safetensors
from tests.support.hostile import gguf as g
from tests.support.hostile import safetensors as hostile_safetensors
from tests.support.hostile import torch as hostile_torch
from tests.support.hostile.binaries import GGUF, KERAS, ORBAX, SBS
from tests.support.hostile.refusal import Case, Hostile, ValidCheckpoints

ESCAPE = "\x1b[2J\x1b]0;owned\x07\n\u202eok verified"


# -- containers: what the readers' own tests hold, in the place where a user would have it
# ------------------------------


def _container(kind: str, case: Hostile, file: str) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        if file.endswith(".gguf"):
            (folder / file).write_bytes(case.data)
            return folder / file
        shutil.copy(valid["hf"] / "config.json", folder)
        (folder / file).write_bytes(case.data)
        return folder

    known = kind != "gguf" or case.data.startswith(b"GGUF")
    return Case(f"{kind}: {case.name}", build, case.id if known else "input.")


CONTAINERS = [
    *(_container("safetensors", case, "model.safetensors") for case in hostile_safetensors.CASES),
    *(_container("gguf", case, "model.gguf") for case in g.CASES),
    *(_container("torch", case, "pytorch_model.bin") for case in hostile_torch.CASES),
]


# -- Hugging Face folders ----------------------------------------------------------------------------------------------


def _hf(name: str, id: str, spoil: Callable[[Path], object], options: tuple[str, ...] = ()) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        shutil.copytree(valid["hf"], folder / "model")
        spoil(folder / "model")
        return folder / "model"

    return Case(f"hf: {name}", build, id, options)


def _config(name: str, id: str, **changed: object) -> Case:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(content))

    return _hf(f"config, {name}", id, spoil)


def _text(name: str, id: str, file: str, text: str | bytes) -> Case:
    return _hf(name, id, lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode()))


def _link(name: str, id: str, file: str, target: str) -> Case:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return _hf(name, id, spoil)


def _index(name: str, id: str, change: Callable[[dict], object]) -> Case:
    """A folder of two shards with a forged index."""

    def spoil(folder: Path) -> None:
        header = safetensors.read_header(folder / "model.safetensors")
        raw = (folder / "model.safetensors").read_bytes()
        weight_map = {}
        for number, names in enumerate((list(header.tensors)[::2], list(header.tensors)[1::2]), 1):
            entries = [header.tensors[name] for name in names]
            head, offsets, size = safetensors.layout(
                [(entry.name, entry.dtype, entry.shape) for entry in entries], None
            )
            out = bytearray(head) + bytes(size - len(head))
            for entry in entries:
                out[offsets[entry.name] : offsets[entry.name] + entry.nbytes] = raw[
                    entry.offset : entry.offset + entry.nbytes
                ]
            (folder / f"model-{number}.safetensors").write_bytes(out)
            weight_map |= dict.fromkeys(names, f"model-{number}.safetensors")
        (folder / "model.safetensors").unlink()
        content = {"metadata": {}, "weight_map": weight_map}
        text = change(content)
        (folder / "model.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps(content))

    return _hf(f"index, {name}", id, spoil)


def _shard(to: str) -> Callable[[dict], None]:
    return lambda content: content["weight_map"].__setitem__(next(iter(content["weight_map"])), to)


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    """Renames the tensor ``old``, in a header of another length."""

    def spoil(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = {(new if name == old else name): entry for name, entry in json.loads(raw[8 : 8 + size]).items()}
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return spoil


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


NORM = "model.norm.weight"
HF = [
    _config("2^31 layers", "config.value", num_hidden_layers=1 << 31),
    _config("layers are text", "config.value", num_hidden_layers="26"),
    _config("a width of 10^30", "config.value", hidden_size=10**30),
    _config("a thousand heads of 65,536", "config.value", num_attention_heads=1024, head_dim=65536),
    _config("a width of 4,000,000", "checkpoint.shape", hidden_size=4_000_000),
    _config("a vocabulary of -1", "config.value", vocab_size=-1),
    _config("2^40 labels", "config.labels", num_labels=1 << 40),
    _config("labels that are a list", "config.labels", id2label=[1, 2]),
    _config("a label that is a list", "config.labels", id2label={"0": ["a"]}),
    _config("labels the other way that are true", "config.value", id2label={"0": "a"}, label2id=True),
    _config("another model", "config.model-type", model_type="llama"),
    _config("a model type that steers terminals", "config.model-type", model_type=ESCAPE),
    _config("rotary scaling that is a list", "config.rope", rope_parameters=[1]),
    _config("a rotary type that is a list", "config.value", rope_parameters={"rope_type": ["yarn"], "rope_theta": 1e4}),
    _config("an unknown quantization", "packing.unknown", quantization_config={"quant_method": "evil"}),
    _config("a quantization that is text", "packing.unknown", quantization_config="nf4"),
    _config(
        "compressed-tensors of nothing",
        "compressed.config",
        quantization_config={"quant_method": "compressed-tensors", "config_groups": 5},
    ),
    _text("config is empty", "json.syntax", "config.json", ""),
    _text("config is a list", "config.type", "config.json", "[]"),
    _text("config nested 100,000 deep", "json.depth", "config.json", '{"a":' * 100_000),
    _text(
        "config with a key twice", "json.duplicate-key", "config.json", '{"model_type":"gemma2","model_type":"gemma2"}'
    ),
    _text("config with NaN", "json.nonfinite", "config.json", '{"rms_norm_eps":NaN}'),
    _text("config is not UTF-8", "json.utf8", "config.json", b'{"a":"\xff"}'),
    _text("config of 5 MB", "file.too-large", "config.json", " " * 5_000_000),
    _text("config with 4,000,000 values", "file.too-large", "config.json", "[" + "0," * 4_000_000 + "0]"),
    _text("config with a number of 5,000 digits", "json.syntax", "config.json", '{"a":' + "9" * 5000 + "}"),
    _link("config is a link to a private file", "index.link", "config.json", "/etc/passwd"),
    _link("weights are a link out of the folder", "index.link", "model.safetensors", "/etc/passwd"),
    _link("weights are a link to themselves", "", "model.safetensors", "model.safetensors"),
    _link("tokenizer.model is a link to a private file", "index.link", "tokenizer.model", "/etc/passwd"),
    _link("tokenizer.json is a link to a private file", "index.link", "tokenizer.json", "/etc/hostname"),
    _hf("weights are a pipe", "", _fifo),
    _hf(
        "weights are a folder",
        "",
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    ),
    _hf("a tensor whose name steers terminals", "checkpoint.missing-tensor", _renamed(NORM, ESCAPE)),
    _hf("a tensor named like markup", "checkpoint.missing-tensor", _renamed(NORM, "[/x][link=https://evil]<script>")),
    _hf("a tensor named like a path", "checkpoint.missing-tensor", _renamed(NORM, "../../etc/passwd")),
    _index("a shard one folder up", "index.name", _shard("../model-1.safetensors")),
    _index("an absolute shard", "index.name", _shard("/etc/passwd")),
    _index("a shard through a folder", "index.name", _shard("a/../../b")),
    _index("a shard with a NUL", "index.name", _shard("model\0.safetensors")),
    _index("a shard named ..", "index.name", _shard("..")),
    _index("a shard named nothing", "index.name", _shard("")),
    _index("a shard name of 300 letters", "index.name", _shard("a" * 300)),
    _index("a shard that steers terminals", "index.name", _shard(ESCAPE)),
    _index("a shard that is not there", "file.missing", _shard("model-3.safetensors")),
    _index("a shard that is the config", "file.message", _shard("config.json")),
    _index("a tensor in the other shard", "index.mismatch", _shard("model-2.safetensors")),
    _index(
        "a tensor in no shard", "index.mismatch", lambda c: c["weight_map"].__setitem__("ghost", "model-1.safetensors")
    ),
    _index("a tensor it does not name", "index.mismatch", lambda c: c["weight_map"].popitem()),
    _index("a weight map that is a list", "index.weight-map", lambda c: c.__setitem__("weight_map", [1])),
    _index("a weight map of numbers", "index.weight-map", lambda c: c.__setitem__("weight_map", {"a": 1})),
    _index(
        "a key twice",
        "json.duplicate-key",
        lambda c: '{"weight_map":{"a":"model-1.safetensors","a":"model-2.safetensors"}}',
    ),
    _index("nested 100,000 deep", "json.depth", lambda c: "[" * 100_000),
]


# -- files beside a model: adapters, importance matrices, tokenizers
# ---------------------------------------------------


def _adapter(name: str, id: str, **changed: object) -> Case:
    def build(folder: Path, valid: ValidCheckpoints) -> Path:
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changed
        shutil.copytree(valid["hf"], folder / "model")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(content))
        prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        head, _, size = safetensors.layout(
            [(f"{prefix}A.weight", "F32", (2, 8)), (f"{prefix}B.weight", "F32", (8, 2))], None
        )
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(head + bytes(size - len(head)))
        return folder / "model"

    return Case(f"adapter: {name}", build, id, ("--lora", "@/adapter"))


def _tokenizer(name: str, id: str, file: str, data: bytes) -> Case:
    return _hf(f"tokenizer, {name}", id, lambda folder: (folder / file).write_bytes(data), ("--to", "gguf"))


BESIDE = [
    _adapter("a pattern that matches for ever", "lora.pattern", rank_pattern={"(([a-z._0-9]+)+)+x": 2}),
    _adapter("a pattern of many choices", "lora.pattern", rank_pattern={"(.|.)" * 60 + "x": 2}),
    _adapter("a pattern that is none", "lora.pattern", alpha_pattern={"(": 2}),
    _adapter("another kind", "lora.kind", peft_type="EVIL"),
    _adapter("a rank of 2^40", "lora.rank", r=1 << 40),
    _adapter("a target without weights", "lora.target", target_modules=["k_proj"]),
    _tokenizer("no message", "sentencepiece.damaged", "tokenizer.model", b"\xff" * 100),
    _tokenizer(
        "a piece longer than the file", "sentencepiece.damaged", "tokenizer.model", b"\x0a" + b"\xff" * 8 + b"\x01"
    ),
    _tokenizer("no pieces", "sentencepiece.damaged", "tokenizer.model", b"\x12\0"),
    _tokenizer("5,000,000 empty pieces", "sentencepiece.damaged", "tokenizer.model", b"\x0a\0" * 5_000_000),
    _tokenizer("nested deep", "json.depth", "tokenizer.json", b"[" * 1_000_000),
    _tokenizer("a list", "tokenizer.json-type", "tokenizer.json", b"[]"),
    _tokenizer("a key twice", "json.duplicate-key", "tokenizer_config.json", b'{"a":1,"a":2}'),
]

CASES = [*HF, *GGUF, *SBS, *KERAS, *ORBAX, *BESIDE]
