"""Budgets of quantized folders: within the size, as good as predicted, and loaded by mlx-lm and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool import api
from gemma2tool.formats import registry
from gemma2tool.formats.packings.selection import fused_weights
from gemma2tool.pipeline.sensitivity.table import Entry, SensitivityTable, Sum, Text, write_table
from gemma2tool.reference.streaming import logits
from tests.support.commands import assert_refused, run
from tests.support.logits import mean_kl

pytestmark = pytest.mark.slow

CANDIDATES = ("mlx-3", "mlx-6", "nf4")


@pytest.fixture(scope="module")
def source(fixture_dir: Path) -> Path:
    return fixture_dir / "model.ckpt"


@pytest.fixture(scope="module")
def table(source: Path, fixture_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the types of two kinds of folders."""
    path = tmp_path_factory.mktemp("folders") / "table.json"
    how = api.SensitivityOptions(rounding="nearest", types=CANDIDATES, windows=4, length=64, measure="none", threads=1)
    api.sensitivity(source, path, calibration=fixture_dir / "heldout.txt", options=how)
    return path


def quantize(source: Path, out: Path, table: Path, **budget: object) -> api.BudgetOutcome:
    result = api.quantize(
        source,
        out,
        to="mlx" if "mlx" in out.name else "hf",
        budget=api.Budget(sensitivity=table, **budget),  # type: ignore[arg-type]
        run=api.RunOptions(readers=False),
    )
    assert result.written and result.budget is not None
    choice = result.budget.choice
    assert choice.nbytes == sum(path.stat().st_size for path in out.iterdir())
    assert choice.limit is None or 0.99 * choice.limit < choice.nbytes <= choice.limit
    with registry.open_checkpoint(out) as checkpoint:
        assert {name: checkpoint.tensors[name].stored for name in choice.types} == dict(choice.types)
    return result.budget


def test_mlx_has_a_type_for_each_matrix(source: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    outcome = quantize(source, out, table, target_size=3_500_000)
    types = outcome.choice.types
    assert set(types.values()) == {"mlx-3", "mlx-6"} and outcome.choice.proven and outcome.holds
    config = json.loads((out / "config.json").read_text())["quantization"]
    assert {config[name.removesuffix(".weight")]["bits"] for name in types} == {3, 6}
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    ids = np.load(source.parent / "heldout.npy")[:1, :60].astype(np.int64)  # within the window, which mlx-lm lacks
    with mx.stream(mx.cpu), registry.open_checkpoint(out) as checkpoint:
        model, _ = mlx_lm.utils.load_model(out)
        model.set_dtype(mx.float32)
        engine = np.array(model(mx.array(ids)).astype(mx.float32))
        assert mean_kl(logits(checkpoint, ids), engine) < 1e-4


@pytest.mark.peer
def test_bitsandbytes_skips_what_is_not_quantized(source: Path, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "bnb"
    outcome = quantize(source, out, table, target_size=8_000_000, candidates=("nf4",))
    types = outcome.choice.types
    assert set(types.values()) == {"nf4", "bf16"} and outcome.holds
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {f"{name}.weight" for name in skipped} - {"lm_head.weight"} == {n for n, t in types.items() if t == "bf16"}
    for unit in fused_weights(list(types)):
        assert len({types[name] for name in unit}) == 1
    assert_transformers_computes_the_same(source, out, 2e-3)


@pytest.mark.peer
def test_compressed_tensors_has_a_group_for_each_type(source: Path, fixture_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    how = api.SensitivityOptions(
        rounding="nearest", types=("w4a16", "w8a16"), windows=4, length=64, measure="none", threads=1
    )
    table, out = tmp_path / "table.json", tmp_path / "compressed"
    api.sensitivity(source, table, calibration=fixture_dir / "heldout.txt", options=how)
    outcome = quantize(source, out, table, target_bpw=7)
    types = outcome.choice.types
    assert set(types.values()) == {"w4a16", "w8a16"} and outcome.choice.proven and outcome.holds
    for unit in fused_weights(list(types)):
        assert len({types[name] for name in unit}) == 1
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]
    assert run("verify", out, "--reference", source, "--no-readers").exit_code == 0
    assert_transformers_computes_the_same(source, out, 1e-5)


def assert_transformers_computes_the_same(source: Path, folder: Path, limit: float) -> None:
    """transformers loads all of a folder; its KL to the built-in forward pass is below ``limit``."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = np.load(source.parent / "heldout.npy")[:1, :96].astype(np.int64)
    with torch.no_grad(), registry.open_checkpoint(folder) as checkpoint:
        assert mean_kl(logits(checkpoint, ids), model(torch.from_numpy(ids)).logits.float().numpy()) < limit


def test_what_runs_as_one_matrix_is_one_unit() -> None:
    names = [
        f"model.layers.{i}.{part}_proj.weight" for i in (0, 1) for part in ("self_attn.q", "self_attn.k", "mlp.up")
    ]
    q0, k0, up0, q1, k1, up1 = names
    assert fused_weights(names) == [(q0, k0), (up0,), (q1, k1), (up1,)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "mlx", "--target-size", "1MB"), ("least possible is", "mlx-3")),
        (("--to", "hf", "--target-size", "1MB"), ("least possible is", "nf4")),
        (("--to", "hf", "--target-size", "30MB"), ("nothing is quantized",)),
        (("--to", "mlx", "--target-size", "4MB", "--candidates", "nf4"), ("cannot hold nf4",)),
        (("--to", "mlx", "--target-size", "4MB", "--candidates", "q4_k"), ("q4_k is not a type of this format",)),
        (("--to", "mlx", "--target-size", "4MB", "--skip", "mlp"), ("--skip",)),
        (("--to", "keras", "--target-size", "4MB"), ("keras",)),
    ],
)
def test_what_cannot_be_met_is_one_line(
    options: tuple[str, ...], words: tuple[str, ...], source: Path, table: Path, tmp_path: Path
) -> None:
    assert_refused(run("quantize", source, tmp_path / "x", "--sensitivity", table, *options), 2, *words)


def test_a_folder_has_one_type(source: Path, tmp_path: Path) -> None:
    text = Text("t", "0" * 64, 1, 4)
    entries = {"model.layers.0.mlp.up_proj.weight": {name: Entry(Sum(1.0, 4)) for name in ("nf4", "int8")}}
    with registry.open_checkpoint(source) as checkpoint:
        from gemma2tool.model.digest import hash_checkpoint

        model = hash_checkpoint(checkpoint, threads=1).model
    table = SensitivityTable(model, "nearest", (text,), windows=(((2, 3, 4, 5),),), entries=entries)
    write_table(table, tmp_path / "t.json", force=False)
    result = run(
        "quantize", source, tmp_path / "x", "--to", "hf", "--target-bpw", 9, "--sensitivity", tmp_path / "t.json"
    )
    assert_refused(result, 2, "cannot be mixed in one folder", "int8")
    result = run(
        "quantize",
        source,
        tmp_path / "x",
        "--to",
        "hf",
        "--target-bpw",
        9,
        "--calibration",
        source.parent / "heldout.txt",
    )
    assert_refused(result, 2, "--candidates nf4")


def test_module_types_of_mlx(source: Path, tmp_path: Path) -> None:
    words = ("--type", "mlx-4", "--module-type", "down_proj=mlx-6", "--module-type", "layers.0=mlx-8", "--no-verify")
    result = run("quantize", source, tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    with registry.open_checkpoint(tmp_path / "out") as checkpoint:
        stored = {name: tensor.stored for name, tensor in checkpoint.tensors.items()}
    assert stored["model.layers.0.mlp.down_proj.weight"] == stored["model.layers.3.mlp.down_proj.weight"] == "mlx-6"
    assert stored["model.layers.0.mlp.up_proj.weight"] == "mlx-8" and stored["model.embed_tokens.weight"] == "mlx-4"
    for bad, word in (("down_proj", "REGEX=TYPE"), ("down=nf4", "not a type"), ("nothing=mlx-6", "matches no")):
        words = ("--type", "mlx-4", "--module-type", bad)
        assert_refused(run("quantize", source, tmp_path / "no", *words), 2, word)
