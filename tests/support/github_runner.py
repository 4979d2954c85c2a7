"""GitHub's runner, as far as a composite action meets it: inputs and outputs of steps, files of commands, workflow
commands in what is printed (actions/runner: ActionCommand.cs, FileCommandManager.cs) and the cache action.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{\s*([\w.-]+)\s*\}\}")
_CONDITION = re.compile(r"inputs\.(\w+) (==|!=) '([^']*)'")


class Log:
    """What the runner makes of a step's output: ``::name`` at the start of a line, ``##[name]`` anywhere in it, nothing
    between ``::stop-commands::TOKEN`` and ``::TOKEN::``.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        self.commands: list[str] = []

    def read(self, output: str) -> None:
        for line in output.splitlines():
            text = line.strip()
            if self.stopped is not None:
                if text == f"::{self.stopped}::":
                    self.stopped = None
            elif text.startswith("::stop-commands::"):
                self.stopped = text.removeprefix("::stop-commands::")
            elif text.startswith("::") or "##[" in line:
                self.commands.append(text)


@dataclass
class Runner:
    """A job on a fresh machine. ``cache``: the repository's, which outlives the job. ``path``: added to PATH."""

    folder: Path
    cache: Path
    environment: Mapping[str, str]
    log: Log = field(default_factory=Log)
    path: list[str] = field(default_factory=list)
    printed: str = ""
    _kept: dict[str, Path] = field(default_factory=dict)

    def use(self, action: Path, **inputs: str) -> tuple[int, dict[str, str]]:
        """Run a composite action; the exit code of its first step that fails, and its outputs."""
        content = yaml.safe_load((action / "action.yml").read_text())
        unknown = inputs.keys() - content["inputs"].keys()
        assert not unknown, unknown
        values = {
            f"inputs.{name}": inputs.get(name, entry.get("default", "")) for name, entry in content["inputs"].items()
        }
        values["github.action_path"] = str(action)
        code = 0
        for step in content["runs"]["steps"]:
            if code or not _holds(step.get("if", ""), values):
                continue
            given = {
                name: _filled(str(text), values) for name, text in (step.get("with") or step.get("env") or {}).items()
            }
            if "uses" in step:
                assert step["uses"].startswith("actions/cache@"), step
                self._restore(Path(given["path"]), given["key"])
                continue
            code, outputs = self._run(step, given)
            values |= {f"steps.{step['id']}.outputs.{name}": text for name, text in outputs.items()}
        outputs = {name: _filled(entry["value"], values) for name, entry in content["outputs"].items()}
        return code, outputs

    def end(self) -> None:
        """The cache action keeps what a job that succeeded has made, under keys that are new."""
        for key, path in self._kept.items():
            if not (self.cache / key).exists() and path.exists():
                shutil.copytree(path, self.cache / key, symlinks=True)

    def _restore(self, path: Path, key: str) -> None:
        if (self.cache / key).exists() and not path.exists():
            shutil.copytree(self.cache / key, path, symlinks=True)
        self._kept[key] = path

    def _run(self, step: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        assert step["shell"] == "bash" and "${{" not in step["run"], "inputs are in the environment only"
        files = {name: self.folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
        for name in ("GITHUB_OUTPUT", "GITHUB_PATH"):
            files[name].write_text("")
        environment = {**self.environment, **variables, **{name: str(path) for name, path in files.items()}}
        environment["PATH"] = ":".join([*self.path[::-1], self.environment["PATH"]])
        environment["RUNNER_TEMP"] = str(self.folder / "temp")
        script = self.folder / "step.sh"
        script.write_text(step["run"])
        process = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        self.printed += process.stdout
        self.log.read(process.stdout)
        self.path += files["GITHUB_PATH"].read_text().splitlines()
        pairs = (line.partition("=") for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        return process.returncode, {name: value for name, _, value in pairs}


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _EXPRESSION.sub(lambda match: values.get(match[1], ""), text)


def _holds(condition: str, values: Mapping[str, str]) -> bool:
    """``inputs.a == 'x' && inputs.b != 'y'``."""
    terms = _CONDITION.findall(condition)
    assert len(terms) == (condition.count("&&") + 1 if condition else 0), condition
    return all((values[f"inputs.{name}"] == text) == (sign == "==") for name, sign, text in terms)


def machine(folder: Path) -> dict[str, str]:
    """The environment of a job: the system's programs, and those in ``folder``/bin before them."""
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
