"""Commands that several machines share: their parts, merged, are the bytes of one machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.pipeline.sharding.part import Part, read_part, write_part
from gemma2tool.pipeline.sharding.shard import Shard


def run(*words: object, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def imatrix(source: Path, out: Path, *options: object, env: dict[str, str] | None = None) -> None:
    text = source / "heldout.txt"
    result = run("imatrix", source, out, "--text", text, "--chunk", 16, "--chunks", 9, *options, env=env)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_imatrix(fixture_dir: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.gguf", tmp_path / "many.gguf"
    imatrix(fixture_dir, one, "--output-weights")
    for index in range(4):  # one of them has nothing to do: the text has three batches
        imatrix(fixture_dir, many, "--output-weights", env={"RANK": str(index), "WORLD_SIZE": "4"})
    result = run("merge", many, "--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)["parts"]) == 4
    assert many.read_bytes() == one.read_bytes()
    assert run("merge", many).exit_code == 2
    parts = sorted(tmp_path.glob("*.shard-*"), reverse=True)
    assert run("merge", tmp_path / "named.gguf", *parts).exit_code == 0
    assert (tmp_path / "named.gguf").read_bytes() == one.read_bytes()


def test_a_part_is_named_where_it_is_no_use(fixture_dir: Path, tmp_path: Path) -> None:
    alone = part(tmp_path, 0)
    for words in (
        ("inspect", alone),
        ("quantize", fixture_dir, tmp_path / "q.gguf", "--type", "q4_0", "--imatrix", alone),
    ):
        result = run(*words)
        assert result.exit_code == 3 and "is a part that --shard wrote" in result.stderr, result.stderr
    assert "gemma2tool merge OUT" in result.stderr


def part(folder: Path, index: int, count: int = 2, kind: str = "imatrix", name: str = "", **settings: str) -> Path:
    path = folder / f"{name}{kind}-{index}-of-{count}"
    content = {"dataset": "t.txt", "shape": [8, 16], "batches": [index, index + 1]}
    write_part(Part(kind, Shard(index, count), settings, content, {"a": np.ones((1, 4))}), path, force=False)
    return path


def refusal(folder: Path, *paths: Path) -> str:
    result = run("merge", folder / "out.gguf", *paths)
    assert result.exit_code in (2, 3) and not (folder / "out.gguf").exists()
    assert result.stderr.startswith("error[part.") and result.stderr.count("\n") == 2, result.stderr
    return " ".join(result.stderr.split())


@pytest.mark.slow
def test_wrong_merges(tmp_path: Path) -> None:
    first, second = part(tmp_path, 0, model="a", text="b"), part(tmp_path, 1, model="a", text="b")
    assert "no parts beside it" in refusal(tmp_path)
    assert "shard 1/2 is missing" in refusal(tmp_path, first)
    again = part(tmp_path, 0, model="a", text="b", name="again")
    assert f"shard 0/2, as {first}" in refusal(tmp_path, first, again, second)
    assert "model is x, and a in" in refusal(tmp_path, first, part(tmp_path, 1, model="x", text="b", name="m"))
    assert "text is x, and b in" in refusal(tmp_path, first, part(tmp_path, 1, model="a", text="x", name="t"))
    assert "number of shards is 3, and 2" in refusal(tmp_path, first, part(tmp_path, 1, 3, model="a", text="b"))
    assert "command is quality" in refusal(tmp_path, first, part(tmp_path, 1, kind="quality", model="a", text="b"))
    assert "windows is 3, and absent" in refusal(
        tmp_path, first, part(tmp_path, 1, windows="3", model="a", text="b", name="w")
    )
    assert run("merge", tmp_path / "out.gguf", first, second).exit_code == 0


@pytest.mark.slow
def test_other_files_are_not_parts(tmp_path: Path, fixture_dir: Path) -> None:
    good, strange = part(tmp_path, 0), tmp_path / "strange"
    for data in (b"", b"GGUF", good.read_bytes()[:-1], good.read_bytes() + b"\0"):
        strange.write_bytes(data)
        assert "not a part that a shard wrote" in refusal(tmp_path, good, strange)
    content = {"dataset": "t", "shape": [4, 4], "batches": [0, 3]}
    write_part(Part("imatrix", Shard(0, 1), {}, content, {"a": np.ones((1, 4))}), tmp_path / "short", force=False)
    assert "do not follow" in refusal(tmp_path, tmp_path / "short")
    write_part(Part("other", Shard(0, 1), {}, {}), tmp_path / "other", force=False)
    assert "writes no parts" in refusal(tmp_path, tmp_path / "other")
    assert read_part(good).arrays["a"].dtype == np.float64


def test_a_strange_shard_is_one_line(fixture_dir: Path, tmp_path: Path) -> None:
    words = ("imatrix", fixture_dir, tmp_path / "m", "--text", fixture_dir / "heldout.txt")
    for result in (run(*words, "--shard", "2/2"), run(*words, env={"RANK": "9", "WORLD_SIZE": "3"})):
        assert result.exit_code == 2 and "error[shard.value]" in result.stderr
