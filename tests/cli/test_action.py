"""The action on a runner: what is installed, once, and for whom; no package is downloaded here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.github_runner import Runner, machine
from tests.support.paths import ROOT

FAKE_PYTHON = f"""#!{sys.executable} -IS
import os, pathlib, sys
words = sys.argv[1:]
if words[:1] == ["-"]:
    os.execv(sys.executable, [sys.executable, "-IS", *words])
if words[:2] == ["-m", "venv"]:
    bin = pathlib.Path(words[2], "bin")
    bin.mkdir(parents=True)
    bin.joinpath("python").write_text(pathlib.Path(__file__).read_text())
    bin.joinpath("python").chmod(0o755)
elif words[:2] == ["-m", "pip"]:
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(" ".join(words[2:]) + "\\n")
    if os.environ.get("OFFLINE") and "torch" not in words:
        sys.exit("no connection")
    tool = pathlib.Path(sys.argv[0]).with_name("gemma2tool")
    tool.write_text("#!/bin/sh\\necho \\"installed: $*\\"\\n")
    tool.chmod(0o755)
"""
ONE_FILE = {"arguments": "m.gguf"}


@pytest.fixture
def action(tmp_path: Path) -> Path:
    """The files that an installation is made from, in small."""
    folder = tmp_path / "action"
    for name in ("action.yml", "scripts/action.sh", "pyproject.toml", "CMakeLists.txt", "gemma2tool/version.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


class Job(Runner):
    def __init__(self, tmp_path: Path, name: str, **variables: str) -> None:
        folder, cache = tmp_path / name, tmp_path / "cache"
        for place in (folder / "bin", folder / "temp", cache):
            place.mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").write_text(FAKE_PYTHON)
        (folder / "bin" / "python").chmod(0o755)
        system = variables.pop("system", "Linux")
        (folder / "bin" / "uname").write_text(f"#!/bin/sh\necho {system}\n")
        (folder / "bin" / "uname").chmod(0o755)
        super().__init__(folder, cache, {**machine(folder), "CALLS": str(folder / "calls"), **variables})

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.slow
def test_torch_is_the_one_for_the_processor(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job")
    assert job.use(action, **ONE_FILE) == (0, {"exit-code": "0"}), job.printed
    torch, tool = job.calls
    assert "whl/cpu" in torch and torch.endswith(" torch")
    assert tool.endswith(f" {action}") and "whl" not in tool
    assert "installed: verify m.gguf" in job.printed


@pytest.mark.slow
def test_elsewhere_than_on_linux_there_is_one_torch(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job", system="Darwin")
    assert job.use(action, **ONE_FILE)[0] == 0
    assert len(job.calls) == 1


@pytest.mark.slow
def test_options_of_pip_decide_themselves(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job")
    assert job.use(action, install="--find-links\na folder", **ONE_FILE)[0] == 0
    assert len(job.calls) == 1 and f"--find-links a folder {action}" in job.calls[0]


@pytest.mark.slow
def test_it_is_installed_once_in_a_job_and_found_by_later_steps(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job")
    for install in ("", "", "no"):
        assert job.use(action, install=install, **ONE_FILE)[0] == 0, job.printed
    assert len(job.calls) == 2
    assert job.path and not (Path(job.path[0]) / "python").exists(), "later steps keep their Python"


@pytest.mark.slow
def test_a_later_job_takes_it_from_the_cache_while_it_is_the_same(tmp_path: Path, action: Path) -> None:
    first = Job(tmp_path, "job")
    assert first.use(action, **ONE_FILE)[0] == 0
    first.end()
    shutil.rmtree(first.folder)  # the next machine has its files in the same places
    second = Job(tmp_path, "job")
    assert second.use(action, **ONE_FILE)[0] == 0 and second.calls == []
    (action / "gemma2tool" / "version.py").write_text("__version__ = '9'\n")
    assert second.use(action, **ONE_FILE)[0] == 0 and len(second.calls) == 2
    assert second.use(action, cache="no", **ONE_FILE)[0] == 0
    second.end()
    assert len(list(second.cache.iterdir())) == 2


@pytest.mark.slow
def test_an_installation_that_fails_is_no_verdict_and_is_not_kept(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job", OFFLINE="1")
    assert job.use(action, **ONE_FILE) == (4, {"exit-code": "4"})
    assert "could not be installed" in job.printed and "stop-commands" not in job.printed
    job.environment = {**job.environment, "OFFLINE": ""}
    assert job.use(action, **ONE_FILE)[0] == 0 and len(job.calls) == 4


def test_a_command_that_is_none(tmp_path: Path, action: Path) -> None:
    job = Job(tmp_path, "job")
    assert job.use(action, command="clean", **ONE_FILE) == (2, {"exit-code": "2"})
