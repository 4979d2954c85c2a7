"""The command line in this process, as the tests run it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app

runner = CliRunner()


def run(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_refused(result: Result, code: int, *words: str) -> None:
    """The documented exit code, and on standard error one line of error and at most one of hint, naming the words."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error", "hint"))]
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error"), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in " ".join(lines), result.stderr
