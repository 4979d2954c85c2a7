"""What users give in place of a checkpoint, and folders that hold several or parts: the message names it and the next
command (llama.cpp PR 9397).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2tool.containers.gguf import INT64, GGUFValue
from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

gguf = pytest.importorskip("gguf")

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    source = write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder / "src")
    assert run("convert", source, folder / "model.gguf", "--quiet").exit_code == 0
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "b"}}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    name = b"blk.0.attn_q.weight"
    (folder / "imatrix.dat").write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 1.0))
    for kind in ("imatrix", "adapter", "mmproj"):
        writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "clip" if kind == "mmproj" else "gemma2")
        if kind == "imatrix":
            writer.kv_data[0].clear()  # it has no architecture
        writer.add_string("general.type", kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder


def refused(path: Path) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        registry.open_checkpoint(path)
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("src/config.json", "is a model's config", "give its folder"),
        ("model.gguf.receipt.json", "is a receipt", "model.gguf"),
        (INDEX, "is an index of shards", "give its folder"),
        ("tokenizer.json", "is a tokenizer", "give its folder"),
        ("adapter", "is an adapter without its model", "--lora"),
        ("adapter/adapter_config.json", "is an adapter's config", "--lora"),
        ("imatrix.dat", "is an importance matrix", "--imatrix"),
        ("imatrix.gguf", "is an importance matrix", "--imatrix"),
        ("mmproj.gguf", "is the projector of a vision model", "give the model's GGUF"),
    ],
)
def test_files_of_a_model(files: Path, name: str, message: str, hint: str) -> None:
    error = refused(files / name)
    assert message in error.message and hint in error.hint


@pytest.mark.parametrize("text", ["no/model.gguf", "no/such/model", "models", "./org/name"])
def test_what_is_not_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("inspect", text)
    assert result.exit_code == 3 and "no such file" in result.stderr and "check the path" in result.stderr


@pytest.mark.slow
def test_a_folder_of_several_ggufs(files: Path, tmp_path: Path) -> None:
    for name in ("model-q4_0.gguf", "model-q8_0.gguf"):
        shutil.copy(files / "model.gguf", tmp_path / name)
    error = refused(tmp_path)
    assert error.id == "gguf.several" and "model-q4_0.gguf, model-q8_0.gguf" in error.message
    assert "model-q4_0.gguf" in error.hint
    result = run("convert", files / "src", tmp_path, "--force")
    assert result.exit_code == 2 and len(list(tmp_path.iterdir())) == 2, "it is nobody's to replace"


@pytest.mark.slow
def test_shards_of_a_gguf_that_are_missing_are_named(files: Path, tmp_path: Path) -> None:
    words = ("convert", files / "src", tmp_path / "s", "--to", "gguf", "--split-max-tensors", 8, "--quiet")
    assert run(*words).exit_code == 0
    shards = sorted((tmp_path / "s").iterdir())
    for shard in (shards[0], shards[2]):
        shard.unlink()
    for path in (tmp_path / "s", shards[1]):
        error = refused(path)
        assert error.id == "gguf.split" and f"{len(shards) - 2} of {len(shards)} shards" in error.message
        assert shards[0].name in error.message and shards[2].name in error.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (139, "IQ4_K of ik_llama.cpp"),
        (31, "withdrawn by ggml"),
        (77, "the type 77"),
        (344, "interleaved"),
    ],
)
def test_types_of_forks_are_named(files: Path, tmp_path: Path, number: int, words: str) -> None:
    data = bytearray((files / "model.gguf").read_bytes())
    name = b"blk.0.attn_q.weight"
    place = data.find(name) + len(name) + 4 + 16
    data[place : place + 4] = struct.pack("<I", number)
    (tmp_path / "fork.gguf").write_bytes(data)
    error = refused(tmp_path / "fork.gguf")
    assert error.id == "gguf.tensor-type" and words in error.message and "download" not in error.hint


@pytest.mark.slow
def test_a_big_endian_file_says_how_to_turn_it(files: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "gemma2", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    error = refused(tmp_path / "big.gguf")
    assert error.id == "gguf.big-endian" and "gguf-convert-endian" in error.hint and "download" not in error.hint


@pytest.mark.parametrize("number", [1 << 40, -1])
def test_a_file_type_that_is_no_uint32_is_refused(files: Path, number: int) -> None:
    """llama.cpp cannot read it either. Up to 2^32 - 1 it is kept, whatever it means."""
    with registry.open_checkpoint(files / "model.gguf") as checkpoint:
        kv = checkpoint.metadata["gguf"].kv
        kv["general.file_type"] = GGUFValue(INT64, None, number)
        with pytest.raises(InputRefused, match="which llama.cpp cannot read"):
            registry.by_name("gguf").layout(checkpoint, WriteOptions())
        kv["general.file_type"] = GGUFValue(INT64, None, (1 << 32) - 1)
        assert registry.by_name("gguf").layout(checkpoint, WriteOptions()).files


def sharded(files: Path, folder: Path) -> list[Path]:
    """The source's weights as two shards without an index."""
    shutil.copytree(files / "src", folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = []
    for number, part in enumerate((names[:9], names[9:]), 1):
        path = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path, metadata={"format": "pt"})
        shards.append(path)
    return shards


def test_shards_without_an_index_are_read(files: Path, tmp_path: Path) -> None:
    """vLLM and mlx-lm read them, by their names."""
    sharded(files, tmp_path / "s")
    with registry.open_checkpoint(tmp_path / "s") as checkpoint, registry.open_checkpoint(files / "src") as source:
        assert checkpoint.format == "hf" and checkpoint.tensors.keys() == source.tensors.keys()
        assert checkpoint.loader_files == ()


def test_shards_without_an_index_are_complete_and_of_one_checkpoint(files: Path, tmp_path: Path) -> None:
    shards = sharded(files, tmp_path / "s")
    shutil.copy(shards[0], tmp_path / "s" / "model-00001-of-00003.safetensors")
    assert refused(tmp_path / "s").id == "shards.several"
    (tmp_path / "s" / "model-00001-of-00003.safetensors").unlink()
    shards[1].unlink()
    error = refused(tmp_path / "s")
    assert error.id == "shards.incomplete" and shards[1].name in error.message


def test_a_json_of_something_else_is_not_explained(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert refused(tmp_path / "a.json").id not in ("input.other-file", "input.missing")
