"""llama.cpp's token ids are transformers', for every tokenizer case of fine-tunes, and it stops where the reader says.

Files hold the tokenizer's keys alone: llama.cpp loads them with ``vocab_only``.
"""

from __future__ import annotations

import ctypes as C
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma2tool.containers.gguf import GGUFValue, encode_header
from gemma2tool.formats.gguf.config import shape_keys
from gemma2tool.formats.gguf.key_values import KeyReader, KeyValue, string, u32
from gemma2tool.formats.gguf.stops import END_TEXTS, OTHER_TEXTS, all_stop_ids
from gemma2tool.formats.gguf.tokenizer_keys import tokenizer_keys
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.tokenizer import DIFFICULT
from tests.formats.gguf import test_fine_tunes as fine_tunes
from tests.formats.gguf.test_fine_tunes import SIZE, TURN, Folder

folder = fine_tunes.folder

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

EDITS = [
    fine_tunes.chatml, fine_tunes.bos_of_chatml, fine_tunes.padded, fine_tunes.added_tokens_json_too,
    fine_tunes.thinking, fine_tunes.pad_is_eos,
    fine_tunes.eos_is_the_end_of_turn, fine_tunes.eos_in_the_tokenizer_only, fine_tunes.unused_made_special,
    fine_tunes.added_pad, fine_tunes.no_template, fine_tunes.named_templates_only, fine_tunes.two_templates,
]  # fmt: skip


class Vocabulary:
    """A vocabulary as llama.cpp has it."""

    def __init__(self, lib: Any, pointer: int) -> None:
        self.lib, self.pointer = lib, pointer

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (C.c_int32 * (len(data) + 16))()
        count = self.lib.llama_tokenize(self.pointer, data, len(data), buffer, len(buffer), True, True)
        return list(buffer[:count])

    def stops(self) -> set[int]:
        is_end = self.lib.llama_vocab_is_eog
        is_end.argtypes, is_end.restype = [C.c_void_p, C.c_int32], C.c_bool
        return {token for token in range(self.lib.llama_vocab_n_tokens(self.pointer)) if is_end(self.pointer, token)}


@contextmanager
def loaded(llama: ModuleType, path: Path) -> Iterator[Vocabulary]:
    lib = llama.library()
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp does not load the file"
    try:
        yield Vocabulary(lib, lib.llama_model_get_vocab(model))
    finally:
        lib.llama_model_free(model)


def keys_of(source: Checkpoint, *changes: KeyValue) -> dict[str, GGUFValue]:
    keys = [("general.architecture", string("gemma2")), *shape_keys(source.config)]
    return dict([*keys, *tokenizer_keys(source.tokenizer, source.config).kv, *changes])


def written(keys: dict[str, GGUFValue], path: Path) -> Path:
    path.write_bytes(encode_header(list(keys.items()), [])[0])
    return path


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_ids_and_stops(
    llama: ModuleType,
    folder: Folder,
    tmp_path: Path,
    edit: Callable[[Folder], None],
) -> None:
    transformers = pytest.importorskip("transformers")
    edit(folder)
    source = folder.checkpoint()
    for name in source.assets:
        if "/" not in name:
            (tmp_path / name).write_bytes(source.assets[name])
    config = {"model_type": "gemma2"} | {"vocab_size": source.config.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    keys = keys_of(source)
    tokens = [added.content for added in source.tokenizer.added_tokens.values()]
    texts = [*DIFFICULT, *tokens, *(f"one {token}two {token} three" for token in tokens)]
    with loaded(llama, written(keys, tmp_path / "model.gguf")) as vocabulary:
        for text in texts:
            if "\u2581" in text:  # llama.cpp looks for tokens of spaces in the text, where this is not a space
                continue
            assert vocabulary.encode(text) == tokenizer(text)["input_ids"], text
        predicted = set(all_stop_ids(KeyReader(keys, "model.gguf")))
        assert vocabulary.stops() == predicted
        generation = folder.generation["eos_token_id"]
        stops = {generation} if isinstance(generation, int) else set(generation)
        assert stops <= predicted, "what transformers stops at"


def added(folder: Folder, *texts: str, special: bool) -> dict[str, GGUFValue]:
    for number, text in enumerate(texts):
        folder.add(SIZE + number, text, special=special)
    folder.resize(SIZE + len(texts))
    return keys_of(folder.checkpoint())


NEARLY = ("<end>", "<|eot|>", "<|endofturn|>", "[END]", "<eot_id>", "<|fim_prefix|>", "<|fim_sep|>", "<EOM>", "<s>")


@pytest.mark.parametrize("special", [True, False], ids=["special", "normal"])
@pytest.mark.parametrize("text", [*sorted((END_TEXTS | OTHER_TEXTS) - {"<eos>", "<end_of_turn>"}), *NEARLY])
def test_every_text_of_an_end(llama: ModuleType, folder: Folder, tmp_path: Path, text: str, special: bool) -> None:
    keys = added(folder, text, special=special)
    with loaded(llama, written(keys, tmp_path / "model.gguf")) as vocabulary:
        assert vocabulary.stops() == set(all_stop_ids(KeyReader(keys, "model.gguf")))
        assert (SIZE in vocabulary.stops()) == (text not in NEARLY)


def test_an_ordinary_piece_set_as_eos_is_a_stop(llama: ModuleType, folder: Folder, tmp_path: Path) -> None:
    """What ``check`` says of it: llama.cpp ends answers at a piece of text, whatever its type."""
    source = folder.checkpoint()
    piece = next(token for token in range(SIZE) if not source.tokenizer.is_found_whole(token))
    keys = keys_of(source, ("tokenizer.ggml.eos_token_id", u32(piece)))
    with loaded(llama, written(keys, tmp_path / "model.gguf")) as vocabulary:
        assert piece in vocabulary.stops()
        assert vocabulary.stops() == set(all_stop_ids(KeyReader(keys, "model.gguf")))


@pytest.mark.parametrize(
    "texts",
    [
        ("<|end|>", "<|return|>", "<|call|>"),
        ("<|end|>", "<|flush|>", "<|calls|>"),
        ("<|end|>", "<|return|>"),
        ("<|end|>", "<|call|>", "<|calls|>"),
        tuple(sorted(END_TEXTS - {"<eos>", "<end_of_turn>"})),
    ],
    ids=["harmony", "flush and calls", "no call", "no return", "all"],
)
def test_texts_together(llama: ModuleType, folder: Folder, tmp_path: Path, texts: tuple[str, ...]) -> None:
    keys = added(folder, *texts, special=True)
    with loaded(llama, written(keys, tmp_path / "model.gguf")) as vocabulary:
        assert vocabulary.stops() == set(all_stop_ids(KeyReader(keys, "model.gguf")))


@pytest.mark.parametrize(
    "change",
    [
        ("tokenizer.ggml.eot_token_id", u32(5)),
        ("tokenizer.ggml.eom_token_id", u32(6)),
        ("tokenizer.ggml.eos_token_id", u32(TURN)),
        ("tokenizer.ggml.eos_token_id", u32(12)),
        ("tokenizer.ggml.fim_pad_token_id", u32(9)),
        ("tokenizer.ggml.fim_rep_token_id", u32(10)),
        ("tokenizer.ggml.fim_sep_token_id", u32(11)),
        ("tokenizer.ggml.prefix_token_id", u32(9)),
    ],
    ids=lambda change: f"{change[0].rpartition('.')[2]}={change[1].value}",
)
def test_stops_that_keys_name(
    llama: ModuleType,
    folder: Folder,
    tmp_path: Path,
    change: KeyValue,
) -> None:
    keys = keys_of(folder.checkpoint(), change)
    with loaded(llama, written(keys, tmp_path / "model.gguf")) as vocabulary:
        assert vocabulary.stops() == set(all_stop_ids(KeyReader(keys, "model.gguf")))
