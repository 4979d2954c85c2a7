"""Targets: configs, indexes, receipts and journals."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.fuzz.base import JsonTarget, MemoryFile, MemoryFolder, parsed


class HFConfig(JsonTarget):
    name = "hf-config"
    names = (
        "hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "layer_types",
        "sliding_window", "id2label", "label2id", "num_labels", "sliding_attention", "full_attention", "architectures",
        "eos_token_id", "yarn", "longrope", "llama3", "dynamic", "rope_type", "factor", "torch_dtype", "dtype",
        "bfloat16", "hidden_act", "hidden_activation", "gelu", "text_config", "long_factor", "quantization_config",
        "query_pre_attn_scalar", "problem_type", "pad_token_id", "transformers_version",
        "original_max_position_embeddings",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats import assets
        from gemma2tool.model.tensors import check_tensors

        self.read, self.check, self.file = assets.read_config, check_tensors, MemoryFile()

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))

    def run(self, path: Path) -> object:
        from gemma2tool.errors import InputRefused

        config = self.read(path)
        again = type(config).from_hf(json.loads(json.dumps(config.to_hf())))
        outcome = (len(config.warnings), len(config.to_hf()), config.size_name, again == config)
        with suppress(InputRefused):
            self.check(config, {}, "here")
        return outcome


class HFIndex(JsonTarget):
    name = "hf-index"
    names = (
        "weight_map",
        "metadata",
        "total_size",
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
        "..",
        ".",
        "../a",
        "link",
        "out",
        "a\0",
    )

    def prepare(self) -> None:
        from gemma2tool.formats.mapping import container_tensors

        self.raw, folder = container_tensors, MemoryFolder(self.name)
        self.folder = folder
        folder.put("a.safetensors", b"")
        folder.put("b.safetensors", b"")
        for name, to in (("link", "a.safetensors"), ("out", "/etc/passwd")):
            if not (folder.path / name).is_symlink():
                (folder.path / name).symlink_to(to)

    def place(self, data: bytes) -> Path:
        return self.folder.put("model.safetensors.index.json", data)

    def run(self, index: Path) -> object:
        files, weight_map = self.raw.indexed_files(index)
        root = self.folder.path.resolve()
        if any(path.resolve().parent != root for path in files):
            raise AssertionError("a shard outside the folder")
        self.raw.check_index(index, weight_map, {"x": "a.safetensors", "y": "b.safetensors"})
        return len(files)


class KerasConfig(JsonTarget):
    name = "keras-config"
    names = (
        "GemmaBackbone",
        "class_name",
        "config",
        "dtype",
        "bfloat16",
        "use_post_ffw_norm",
        "query_head_dim_normalize",
        "intermediate_dim",
    )

    def prepare(self) -> None:
        from gemma2tool.formats.keras import config as keras_config

        self.read, self.folder = keras_config.read, MemoryFolder(self.name)

    def place(self, data: bytes) -> Path:
        return self.folder.put("config.json", data).parent

    def run(self, folder: Path) -> object:
        return len(self.read(folder).to_hf())


class LoraConfig(JsonTarget):
    """An adapter's config with fixed weights. Its patterns are untrusted regular expressions."""

    name = "lora-config"
    names = (
        "r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora",
        "use_dora", "peft_type", "q_proj", "LORA", "(a+)+$", "(.*)*x", "^model.layers.0", r"\d+", "(?P<a>.)(?P=a)", "[",
        "(.|.)*" * 5, ".*.*.*.*.*.*x", "q_proj|k_proj", "(" * 100,
    )  # fmt: skip

    def prepare(self) -> None:
        import ml_dtypes  # noqa: F401
        import numpy as np

        from gemma2tool.formats.adapters.peft import config, names, reader
        from gemma2tool.model.lazy import ArrayTensor

        self.read_config, self.read_tensors, self.reader = config.AdapterConfig.read, names.PeftTensors.named, reader
        self.folder, self.path = MemoryFolder(self.name), Path("adapter_model.safetensors")
        module = "model.layers.0.self_attn.q_proj"
        self.parts = {side: ArrayTensor(np.zeros((8, 8), np.float32), origin=side) for side in "AB"}
        self.module = module
        self.weights = {f"{names.PREFIX}{module}.lora_{side}.weight": tensor for side, tensor in self.parts.items()}

    def place(self, data: bytes) -> Path:
        return self.folder.put("adapter_config.json", data).parent

    def run(self, folder: Path) -> object:
        config = self.read_config(folder)
        tensors = self.read_tensors(self.weights, self.path)
        self.reader.check_targets(config, tensors, (), {f"{self.module}.weight": self.parts["A"]})
        return self.reader.adapter_deltas(config, tensors)[f"{self.module}.weight"].scaling > 0


class Packing(JsonTarget):
    """A quantization config and the types and shapes of its tensors. The first rows are decoded."""

    name = "packing"
    imports = True
    names = (
        "quant_method", "gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "bits", "group_size",
        "desc_act", "version", "gemm", "gemv", "F32", "BF16", "F16", "U8", "I8", "I32", "F8_E4M3", "config_groups",
        "weights", "strategy", "group", "channel", "tensor", "block", "block_structure", "num_bits", "symmetric",
        "type", "int", "float", "format", "pack-quantized", "float-quantized", "int-quantized", "load_in_4bit",
        "load_in_8bit", "bnb_4bit_quant_type", "nf4", "fp4", "bnb_4bit_use_double_quant", "quant_type", "actorder",
        "sym",
    )  # fmt: skip

    def prepare(self) -> None:
        import numpy as np

        from gemma2tool.formats import packings
        from gemma2tool.formats.mapping import container_tensors
        from gemma2tool.model.lazy import ArrayTensor

        self.np, self.packings, self.dtypes, self.array = np, packings, container_tensors.NUMPY_DTYPES, ArrayTensor

    def place(self, data: bytes) -> tuple[dict, object] | None:
        content = parsed(data)
        tensors = content.get("tensors") if isinstance(content, dict) else None
        if not isinstance(tensors, dict):
            return None
        stored = {}
        for name, entry in tensors.items():
            if (
                not isinstance(entry, list)
                or len(entry) < 2
                or not isinstance(entry[0], str)
                or entry[0] not in self.dtypes
            ):
                return None
            shape = entry[1]
            if (
                not isinstance(shape, list)
                or len(shape) > 8
                or not all(type(n) is int and 0 <= n <= 4096 for n in shape)
            ):
                return None
            if self.np.prod(shape, dtype=self.np.int64) > 1 << 16:
                return None
            values = self.np.zeros(shape, self.np.uint8)
            if (
                len(entry) > 2
                and isinstance(entry[2], str)
                and len(entry[2]) == values.nbytes * self.dtypes[entry[0]].itemsize
            ):
                values = self.np.frombuffer(entry[2].encode("latin1", "replace"), self.dtypes[entry[0]]).reshape(shape)
            stored[name] = self.array(values.astype(self.dtypes[entry[0]]), origin=name)
        return stored, content.get("quantization_config")

    def run(self, argument: tuple[dict, object]) -> object:
        decoded = self.packings.unpack(*argument)
        for tensor in decoded.values():
            if tensor.shape and tensor.rows:
                tensor.load_rows(0, 1)
        return len(decoded)


class Receipt(JsonTarget):
    name = "receipt"
    names = (
        "gemma2tool.receipt", "schema_version", "hashes", "model", "tensors", "config", "files", "sha256", "bytes",
        "name", "output", "source", "logits", "ids", "window", "verification", "kind", "lossless", "shape", "passed",
        "gates", "../x", "a" * 64,
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.receipt import document as receipt

        self.read, self.file = receipt.read_receipt, MemoryFile()

    def place(self, data: bytes) -> Path:
        return Path(self.file.hold(data))

    def run(self, path: Path) -> object:
        receipt = self.read(path)
        return receipt.kind, receipt.logits is None, len(receipt.files)


class Journal(JsonTarget):
    """One line of JSON per entry. The checksums are corrected."""

    name = "journal"
    names = ("fingerprint", "done", "placing", "tool", "model.safetensors", "../x")

    def prepare(self) -> None:
        from gemma2tool.storage.staging import journal as staging_journal

        self.parse = staging_journal.parse

    def mutate(self, rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
        lines = data.splitlines() or [b""]
        at = rng.randrange(len(lines))
        lines[at] = super().mutate(rng, lines[at], pool)
        if rng.random() < 0.1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        return b"\n".join(lines)

    def place(self, data: bytes) -> bytes:
        texts = [line + b"\n" for line in data.splitlines()]
        return b"".join(b"%08x %s" % (zlib.crc32(text), text) for text in texts)

    def run(self, data: bytes) -> object:
        run = self.parse(data)
        return run and (
            len(run.pieces),
            run.placed_inode is None,
            len(run.fingerprint),
            run.valid_bytes == len(data),
        )
