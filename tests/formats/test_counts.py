"""Counts are checked before anything is done for each item."""

from __future__ import annotations

import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.containers.torch_zip import pickle_index
from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.storage.quoting import quoted
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import write_as
from tests.support.hostile.refusal import assert_refused

STEPS = {"tuples in tuples": b")" + b"\x85" * 2_000_000, "one object remembered": b"}" + b"q\0" * 2_000_000}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_pickle_without_tensors_takes_few_steps(name: str) -> None:
    before = pickle_index.FREE_STEPS
    assert_refused(lambda: pickle_index.interpret(b"\x80\x02" + STEPS[name] + b".", "here"), "pickle.too-large")
    interpreter = pickle_index._Interpreter(b"\x80\x02" + STEPS[name] + b".", "here")
    assert_refused(interpreter.run, "pickle.too-large")
    assert interpreter.at <= 2 * before + 4


@pytest.mark.slow
def test_a_key_that_nests_deeply_is_refused_in_a_line() -> None:
    data = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."
    assert_refused(lambda: pickle_index.interpret(data, "here"), "pickle.key")
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "a list nested too deeply to be shown"


@pytest.mark.slow
def test_as_many_tensors_as_are_accepted(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "many.pt"
    base = torch.zeros(4)
    state = {f"model.layers.{n}.weight": base[n % 4 :][None] for n in range(torch_zip.MAX_TENSORS)}
    torch.save({"state": state, "losses": [0.5] * 50_000}, path)
    assert len(torch_zip.read_index(path)["state"]) == torch_zip.MAX_TENSORS


@pytest.mark.slow
def test_an_index_of_too_many_names(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for count, id in ((300_000, "json.too-many-values"), (container_tensors.MAX_INDEXED + 1, "index.too-many-tensors")):
        index.write_text(json.dumps({"weight_map": {f"t{n}": f"model-{n}.safetensors" for n in range(count)}}))
        began = time.process_time()
        assert_refused(lambda: container_tensors.indexed_files(index), id)
        assert time.process_time() - began < 1


@pytest.mark.slow
def test_dtype_offers_what_the_format_writes(tmp_path: Path) -> None:
    source = write_as("hf", random_checkpoint(np.dtype(ml_dtypes.bfloat16)), tmp_path / "hf")

    def convert(name: str, dtype: str) -> str:
        result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / name), "--dtype", dtype])
        assert result.exit_code == 2 and not (tmp_path / name).exists()
        return " ".join(result.output.split())

    assert "f32, bf16, auto;" in convert("o.sbs", "sfp") and "quantize --type sfp" in convert("o.sbs", "sfp")
    assert "f16" not in convert("o.sbs", "f16").replace("bf16", "").replace("--dtype f16", "")
    assert "f32, f16, bf16, auto" in convert("o", "q8_0")
