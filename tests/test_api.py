"""The Python face: what the command line does, typed; light to import; nothing of the program below it leaks into the
commands.
"""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemma2tool
from gemma2tool import api
from gemma2tool.errors import InputRefused, UsageError
from tests.support.paths import ROOT, TINY

CLI = ROOT / "gemma2tool" / "cli"


@pytest.mark.slow
def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    result = gemma2tool.quantize(str(TINY / "model.ckpt"), tmp_path / "x.gguf", type="Q4_K_M")
    assert result.written and result.verification is not None and result.verification.passed
    assert result.receipt == tmp_path / "x.gguf.receipt.json" and result.format == "gguf"
    assert gemma2tool.verify(tmp_path / "x.gguf").passed


@pytest.mark.slow
def test_convert_open_hash_and_diff(tmp_path: Path) -> None:
    result = gemma2tool.convert(TINY / "model.ckpt", tmp_path / "hf", verify=False)
    assert result.verification is None and result.receipt is None
    with gemma2tool.open(tmp_path / "hf") as checkpoint:
        assert gemma2tool.hash(checkpoint).model == gemma2tool.hash(TINY / "model.ckpt").model
        again = gemma2tool.convert(checkpoint, tmp_path / "again.gguf", verify=False)
        assert again.nbytes == (tmp_path / "again.gguf").stat().st_size
    assert gemma2tool.diff(TINY / "model.ckpt", tmp_path / "hf", with_logits=False).same


@pytest.mark.slow
def test_a_verification_that_fails_is_a_result(tmp_path: Path) -> None:
    result = gemma2tool.quantize(TINY / "model.ckpt", tmp_path / "x.gguf", type="q2_k", gates={"kl": 1e-9})
    assert not result.written and not (tmp_path / "x.gguf").exists()
    assert result.verification is not None and not result.verification.passed


@pytest.mark.slow
def test_several_outputs_in_one_pass(tmp_path: Path) -> None:
    options = gemma2tool.WriteOptions(gguf=gemma2tool.GGUFOptions(pure=True))
    request = gemma2tool.ConversionRequest(
        source=TINY / "model.ckpt", destination=tmp_path / "many", types=("q8_0", "q4_0"), options=options, checks=None
    )
    sizes = [plan.nbytes for plan in gemma2tool.plan(request)]
    assert not (tmp_path / "many").exists()
    results = gemma2tool.run(request)
    assert [result.nbytes for result in results] == sizes
    assert [result.destination.name for result in results] == ["many-q8_0.gguf", "many-q4_0.gguf"]


def test_options_are_refused_where_they_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        gemma2tool.quantize(
            TINY / "model.ckpt", tmp_path / "x", type="nf4", gguf=gemma2tool.GGUFOptions(pure=True), verify=False
        )
    assert refused.value.id == "option.ignored" and "--pure" in refused.value.message
    with pytest.raises(InputRefused):
        gemma2tool.open(tmp_path / "nowhere")


@pytest.mark.slow
def test_logits_generation_and_inspection(tmp_path: Path) -> None:
    ids = np.array([[2, 5, 7]])
    logits = gemma2tool.logits(TINY / "model.ckpt", ids)
    assert logits.shape[:2] == (1, 3) and logits.dtype == np.float32
    np.save(tmp_path / "ids.npy", ids)
    written = gemma2tool.logits(TINY / "model.ckpt", tmp_path / "ids.npy", out=tmp_path / "logits.npy")
    assert np.array_equal(logits, written)
    pieces: list[str] = []
    options = gemma2tool.GenerationOptions(max_new_tokens=4, raw=True)
    generation = gemma2tool.generate(TINY, "The", options=options, on_text=pieces.append)
    assert "".join(pieces) == generation.text and len(generation.tokens) <= 4
    assert gemma2tool.inspect(TINY).format == "gemma-pytorch"


@pytest.mark.slow
def test_progress_comes_as_events(tmp_path: Path) -> None:
    events: list[gemma2tool.ProgressEvent] = []
    gemma2tool.convert(TINY / "model.ckpt", tmp_path / "x", progress=events.append)
    steps = {event.step for event in events}
    assert {"x", "tensors", "forward passes"} <= steps
    for step in steps:
        of_step = [event for event in events if event.step == step]
        assert [event.done for event in of_step] == sorted(event.done for event in of_step)
        assert of_step[-1].ended and of_step[-1].done > 0.99 * of_step[-1].total


@pytest.mark.slow
@pytest.mark.parametrize("first", ["gemma2tool.verify.gates", "gemma2tool.formats.registry", "gemma2tool.api"])
def test_functions_and_packages_of_one_name_live_together(first: str) -> None:
    code = f"import {first}\nimport gemma2tool\nassert callable(gemma2tool.verify) and callable(gemma2tool.formats)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_names_are_listed_and_unknown_ones_are_not() -> None:
    assert set(api.__all__) <= set(dir(gemma2tool))
    assert gemma2tool.convert is api.convert
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gemma2tool.nothing


def test_help_is_short_and_names_functions() -> None:
    """``help(gemma2tool)`` is read in a terminal; everything else is in ``help(gemma2tool.api)``."""
    lines = pydoc.plain(pydoc.render_doc(gemma2tool)).splitlines()
    assert len(lines) < 150
    named = re.findall(r"^(?:Write|Compare|Compute|Look|Other): +(.*)", gemma2tool.__doc__ or "", re.M)
    functions = set(re.findall(r"\w+", " ".join(named).replace("returns what they would write", "")))
    assert functions <= set(api.__all__) and len(functions) > 20


@pytest.mark.parametrize("name", api.__all__)
def test_everything_public_is_documented(name: str) -> None:
    assert (getattr(api, name).__doc__ or "").strip()


def test_every_command_has_its_function() -> None:
    import typer

    from gemma2tool.cli.main import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {name for name, command in commands.items() if not command.hidden} <= set(api.__all__)


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_commands_call_nothing_below_the_face(path: Path) -> None:
    """The command line imports the face, errors, options and the rendering of reports, and nothing
    else of the package.
    """
    allowed = ("gemma2tool.api", "gemma2tool.errors", "gemma2tool.formats.option", "gemma2tool.verify.reports")
    small = tuple(f"gemma2tool.{name}" for name in ("storage.quoting", "storage.units", "model.progress"))
    small += ("gemma2tool.publish.defaults",)
    checking = {
        child
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    names = {ast.unparse(node) for node in checking if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("gemma2tool"):
            continue
        if ast.unparse(node) in names:  # for annotations only
            continue
        module = node.module or ""
        imported = [module] if module != "gemma2tool" else [f"gemma2tool.{alias.name}" for alias in node.names]
        for name in imported:
            is_own = name.startswith("gemma2tool.cli") or name == "gemma2tool.version"
            assert is_own or name.startswith((*allowed, *small)), f"{path.name} imports {name}"


@pytest.mark.slow
def test_the_api_page_is_what_the_docstrings_give() -> None:
    done = subprocess.run([sys.executable, "scripts/api_docs.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python scripts/api_docs.py"
