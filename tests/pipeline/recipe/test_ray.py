"""A recipe on a Ray cluster of two nodes, one of whose workers is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import gemma2tool
from gemma2tool.errors import UsageError
from gemma2tool.model.lazy import BFLOAT16
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.commands import run

TYPES = ("q8_0", "q4_0", "q5_0", "q5_1", "f16", "bf16", "f32", "q4_1")


def recipe(folder: Path, name: str, out: str) -> Path:
    outputs = "".join(
        f"  - {{output: {out}/{type}.gguf, {'dtype' if type in ('f16', 'bf16', 'f32') else 'type'}: {type}}}\n"
        for type in TYPES
    )
    (folder / out).mkdir()
    (folder / name).write_text(f"source: model\nthreads: 1\nno-readers: true\noutputs:\n{outputs}")
    return folder / name


def workers() -> set[int]:
    """The processes that have a task under way."""
    pids = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().startswith(b"ray::gemma2tool"):
                pids.add(int(place.parent.name))
        except OSError:
            continue
    return pids


@pytest.mark.slow
def test_without_a_cluster_or_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(random_checkpoint(BFLOAT16), tmp_path / "model")
    path = recipe(tmp_path, "r.yaml", "out")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    result = run("run", path, "--on", "ray")
    assert result.exit_code == 2 and "extra.missing" in result.stderr
    result = run("run", path, "--on", "rya")
    assert result.exit_code == 2 and "--on 'rya' is not a choice" in result.stderr


def test_an_output_that_is_there_as_the_recipe_says_is_done(tmp_path: Path) -> None:
    write_checkpoint(random_checkpoint(BFLOAT16), tmp_path / "model")
    path = tmp_path / "r.yaml"
    text = "source: model\nno-verify: true\noutputs:\n  - {output: a.gguf, type: q8_0}\n  - {output: b, type: nf4}\n"
    path.write_text(text)
    [both] = gemma2tool.read_recipe(path, existing=True)
    first, second = both.single_outputs()
    assert not first.is_done() and not second.is_done()
    first.carry_out()
    assert first.is_done() and not second.is_done() and not both.is_done()
    path.write_text(text.replace("q8_0", "q4_0"))
    assert not gemma2tool.read_recipe(path, existing=True)[0].single_outputs()[0].is_done()
    path.write_text(text.replace("outputs", "force: true\noutputs", 1))
    assert not gemma2tool.read_recipe(path, existing=True)[0].single_outputs()[0].is_done()


@pytest.mark.slow
@pytest.mark.peer
def test_two_nodes_and_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    write_checkpoint(random_checkpoint(BFLOAT16), tmp_path / "model")
    here, there = recipe(tmp_path, "here.yaml", "one"), recipe(tmp_path, "there.yaml", "many")
    assert run("run", here).exit_code == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    killed: list[int] = []
    ended = threading.Event()

    def kill_one() -> None:
        while not (killed or ended.is_set()):
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break
            time.sleep(0.001)

    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        killer = threading.Thread(target=kill_one)
        killer.start()
        results = gemma2tool.run_on_ray(gemma2tool.read_recipe(there, existing=True))
        ended.set()
        killer.join()
        assert killed and len(results) == 8 and all(result.verification for result in results)
        assert gemma2tool.run_on_ray(gemma2tool.read_recipe(there, existing=True)) == ()
        (tmp_path / "many" / "q8_0.gguf.recipe.yaml").unlink()
        with pytest.raises(UsageError) as refused:
            gemma2tool.run_on_ray(gemma2tool.read_recipe(there, existing=True))
        assert refused.value.id == "output.exists"
    finally:
        ended.set()
        cluster.shutdown()
    for type in TYPES:
        assert (tmp_path / "one" / f"{type}.gguf").read_bytes() == (tmp_path / "many" / f"{type}.gguf").read_bytes()
