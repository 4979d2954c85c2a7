"""Several ranks calibrate one output together: its bytes are those of one process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats.options import PackingOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.pipeline.calibration.session import Session
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.plan import make_plan
from gemma2tool.pipeline.ranks.messages import packed, unpacked
from gemma2tool.pipeline.ranks.together import ALONE, Ranks, rank_of_torchrun
from gemma2tool.pipeline.requests import RunOptions
from gemma2tool.pipeline.run import run
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.commands import run as run_command
from tests.support.ranks import run_ranks

KINDS = {
    "q4_k_m": WriteOptions(type="q4_k_m", calibration=Calibration(hessian="model")),
    "iq4_xs": WriteOptions(type="iq4_xs", calibration=Calibration(hessian="layer")),
    "awq-4": WriteOptions(
        type="awq-4", packing=PackingOptions(group_size=32), calibration=Calibration(method="textbook")
    ),
}


def model(layers: int = 1, last: float | None = None) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "query_pre_attn_scalar": 64}
    config = dataclasses.replace(SMALL, **sizes, num_hidden_layers=layers, layer_types=())
    checkpoint = random_checkpoint(np.dtype(ml_dtypes.bfloat16), config)
    if last is not None:
        name = "model.layers.0.mlp.up_proj.weight"
        values = checkpoint.tensors[name].load().copy()
        values[-1, -1] = last
        checkpoint.tensors[name] = ArrayTensor(values, origin=name)
    return checkpoint


def write(
    path: Path, options: WriteOptions, ids: Path, ranks: Ranks = ALONE, source: Callable[[], Checkpoint] = model
) -> None:
    options = dataclasses.replace(
        options, calibration=dataclasses.replace(options.calibration, text=ids), name=path.name
    )
    plan = make_plan(source(), path, to="gguf" if path.suffix else "hf", options=options, threads=1)
    assert plan.session is not None
    plan.session.share_with(ranks, 0)
    if ranks.index:
        ranks.follow([plan.session])
    else:
        run([plan], None, RunOptions(threads=2, receipt=False), None, ranks.stop)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, SMALL.vocab_size, (9, 16)))
    return tmp_path / "ids.npy"


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("q4_k_m", 2), ("iq4_xs", 3), ("awq-4", 2)])
def test_same_bytes(kind: str, count: int, ids: Path, tmp_path: Path) -> None:
    name = "model.gguf" if "_" in kind else "model"
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one" / name, KINDS[kind], ids)
    run_ranks(count, lambda ranks: write(tmp_path / "many" / name, KINDS[kind], ids, ranks))
    assert content(tmp_path / "one" / name) == content(tmp_path / "many" / name)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_more_ranks(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two() -> Checkpoint:
        return model(layers=2)

    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "one" / "m.gguf", KINDS["iq4_xs"], ids, source=two)
    whole = Session._next_layer

    def stopping(session: Session) -> None:
        if session._done == 1:
            while session._boundaries.first_missing() < 1:
                time.sleep(0.001)
            raise KeyboardInterrupt
        whole(session)

    monkeypatch.setattr(Session, "_next_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "many" / "m.gguf", KINDS["iq4_xs"], ids, source=two)
    stages: list[int] = []

    def counting(session: Session) -> None:
        stages.append(session._done)
        whole(session)

    monkeypatch.setattr(Session, "_next_layer", counting)
    run_ranks(2, lambda ranks: write(tmp_path / "many" / "m.gguf", KINDS["iq4_xs"], ids, ranks, two))
    assert stages == [1, 1]
    assert (tmp_path / "one" / "m.gguf").read_bytes() == (tmp_path / "many" / "m.gguf").read_bytes()


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse(ids: Path, tmp_path: Path) -> None:
    def attempt(ranks: Ranks) -> str:
        try:
            write(tmp_path / "m.gguf", KINDS["iq4_xs"], ids, ranks, lambda: model(last=np.nan))
        except InputRefused as refused:
            return refused.id
        return "written"

    assert run_ranks(2, attempt) == ["weights.nonfinite"] * 2
    assert not (tmp_path / "m.gguf").exists()


def test_messages() -> None:
    value = ({"a": np.ones(6, [("x", "<f4"), ("y", "u1", (3,))])}, [1.5, None, 7], np.zeros((0, 3), np.float16))
    back = unpacked(packed(value))
    assert (back[0]["a"] == value[0]["a"]).all() and back[1] == value[1] and back[2].shape == (0, 3)
    with pytest.raises(InputRefused, match="of a file"):
        unpacked(packed(InputRefused("weights.nonfinite", "of a file")))
    with pytest.raises(RuntimeError, match="another rank failed: KeyError"):
        unpacked(packed(KeyError("x")))


def test_rank_of_torchrun() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert rank_of_torchrun(environment) == 0
    assert rank_of_torchrun(environment | {"WORLD_SIZE": "1"}) == -1
    assert rank_of_torchrun({"RANK": "0", "WORLD_SIZE": "2"}) == -1


@pytest.mark.slow
def test_torchrun(ids: Path, tmp_path: Path) -> None:
    save(model(), tmp_path / "model")
    words = ["quantize", str(tmp_path / "model"), "--type", "q4_0", "--calibration", str(ids), "--hessian", "layer"]
    words += ["--calibration-length", "16", "--threads", "1", "--no-verify", "--quiet"]
    run_command(*words[:2], tmp_path / "one.gguf", *words[2:])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "gemma2tool", *words[:2], str(tmp_path / "many.gguf"), *words[2:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("not verified") == 1, done.stderr
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()
