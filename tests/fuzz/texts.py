"""Targets: tokenizers, model cards, importance matrices, and GGUF files as models."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma2tool.errors import InputRefused
from tests.fuzz.base import CORPUS, FileTarget, JsonTarget, MemoryFile, Target, parsed
from tests.fuzz.containers import GGUF


class SentencePiece(Target):
    name = "sentencepiece"
    tokens = (
        b"\x0a\x03\x0a\x01a",
        b"\x0a\x00",
        b"\x12\x00",
        b"\x1a\x00",
        b"\x15\0\0\xc0\x7f",
        b"\x18\x06",
        b"\xff" * 9 + b"\x01",
        b"\x80" * 10,
        b"\x0b",
    )

    def prepare(self) -> None:
        from gemma2tool.containers import tokenizer_model

        self.parse, self.check = tokenizer_model.parse, tokenizer_model.check

    def run(self, data: bytes) -> object:
        model = self.parse(data)
        self.check(data)
        return min(len(model.pieces), 8), len(model.trainer), len(model.normalizer)


class SentencePieceLibrary(SentencePiece):
    """The library itself, on whatever passes the guard before it."""

    name = "sentencepiece-library"

    def prepare(self) -> None:
        super().prepare()
        from sentencepiece import SentencePieceProcessor

        self.load = SentencePieceProcessor
        with suppress(RuntimeError):  # the library may refuse a seed; it has imported what it needs by then
            self.load(model_proto=self.seeds()[0])

    def seeds(self) -> list[bytes]:
        return SentencePiece().seeds()

    def run(self, data: bytes) -> object:
        self.check(data)
        try:
            model = self.load(model_proto=data)
        except RuntimeError:
            return None
        model.decode(model.encode("Hello, ab a  world!"))
        return min(model.get_piece_size(), 8)


class Tokenizer(JsonTarget):
    """tokenizer.json, tokenizer_config.json and similar files, through everything that a GGUF gets from them."""

    name = "tokenizer"
    names = (
        "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json",
        "generation_config.json", "model", "vocab", "merges", "added_tokens", "added_tokens_decoder", "content",
        "special", "id", "BPE", "type", "chat_template", "bos_token", "eos_token", "add_bos_token", "post_processor",
        "TemplateProcessing", "single", "SpecialToken", "<bos>", "<eos>", "<unk>", "<pad>", "eos_token_id",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf.tokenizer_keys import tokenizer_keys
        from gemma2tool.formats.hf.tokenizer import transformers_tokenizer_files
        from gemma2tool.model.config import Gemma2Config
        from gemma2tool.model.tokenizer_runner import TokenizerRunner

        self.keys, self.completed, self.run_it = tokenizer_keys, transformers_tokenizer_files, TokenizerRunner
        self.config = Gemma2Config(vocab_size=40)
        folder = CORPUS / "sentencepiece"
        self.model = next((path.read_bytes() for path in sorted(folder.glob("tiny*"))), b"")

    def place(self, data: bytes) -> Any:
        from gemma2tool.model.checkpoint import Checkpoint
        from gemma2tool.model.format_facts import FormatFacts
        from tests.support.assets import file_assets

        content = parsed(data)
        if not isinstance(content, dict):
            return None
        files = {}
        for name, value in content.items():
            if name in self.names[:6]:
                files[name] = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
        if content.get("model"):
            files["tokenizer.model"] = self.model
        return Checkpoint(Path("side"), FormatFacts("hf"), self.config, {}, file_assets(files))

    def run(self, checkpoint: Any) -> object:
        tokenizer = checkpoint.tokenizer
        keys = self.keys(tokenizer, self.config)
        with suppress(InputRefused):
            self.run_it(tokenizer).encode("Hello, ab a  world!")
        return len(keys.kv), len(keys.warnings), len(tokenizer.conflicts), len(self.completed(checkpoint)[0])


class ModelCard(Target):
    """The YAML in README.md, and what gguf-py concludes from it."""

    name = "model-card"
    imports = True
    tokens = (
        b"---\n", b"license: gemma\n", b"base_model: google/gemma-2-2b\n", b"- a\n", b"&a ", b"*a ", b"<<: *a\n", b"? ",
        b": ", b"[", b"]", b"{", b"}", b"!!python/object:", b"!!binary ", b"!!timestamp ", b"1:1:1", b"0x",
        b"2001-01-01", b"|\n", b">-\n", b"'", b'"', b"tags:\n", b"datasets:\n", b"language:\n", b"- no\n", b"\t",
        b"v1.2", b"7B",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf.metadata import metadata_keys
        from gemma2tool.model.checkpoint import Assets, Checkpoint
        from gemma2tool.model.config import Gemma2Config
        from gemma2tool.model.format_facts import FormatFacts

        self.keys, self.assets = metadata_keys, Assets
        self.checkpoint = Checkpoint(Path("gemma-2-2b-it"), FormatFacts("hf"), Gemma2Config(), {})

    def run(self, data: bytes) -> object:
        warnings: list[str] = []
        self.checkpoint.assets = self.assets({"README.md": lambda: data})
        return len(self.keys(self.checkpoint, warnings)), len(warnings)


class GGUFModel(GGUF):
    """A GGUF as a model: config, tokenizer and tensor table."""

    name = "gguf-model"
    tokens = (
        *GGUF.tokens, b"tokenizer.ggml.tokens", b"gemma2.block_count", b"gemma2.embedding_length",
        b"gemma2.attention.sliding_window", b"tokenizer.chat_template", b"split.no", b"token_embd.weight",
        b"tokenizer.ggml.eos_token_id", struct.pack("<f", float("nan")), b"gemma2.rope.scaling.type",
        b"gemma2.rope.scaling.factor", b"tokenizer.chat_templates",
    )  # fmt: skip

    def prepare(self) -> None:
        from gemma2tool.formats.gguf import format as gguf

        self.format, self.file = gguf.GGUF(), MemoryFile()

    def run(self, path: Path) -> object:
        with self.format.open(path) as checkpoint:
            sizes = [len(checkpoint.assets[name]) for name in checkpoint.assets]
            for tensor in checkpoint.tensors.values():
                tensor.load_rows(0, 1)
            return len(sizes), len(checkpoint.tensors), len(checkpoint.config.warnings)


class Imatrix(FileTarget):
    name = "imatrix"
    tokens = (
        *GGUF.tokens,
        b"general.type",
        b"imatrix",
        b".in_sum2",
        b".counts",
        b"imatrix.datasets",
        struct.pack("<f", float("nan")),
    )

    def prepare(self) -> None:
        from gemma2tool.formats.gguf.imatrix import read_imatrix

        self.read, self.file = read_imatrix, MemoryFile()

    def run(self, path: Path) -> object:
        matrix = self.read(path)
        return len(matrix.weights), matrix.dataset is None, min(matrix.chunks, 2)
