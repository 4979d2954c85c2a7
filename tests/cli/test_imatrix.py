"""``gemma2tool imatrix`` against the file that llama-imatrix made of the same model and text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.containers import gguf
from gemma2tool.formats import registry
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.pipeline.prompt import PromptTokenizer, rows_of
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from gemma2tool.reference.streaming import StreamedForward


def run(*words: object):
    return CliRunner().invoke(app, ["imatrix", *map(str, words)])


@pytest.mark.slow
def test_equals_llama_imatrix(oracles: Path, tmp_path: Path) -> None:
    folder = oracles / "gguf"
    out = tmp_path / "ours.gguf"
    result = run(folder / "tiny_gqa4", out, "--text", folder / "cal.txt", "--chunk", 256, "--chunks", 16)
    assert result.exit_code == 0, result.output
    written, expected = read_imatrix(out), read_imatrix(folder / "imatrix" / "tiny_gqa4.gguf")
    assert written.weights.keys() == expected.weights.keys()
    for name, weights in expected.weights.items():  # llama.cpp's GELU is a float16 table, and it adds in float32
        assert np.abs(written.weights[name] - weights).max() <= 5e-3 * weights.max(), name
    mine, header = (
        gguf.read_header(out, GGML_BLOCKS),
        gguf.read_header(folder / "imatrix" / "tiny_gqa4.gguf", GGML_BLOCKS),
    )
    assert list(mine.tensors) == list(header.tensors)
    assert list(mine.kv) == list(header.kv)
    assert mine.kv["imatrix.chunk_count"] == header.kv["imatrix.chunk_count"]


@pytest.mark.slow
def test_steers_a_quantization(fixture_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert run(fixture_dir, out, "--text", fixture_dir / "heldout.txt", "--chunk", 128, "--chunks", 4).exit_code == 0
    words = ["quantize", fixture_dir, tmp_path / "iq2.gguf", "--type", "iq2_s", "--imatrix", out, "--quiet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_head_serves_the_tied_embedding(fixture_dir: Path, tmp_path: Path) -> None:
    words = (fixture_dir, tmp_path / "m.gguf", "--text", fixture_dir / "heldout.txt", "--chunk", 128, "--chunks", 2)
    assert run(*words, "--output-weights").exit_code == 0
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as source:
        words_of_text = (fixture_dir / "heldout.txt").read_text()
        ids = rows_of(PromptTokenizer(source).encode(words_of_text), 128, source.config.bos_token_id)[:2]
        hidden = StreamedForward(source, ids).last_hidden_state().double().numpy()
    weights = read_imatrix(tmp_path / "m.gguf").weights
    assert len(weights) == 43
    np.testing.assert_allclose(weights["output.weight"], np.square(hidden).mean((0, 1)), rtol=1e-4)
    embeddings = []
    for options in ((), ("--exclude-weights", "output")):
        out = tmp_path / f"{len(embeddings)}.gguf"
        quantize = ("quantize", fixture_dir, out, "--type", "q4_k_m", "--imatrix", tmp_path / "m.gguf", "--no-verify")
        result = CliRunner().invoke(app, [str(word) for word in (*quantize, *options)])
        assert result.exit_code == 0 and "does not have" not in result.output, result.output
        entry = gguf.read_header(out, GGML_BLOCKS).tensors["token_embd.weight"]
        embeddings.append(out.read_bytes()[entry.offset : entry.offset + entry.nbytes])
    assert embeddings[0] != embeddings[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"GGUF\3\0\0\0" * 9999, 3, "byte 5 is NUL"),
        (b"import os\n" * 999 + b"\xff", 3, "not UTF-8"),
        (b"", 2, "is empty"),
    ],
)
def test_files_without_text_are_refused(
    fixture_dir: Path, tmp_path: Path, content: bytes, code: int, message: str
) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(content)
    result = run(fixture_dir, tmp_path / "m.gguf", "--text", text)
    assert result.exit_code == code and message in result.output
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [(["--chunk", "100000"], 2), ([], 0)])
def test_short_texts_are_refused(fixture_dir: Path, tmp_path: Path, words: list[str], code: int) -> None:
    text = tmp_path / "t.txt"
    text.write_text("import os\n" * 300)
    result = run(fixture_dir, tmp_path / "m.gguf", "--text", text, *words)
    assert result.exit_code == code, result.output
    assert (tmp_path / "m.gguf").exists() == (code == 0)
