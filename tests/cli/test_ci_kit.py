"""What a workflow is given: the action passes arguments as they are, never evaluates them, and hands on the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gemma2tool import api
from gemma2tool.cli import precommit
from gemma2tool.cli.main import app
from tests.support.paths import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def run_action(
    tmp_path: Path, arguments: str, *, command: str = "verify", **more: str
) -> subprocess.CompletedProcess[str]:
    """The action's script with a gemma2tool that writes down how it was called and exits with 1."""
    fake = tmp_path / "bin" / "gemma2tool"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        f"#!{sys.executable}\nimport sys, json\njson.dump(sys.argv[1:], open({str(tmp_path / 'called')!r}, 'w'))\nsys.exit(1)\n"
    )
    fake.chmod(0o755)
    environment = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "G2T_COMMAND": command,
        "G2T_ARGUMENTS": arguments,
        "G2T_HOME": str(ROOT),
        "G2T_INSTALL": "no",
        **more,
    }
    script = ["bash", str(ROOT / "scripts" / "action.sh")]
    return subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )


def called(tmp_path: Path) -> list[str]:
    return json.loads((tmp_path / "called").read_text())


@pytest.mark.parametrize("name", ["a b.gguf", "$(touch owned)", "`touch owned`", "x; touch owned", "*", "'\"", "-n"])
def test_an_argument_is_a_line_and_stays_text(tmp_path: Path, name: str) -> None:
    done = run_action(tmp_path, f"{name}\n--reference\n\nother file\r\n")
    assert done.returncode == 1, done.stderr
    assert called(tmp_path) == ["verify", name, "--reference", "other file"]
    assert not (tmp_path / "owned").exists()


def test_reports_and_the_exit_code_are_handed_on(tmp_path: Path) -> None:
    output = tmp_path / "output"
    more = {
        "GITHUB_STEP_SUMMARY": "sum mary.md",
        "GITHUB_OUTPUT": str(output),
        "G2T_HTML": "a.html",
        "G2T_JUNIT": "j.xml",
    }
    done = run_action(tmp_path, "m.gguf", command="convert", **more)
    assert called(tmp_path) == ["convert", "m.gguf", "--summary", "sum mary.md", "--html", "a.html", "--junit", "j.xml"]
    assert done.returncode == 1 and output.read_text() == "exit-code=1\n"


def test_only_these_commands(tmp_path: Path) -> None:
    done = run_action(tmp_path, "m.gguf", command="generate")
    assert done.returncode == 2 and not (tmp_path / "called").exists()


def test_no_input_is_pasted_into_a_script() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"]
    environment = ACTION["runs"]["steps"][0]["env"]
    assert {f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]} <= set(environment.values())


def test_the_example_names_inputs_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "workflow.yml").read_text())
    uses = [step for step in workflow["jobs"]["verify"]["steps"] if step.get("uses", "").startswith("gemma2tool/")]
    assert uses and all(set(step["with"]) <= set(ACTION["inputs"]) for step in uses)


def test_the_action_verifies_for_real(tmp_path: Path, fixture_dir: Path) -> None:
    summary = tmp_path / "summary.md"
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "G2T_COMMAND": "convert",
        "G2T_ARGUMENTS": f"{fixture_dir / 'model.ckpt'}\n{tmp_path / 'out.gguf'}",
        "G2T_HOME": str(ROOT),
        "G2T_INSTALL": "no",
        "G2T_HTML": str(tmp_path / "report.html"),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    script = ["bash", str(ROOT / "scripts" / "action.sh")]
    done = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert summary.read_text().startswith("### ✅ verified: ")
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_hook_verifies_what_has_a_receipt(tmp_path: Path, fixture_dir: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["convert", str(fixture_dir / "model.ckpt"), "weights/hf"], ["convert", "weights/hf", "b.gguf"]):
        Path("weights").mkdir(exist_ok=True)
        assert app([*arguments, "-q"], standalone_mode=False) in (0, None)
    Path("notes.txt").write_text("nothing of ours")
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


def test_the_hook_says_how_it_is_run() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    done = subprocess.run([sys.executable, *hook["entry"].split()[1:], "README.md"], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
