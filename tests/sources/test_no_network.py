"""The network is touched only where the arguments name it, and then only the server that they name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from tests.sources.test_archive import pack
from tests.support.audit import watched
from tests.support.servers import FileServer, contents, serving

LIBRARIES = ("huggingface_hub", "httpx2", "fsspec", "s3fs", "gcsfs", "aiohttp")

COMMANDS = (
    ("inspect", "{src}"),
    ("convert", "{src}", "{out}/m.gguf", "--no-verify"),
    ("quantize", "{src}", "{out}/q.gguf", "--type", "q8_0", "--no-verify"),
    ("hash", "{src}"),
    ("diff", "{src}", "{src}", "--no-logits"),
    ("verify", "{src}", "--reference", "{src}", "--gate", "kl=1"),
    ("check", "{src}"),
)


def run(*words: object) -> int:
    return CliRunner().invoke(app, [str(word) for word in words]).exit_code


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_local_sources(command: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    with watched() as seen:
        code = run(*(word.format(src=model, out=tmp_path) for word in command))
    assert code in (0, 1) and not seen.connections and not seen.hosts


@pytest.mark.slow
def test_paths_that_look_like_names_on_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "org/name")
    pack(model, Path("org/name.tar"))
    with watched() as seen:
        assert run("inspect", "org/name") == 0
        assert run("inspect", "org/name.tar") == 0
        for word in ("org/other", "none/name.gguf", "none/name.tar.gz", "./none/name", "none/a/b", "none", "/none/a"):
            assert run("inspect", word) == 3
        assert run("convert", "org/name", "none/out", "--no-verify") == 2
    assert not seen.connections and not seen.hosts


@pytest.mark.slow
def test_no_library_of_a_source_is_imported_for_local_files(model: Path) -> None:
    code = (
        f"import sys; from gemma2tool import api; api.inspect({str(model)!r});"
        f"print([name for name in {LIBRARIES} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_address_connects_to_its_server_alone(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("httpx2")
    with serving(FileServer(contents(model, "/tiny/"))) as server, watched() as seen:
        for command in COMMANDS[:3]:
            assert run(*(word.format(src=f"{server.url}/tiny/", out=tmp_path) for word in command)) == 0
    assert set(seen.connections) == {server.server.server_port}
    assert seen.hosts <= {"127.0.0.1"}
