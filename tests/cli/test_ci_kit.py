"""The action and the pre-commit hook: arguments are passed unchanged, never evaluated; the exit code is passed on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from gemma2tool import api
from gemma2tool.cli import precommit
from gemma2tool.cli.main import app
from tests.support.github_runner import Log
from tests.support.paths import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def run_action(
    tmp_path: Path, arguments: str, *, command: str = "verify", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the action's script with a fake gemma2tool, which records its arguments and exits with 1."""
    fake = tmp_path / "bin" / "gemma2tool"
    fake.parent.mkdir(exist_ok=True)
    record = str(tmp_path / "called")
    fake.write_text(
        f"#!{sys.executable}\nimport sys, json\njson.dump(sys.argv[1:], open({record!r}, 'w'))\nsys.exit(1)\n"
    )
    fake.chmod(0o755)
    environment = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "G2T_COMMAND": command,
        "G2T_ARGUMENTS": arguments,
        "G2T_HOME": str(ROOT),
        "G2T_INSTALL": "no",
        **variables,
    }
    script = ["bash", str(ROOT / "scripts" / "action.sh"), "run"]
    return subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )


def recorded_arguments(tmp_path: Path) -> list[str]:
    arguments: list[str] = json.loads((tmp_path / "called").read_text())
    return arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a b.gguf", "$(touch owned)", "`touch owned`", "x; touch owned", "*", "'\"", "-n"])
def test_an_argument_is_a_line_and_is_not_evaluated(tmp_path: Path, name: str) -> None:
    process = run_action(tmp_path, f"{name}\n--reference\n\nother file\r\n")
    assert process.returncode == 1, process.stderr
    assert recorded_arguments(tmp_path) == ["verify", name, "--reference", "other file"]
    assert not (tmp_path / "owned").exists()


def test_reports_and_the_exit_code_are_passed_on(tmp_path: Path) -> None:
    output = tmp_path / "output"
    variables = {
        "GITHUB_STEP_SUMMARY": "sum mary.md",
        "GITHUB_OUTPUT": str(output),
        "G2T_HTML": "a.html",
        "G2T_JUNIT": "j.xml",
    }
    process = run_action(tmp_path, "m.gguf", command="convert", **variables)
    assert recorded_arguments(tmp_path) == [
        "convert",
        "m.gguf",
        "--summary",
        "sum mary.md",
        "--html",
        "a.html",
        "--junit",
        "j.xml",
    ]
    assert process.returncode == 1 and output.read_text() == "exit-code=1\n"


def test_what_the_tool_prints_is_no_command(tmp_path: Path) -> None:
    """Names and tokens of files reach the log; the annotations, which the tool escapes, follow behind the fence."""
    fake = tmp_path / "bin" / "gemma2tool"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "print('bos ##[add-mask]PASSED'); print('::set-output name=a::b'); sys.stderr.write('::stop-commands::x\\n')\n"
        "print('::x::'); sys.stdout.write('##[error]no line break')\n"
        "open(os.environ['GEMMA2TOOL_ANNOTATIONS'], 'w').write('::error file=m.gguf::bad\\n')\n"
        "sys.exit(3)\n"
    )
    fake.chmod(0o755)
    environment = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "G2T_COMMAND": "verify",
        "G2T_ARGUMENTS": "m.gguf",
        "G2T_HOME": str(ROOT),
        "G2T_INSTALL": "no",
    }
    outputs = []
    for _ in range(2):
        process = subprocess.run(
            ["bash", str(ROOT / "scripts" / "action.sh"), "run"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert process.returncode == 3 and process.stderr == ""
        log = Log()
        log.read(process.stdout)
        assert log.stopped is None and log.commands == ["::error file=m.gguf::bad"]
        outputs.append(process.stdout.splitlines()[0])
    assert outputs[0] != outputs[1] and len(outputs[0]) > 60


def test_other_commands_are_refused(tmp_path: Path) -> None:
    process = run_action(tmp_path, "m.gguf", command="generate")
    assert process.returncode == 2 and not (tmp_path / "called").exists()


def test_inputs_reach_the_script_in_the_environment_only() -> None:
    steps = ACTION["runs"]["steps"]
    assert not any("${{" in step.get("run", "") for step in steps)
    used = {text for step in steps for text in (*step.get("env", {}).values(), step.get("if", ""))}
    assert all(any(f"inputs.{name} " in text for text in used) for name in ACTION["inputs"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yml")), ids=lambda path: path.stem)
def test_examples_name_inputs_and_options_that_exist(path: Path) -> None:
    steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
    uses = [step["with"] for step in steps if step.get("uses", "").startswith("gemma2tool/")]
    assert uses and all(set(inputs) <= set(ACTION["inputs"]) for inputs in uses)
    program = get_command(app)
    context = program.context_class(program, info_name="gemma2tool")
    for inputs in uses:
        name, command, arguments = program.resolve_command(context, [inputs["command"], *inputs["arguments"].split()])
        command.make_context(name, arguments, parent=context)


def test_the_document_goes_to_a_file_and_messages_to_the_log(tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "gemma2tool"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '{}'\necho \"$*\" >&2\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "G2T_COMMAND": "verify", "G2T_ARGUMENTS": "m.gguf"}
    environment |= {"G2T_HOME": str(ROOT), "G2T_INSTALL": "no", "G2T_JSON": "re port.json"}
    script = ["bash", str(ROOT / "scripts" / "action.sh"), "run"]
    process = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "re port.json").read_text() == "{}\n"
    assert "verify m.gguf --json" in process.stdout and "{}" not in process.stdout


@pytest.mark.slow
def test_the_action_converts_and_verifies(tmp_path: Path, fixture_dir: Path) -> None:
    summary = tmp_path / "summary.md"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "G2T_COMMAND": "convert",
        "G2T_ARGUMENTS": f"{fixture_dir / 'model.ckpt'}\n{tmp_path / 'out.gguf'}",
        "G2T_HOME": str(ROOT),
        "G2T_INSTALL": "no",
        "G2T_HTML": str(tmp_path / "report.html"),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    script = ["bash", str(ROOT / "scripts" / "action.sh"), "run"]
    process = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert summary.read_text().startswith("### ✅ verified: ")
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_hook_verifies_checkpoints_that_have_a_receipt(
    tmp_path: Path, fixture_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["convert", str(fixture_dir / "model.ckpt"), "weights/hf"], ["convert", "weights/hf", "b.gguf"]):
        Path("weights").mkdir(exist_ok=True)
        assert app([*arguments, "-q"], standalone_mode=False) in (0, None)
    Path("notes.txt").write_text("not a checkpoint")
    changed = ["notes.txt", "weights/hf/model.safetensors", "weights/hf/config.json", "b.gguf.receipt.json"]
    assert api.outputs_with_receipts(map(Path, changed)) == [Path("weights/hf"), Path("b.gguf")]
    assert precommit.main(["notes.txt"]) == 0
    capfd.readouterr()
    assert precommit.main(changed) == 0
    assert capfd.readouterr().out.count("PASSED") == 2

    with open("b.gguf", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert precommit.main(["b.gguf"]) == 1
    assert "FAILED" in capfd.readouterr().out


@pytest.mark.slow
def test_the_entry_of_the_hook_runs() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    process = subprocess.run(
        [sys.executable, *hook["entry"].split()[1:], "README.md"], cwd=ROOT, check=False, timeout=60
    )
    assert process.returncode == 0
