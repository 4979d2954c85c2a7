"""Every benchmark script runs from start to end, on a tiny shape and without goals for rates."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import first_layers, write_checkpoint
from tests.support.paths import ROOT
from tests.support.paths import TINY as FIXTURE

BENCHMARKS = ROOT / "benchmarks"
FOLDER, MODEL = "FOLDER", "MODEL"
TINY = (FOLDER, "--size", "tiny")
KERNEL_TYPES = "Q8_0,Q4_K"
OF_MODEL = ("--model", MODEL)
SHORT = ("--windows", "1", "--samples", "1", "--length", "32")

RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "budget.py": (
        (*OF_MODEL, "--points", "1", "--windows", "2", "--samples", "2", "--candidates", "q4_k,q6_k"),
        "of 1 within 10 %",
    ),
    "calibration_cost.py": (
        (*TINY, "--layers", "1", "--samples", "1", "--length", "32", "--runs", ""),
        "1 layer of the tiny shape",
    ),
    "end_to_end.py": (
        (*TINY, "--only", "to hf, verified", "--tokens", "8"),
        "to hf, verified",
    ),
    "forward.py": ((*TINY, "--tokens", "8"), "within 5e-5 + 1e-5 of the value: True"),
    "freedoms.py": (
        ("q4_0", *OF_MODEL, "--changes", "channels", "--samples", "1", "--every", "75"),
        "| q4_0 | channels |",
    ),
    "gguf_rates.py": (("--end-to-end", *TINY, "--only-end-to-end", "--values", "5e3"), "times cp plus"),
    "int.py": (("--values", "5e3", "--repeats", "1", "--no-goals"), "int8 back"),
    "int_memory.py": ((*TINY, "--types", "nf4,nf4 --double-quant,gptq-4"), "nf4 --double-quant"),
    "kernels.py": (("--types", KERNEL_TYPES, "--values", "5e3", "--no-goals"), "K-quants and IQ4"),
    "many_outputs.py": (
        (*TINY, "--types", "q4_0,q4_k_s,q4_k_m", "--repeats", "1", "--no-goals"),
        "3 types of 3 MB",
    ),
    "memory.py": ((*TINY, "--only", "flax"), "flax"),
    "quality.py": (("--types", "q4_0,nf4 double", *OF_MODEL, *SHORT), "| nf4 double |"),
    "second_model.py": (
        (
            FOLDER,
            *("--text", f"docs={ROOT}/docs/c*.md", "--steps", "1", *SHORT, "--witness", "llama.cpp"),
            "--folder-types",
            "",
            "--types",
            "q4_0",
        ),
        "| q4_0 |",
    ),
    "remote.py": (("--size", "tiny", "--servers", "hub", "--operations", "convert"), "as from the local folder"),
    "sources.py": (("--megabytes", "4", "--rate", "200", "--repeats", "1", "--no-goals"), "equal to the local one"),
    "summary.py": (
        (*TINY, "--only", "commands", "--repeats", "1", "--plots", FOLDER),
        "| logits of 64 tokens | transformers |",
    ),
    "verification.py": (
        (*TINY, "--tokens", "8", "--repeats", "1", "--only", "quantize,verify"),
        "verify / quantize --no-verify, seconds",
    ),
    "synthesize.py": (("tiny", f"{FOLDER}/tiny.ckpt", "--sparse"), ""),
}
"""Script: its arguments, and a part of what it prints."""
PARTS = {"calibration_peer.py", "llama_cpp_logits.py"}
"""Run by other scripts: the first in an environment of its own."""
NEEDS = {"gguf_rates.py": "xllamacpp", "kernels.py": "xllamacpp", "memory.py": "tensorstore",
         "second_model.py": "xllamacpp", "summary.py": "bitsandbytes"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's first layer, with its tokenizer and held-out tokens."""
    folder = tmp_path_factory.mktemp("model")
    with registry.open_checkpoint(FIXTURE / "model.ckpt") as source:
        write_checkpoint(first_layers(source, 1), folder / "model.ckpt")
    for name in ("tokenizer.model", "heldout.npy"):
        shutil.copy(FIXTURE / name, folder)
    return folder


def run(script: str, arguments: tuple[str, ...], folder: Path, model: Path = FIXTURE) -> str:
    """Run a script; returns what it printed."""
    words = [argument.replace(FOLDER, str(folder)).replace(MODEL, str(model)) for argument in arguments]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / script, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_script_has_a_run() -> None:
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(RUNS) | PARTS


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_script_runs(script: str, tmp_path: Path, model: Path) -> None:
    if script in NEEDS and importlib.util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"{NEEDS[script]} is not installed")
    arguments, expected = RUNS[script]
    assert expected in run(script, arguments, tmp_path, model)


@pytest.mark.slow
def test_gguf_rates_runs_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    output = run("gguf_rates.py", ("--types", KERNEL_TYPES, "--values", "5e3", "--no-goals"), tmp_path)
    assert "K-quants and IQ4" in output


@pytest.mark.slow
def test_quality_of_calibrated_types(tmp_path: Path, model: Path) -> None:
    assert "| fp4 |" in run("quality.py", ("--calibrated", "fp4", *OF_MODEL, *SHORT), tmp_path, model)


@pytest.mark.slow
def test_sparse_sources(tmp_path: Path) -> None:
    output = run("forward.py", (*TINY, "--sparse", "--only", "gemma2tool", "--tokens", "8"), tmp_path)
    assert "GiB" in output


@pytest.mark.slow
def test_types_are_judged_on_each_kind_of_text(tmp_path: Path, model: Path) -> None:
    for path in model.iterdir():
        shutil.copy(path, tmp_path)
    shutil.copy(FIXTURE / "heldout.npy", tmp_path / "heldout-code.npy")
    (tmp_path / "calibration-code.txt").write_text((FIXTURE / "heldout.txt").read_text()[:20_000])
    output = run("quality.py", ("--model", str(tmp_path), "--cross", "q4_0,q5_0", *SHORT), tmp_path)
    assert "| q4_0 | code |" in output and "| q5_0 | code |" in output
