"""A short fuzzing campaign: every reader on its corpus, which includes past findings, and on mutations of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import all_targets
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

NEEDS = {"zarr": "zstandard", "hub-answer": "huggingface_hub", "http-answer": "httpx2"}
EACH = 400


def _campaign(state: Path, *arguments: str) -> tuple[dict, str]:
    script = ROOT / "tests" / "campaigns" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, str(script), "--state", str(state), *arguments], check=False, capture_output=True, text=True,
        timeout=300,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((state / "state.json").read_text()), done.stdout


def _readers() -> list[str]:
    names = []
    for name in all_targets():
        if name in NEEDS:
            try:
                __import__(NEEDS[name])
            except ImportError:
                continue
        names.append(name)
    return names


def test_every_reader_survives(tmp_path: Path) -> None:
    names = _readers()
    state, output = _campaign(tmp_path, "--turn", str(EACH), "--slice", "60", "--readers", *names)
    assert "did not start" not in output
    assert sorted(state) == sorted(names)
    assert [(name, row["findings"]) for name, row in state.items() if row["findings"]] == []
    assert {name: row["executions"] for name, row in state.items()} == dict.fromkeys(names, EACH)


def test_a_campaign_continues_where_it_stopped(tmp_path: Path) -> None:
    first, _ = _campaign(tmp_path, "--turn", "200", "--readers", "json")
    again, output = _campaign(tmp_path, "--turn", "300", "--readers", "json", "journal")
    assert first["json"]["executions"] == 200 and again["json"]["executions"] == 500
    assert again["json"]["slices"] == 2 and again["journal"]["executions"] == 300
    assert "| all | 800 |" in output


@pytest.mark.parametrize(
    ("name", "run", "kind"),
    [
        ("raises", "raise KeyError('x')", "KeyError: 'x'"),
        ("hangs", "while True: pass", "hang"),
        ("fills memory", "self.kept = [bytes(1 << 20) for _ in range(1 << 12)]", "MemoryError"),
        ("crashes", "import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("runs a program", "import os; os.system('true')", "ForbiddenEvent: os.system"),
        ("writes a file", "open('/tmp/x', 'w')", "ForbiddenEvent: open"),
    ],
)
def test_what_counts_as_a_finding(tmp_path: Path, name: str, run: str, kind: str) -> None:
    """A reader that does it is caught, and the input that made it do so is kept."""
    code = f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(ROOT)!r}]
        from tests.fuzz import worker
        from tests.fuzz.base import Target

        class Faulty(Target):
            name = "faulty"
            def seeds(self): return [b"seed"]
            def run(self, data):
                if data != b"seed":
                    {run}

        shared, log = worker.Shared(), Path({str(tmp_path / "log")!r})
        pid = worker.spawn(Faulty(), shared, 1, 20, 1000, None, log)
        count, finding = worker.watch(pid, shared, log, [])
        assert count >= 1 and finding.data != b"seed", (count, finding)
        print(finding.kind)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(kind), done.stdout
