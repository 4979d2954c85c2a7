"""What a scan cannot read is said, and hides nothing that loaders read all the same."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma2tool import api
from gemma2tool.cli.main import app
from gemma2tool.pipeline.scan import acted_on, archives, contents, json_files
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.keras import scan_architecture, scan_hdf5
from gemma2tool.pipeline.scan.sarif import sarif
from gemma2tool.pipeline.scan.template import scan_template
from tests.pipeline.scan.test_archives import zipped

CALL = b"cos\nsystem\n(S'id'\ntR."
"""Of protocol 0, which has no first bytes of its own."""


def scanned(path: Path, data: bytes) -> api.ScanResult:
    path.write_bytes(data)
    return api.scan(path)


def ids(result: api.ScanResult) -> dict[str, str]:
    return {finding.id: finding.severity for finding in result.findings}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.safetensors", (1 << 63).to_bytes(8, "little") + b"{}"),
        ("m.safetensors", b"\xff" * 8 + b"{}"),
        ("m.gguf", b"text"),
        ("m.h5", bytes(4096)),
        ("m.bin", bytes(4096)),
        ("m.pt", b"\n" + CALL),
        ("m.npz", b"none"),
        ("m.onnx", b"\x08\x07"),
        ("config.json", b"{"),
        ("m.7z", b"7z\xbc\xaf'\x1c" + bytes(50)),
    ],
)
def test_what_nothing_could_read_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    result = scanned(tmp_path / name, data)
    assert set(ids(result)) <= {"files.unread", "archive.unread"} and result.findings
    assert result.clean and not result.complete and not result.to_json()["complete"]


def test_an_empty_folder_is_not_complete(tmp_path: Path) -> None:
    assert not api.scan(tmp_path).complete
    (tmp_path / "config.json").write_text("{}")
    assert api.scan(tmp_path).complete


def test_the_verdict_says_that_something_was_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 16)
    run = CliRunner().invoke(app, ["scan", str(tmp_path)])
    assert run.exit_code == 0 and "INCOMPLETE" in run.output and "CLEAN" not in run.output


@pytest.mark.parametrize("name", ["m", "m.safetensors", "m.gguf", "m.npy", "m.jpg", "m.md", "m.json", "m.jinja"])
def test_a_pickle_without_a_mark_is_found_by_its_content(tmp_path: Path, name: str) -> None:
    assert ids(scanned(tmp_path / name, CALL))["pickle.code"] == "danger"


@pytest.mark.parametrize("text", ["caption\nfor\nthe picture", "(c) 2024\nall rights reserved.", "N.", "import os\n"])
def test_texts_are_not_pickles(tmp_path: Path, text: str) -> None:
    assert scanned(tmp_path / "README.md", text.encode()).findings == ()


def test_a_pickle_that_continues_beyond_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1000)
    filler = b"\x80\x02B" + (2000).to_bytes(4, "little") + bytes(2000) + b"0"
    assert ids(scanned(tmp_path / "m.bin", filler + CALL)) == {"pickle.too-long": "odd"}
    assert ids(scanned(tmp_path / "tensors.bin", pickle.dumps(1, 2) + bytes(2000))) == {}


REMOTE = {"auto_map": {"AutoModel": "x.Y"}}


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": NaN, "auto_map": {"AutoModel": "x.Y"}}',
        b'{"a": 1e999, "auto_map": {"AutoModel": "x.Y"}}',
        b'{"a": %s, "auto_map": {"AutoModel": "x.Y"}}' % (b"[" * 100 + b"]" * 100),
        b'{"a": %s, "auto_map": {"AutoModel": "x.Y"}}' % (b"9" * 5000),
        b"\xef\xbb\xbf" + json.dumps(REMOTE).encode(),
        json.dumps(REMOTE).encode("utf-16"),
    ],
    ids=["nan", "overflow", "deep", "digits", "mark", "utf-16"],
)
def test_json_that_only_the_strict_reader_refuses_is_scanned(tmp_path: Path, data: bytes) -> None:
    assert ids(scanned(tmp_path / "config.json", data)) == {"code.remote": "odd", "files.unread": "note"}


def test_json_that_is_too_long_is_odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 20)
    result = scanned(tmp_path / "config.json", json.dumps(REMOTE).encode())
    assert ids(result) == {"files.unread": "odd"} and "34 bytes" in result.findings[0].message


def test_json_without_end_is_no_bug(tmp_path: Path) -> None:
    result = scanned(tmp_path / "config.json", b'{"auto_map": ' + b"[" * 100_000)
    assert ids(result) == {"files.unread": "note"}


def test_files_that_are_cut_to_a_limit_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acted_on, "MAX_BYTES", 10)
    monkeypatch.setattr(contents, "MAX_TEXT_BYTES", 10)
    assert ids(scanned(tmp_path / "requirements.txt", b"#" * 11)) == {"files.unread": "odd"}
    assert ids(scanned(tmp_path / "README.md", b"#" * 11)) == {"files.unread": "note"}
    (tag,) = scanned(tmp_path / "x.yaml", b"#" * 11 + b"\na: !!python/name:os.system x").findings[:1]
    assert tag.id == "yaml.python"


def test_compressed_files_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1000)
    noise = os.urandom(4000)
    assert ids(scanned(tmp_path / "a.gz", gzip.compress(noise))) == {"archive.unread": "note"}
    monkeypatch.setattr(archives, "MIN_BOMB", 2000)
    for data in (gzip.compress(bytes(1 << 20)), bz2.compress(bytes(1 << 20))):
        assert ids(scanned(tmp_path / "a.gz", data)) == {"archive.bomb": "danger"}


def test_archives_too_deep_or_before_another(tmp_path: Path) -> None:
    data = b"x"
    for _ in range(7):
        data = zipped("a.zip", data)
    assert ids(scanned(tmp_path / "a.zip", data)) == {"archive.unread": "odd"}
    two = zipped("data.pkl", CALL) + zipped("data.pkl", b"N.")
    assert ids(scanned(tmp_path / "m.pt", two)) == {"archive.damaged": "odd"}


def found(content: Any) -> list[str]:
    return [finding.id for finding in scan_architecture(content, Place("config.json"))]


def test_functions_of_keras_that_fetch_or_save() -> None:
    assert found({"module": "keras.utils", "class_name": "get_file", "config": {}}) == ["keras.foreign"]
    assert found({"module": "keras.utils", "class_name": "function", "config": "get_file"}) == ["keras.foreign"]
    assert found({"module": "keras.activations", "class_name": "function", "config": "gelu"}) == []
    assert found({"module": "keras.layers", "class_name": "Dense", "config": {}}) == []
    assert found([0] * 100_000 + [{"module": "os", "class_name": "system", "config": {}}]) == ["keras.foreign"]


@pytest.mark.parametrize(
    "text", [rb'{"class_name": "\u004cambda"}', rb'{"clas\u0073_name": "Lambda"}', b'{"class_name": "Lambda"}']
)
@pytest.mark.parametrize("block", [0, 512, 2048])
def test_a_lambda_in_escapes_or_behind_a_user_block(tmp_path: Path, text: bytes, block: int) -> None:
    path = tmp_path / "m.h5"
    path.write_bytes(bytes(block) + b"\x89HDF\r\n\x1a\n" + text)
    assert [finding.id for finding in scan_hdf5(path, Place("m.h5"))] == ["keras.lambda"]


def test_halves_of_surrogate_pairs(tmp_path: Path) -> None:
    assert ids(scanned(tmp_path / "config.json", b'{"eos_token": "\\ud83d"}')) == {"text.invisible": "odd"}
    assert ids(scanned(tmp_path / "config.json", b'{"eos_token": "\\ud83d\\ude00"}')) == {}


def test_a_template_that_calls_itself() -> None:
    template = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"
    assert [finding.id for finding in scan_template(template, Place("t"))] == ["template.endless"]


def test_lists_of_gguf(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    def strings(key: str, value: str) -> bytes:
        one = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (1).to_bytes(8, "little")
        return text(key) + one + text(value)

    keys = [strings("tokenizer.chat_template", "{{ ''.__class__ }}"), strings("general.x", "\x1b")]
    keys.append(strings("tokenizer.ggml.tokens", "\x1b"))
    counts = bytes(8) + len(keys).to_bytes(8, "little")
    result = scanned(tmp_path / "m.gguf", b"GGUF" + (3).to_bytes(4, "little") + counts + b"".join(keys))
    places = {(finding.id, finding.where) for finding in result.findings}
    assert places == {("template.internals", "tokenizer.chat_template"), ("text.control", "general.x")}


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("chat_template.jinja", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    result = api.scan(tmp_path)
    assert not result.complete and "File name too long" in " ".join(result.skipped.values())
    notes = json.loads(sarif(result))["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert any("File name too long" in note["message"]["text"] for note in notes)
    os.system(f"rm -rf '{tmp_path}'/d*")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert api.scan(tmp_path).skipped["secret"] == "cannot be listed: Permission denied"
