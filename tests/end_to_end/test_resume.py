"""Conversions that are killed, interrupted or refused, then run again: the same bytes, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app
from gemma2tool.pipeline import fingerprint as fingerprints
from gemma2tool.pipeline.calibration import boundaries
from gemma2tool.pipeline.calibration.session import Session
from gemma2tool.storage.staging import kept, staged_output
from gemma2tool.storage.staging import recorder as staging_recorder
from tests.campaigns.kill import COMMANDS, campaign, digest
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow

runner = CliRunner()
SMALLER = replace(SMALL, num_hidden_layers=2, layer_types=())
WORDS = {
    "gguf": ("quantize", "src", "out.gguf", "--type", "q4_0"),
    "ckpt": ("convert", "src", "out.ckpt"),
    "sharded": ("convert", "src", "out", "--max-shard-size", "60KB"),
    "split": ("quantize", "src", "out.gguf", "--type", "q8_0", "--split-max-tensors", "5"),
    "nf4": ("quantize", "src", "out", "--type", "nf4", "--double-quant"),
    "keras": ("convert", "src", "out", "--to", "keras"),
    "orbax": ("convert", "src", "out", "--to", "flax"),
    "sbs": ("convert", "src", "out.sbs", "--dtype", "bf16"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16), SMALLER), folder)


@pytest.fixture
def place(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to a folder with a source in it. Every complete tensor is journaled at once."""
    shutil.copytree(source, tmp_path / "src", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(staging_recorder, "SYNC_SECONDS", 0.0)
    return tmp_path


def run(*words: object) -> Result:
    return runner.invoke(app, [*map(str, words), "--threads", "1"])


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "src")


def in_a_child(function: Callable[[], None]) -> int:
    """The status that waitpid returns for a fork that runs ``function`` and ends."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_after(tensors: int, *words: object) -> None:
    """Runs the command in its own process, which is killed when this many more tensors are in the journal."""

    def work() -> None:
        done = staging_recorder.Journal.done

        def count(journal: object, pieces: object) -> None:
            for name, piece in pieces.items():
                done(journal, {name: piece})
                count.left -= 1
                if count.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        count.left = tensors
        staging_recorder.Journal.done = count
        run(*words)

    assert in_a_child(work) == signal.SIGKILL


def interrupted_after(tensors: int, monkeypatch: pytest.MonkeyPatch, *words: object) -> Result:
    """Runs the command in this process, interrupted as by ^C when this many more tensors are complete and some are
    journaled.
    """
    with monkeypatch.context() as patched:
        complete, calls = staged_output.Staging.complete, []

        def stop(self: staged_output.Staging, *args: object) -> None:
            complete(self, *args)
            calls.append(args)
            if len(calls) == tensors:
                while not self._recorder.recorded:
                    time.sleep(0.001)
                raise KeyboardInterrupt

        patched.setattr(staged_output.Staging, "complete", stop)
        return run(*words)


class TestKilled:
    @pytest.mark.parametrize("kind", WORDS)
    def test_continues_after_the_last_complete_tensor(self, place: Path, kind: str) -> None:
        words = (*WORDS[kind], "--no-verify")
        out = place / ("out" if kind == "split" else words[2])
        if kind in ("keras", "orbax"):
            pytest.importorskip({"keras": "h5py", "orbax": "tensorstore"}[kind])
        assert run(*words).exit_code == 0
        whole = digest(out)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        killed_after(5, *words)
        killed_after(6, *words)
        assert not out.exists()
        again = run(*words, "--json")
        assert again.exit_code == 0, again.output
        assert 11 <= json.loads(again.stdout)["resumed_tensors"] < 24
        assert "resumed: " in again.stderr
        assert digest(out) == whole
        assert names(place) == [out.name]

    def test_over_an_old_output(self, place: Path) -> None:
        (place / "out.gguf").write_bytes(b"old")
        killed_after(5, *WORDS["gguf"], "--no-verify", "--force")
        assert (place / "out.gguf").read_bytes() == b"old"
        refused = run(*WORDS["gguf"], "--no-verify")
        assert refused.exit_code == 2 and "--force" in refused.stderr
        again = run(*WORDS["gguf"], "--no-verify", "--force")
        assert again.exit_code == 0 and "resumed: " in again.stderr
        assert names(place) == ["out.gguf"]

    def test_several_outputs(self, place: Path) -> None:
        words = ("quantize", "src", "many", "--type", "q8_0,nf4,q4_0", "--no-verify")
        assert run(*words).exit_code == 0
        whole = digest(place / "many")
        shutil.rmtree(place / "many")
        killed_after(50, *words)  # two outputs have 48 tensors
        again = run(*words)
        assert again.exit_code == 0, again.output
        assert again.stderr.count("resumed: ") == 3
        assert digest(place / "many") == whole

    def test_with_other_threads_and_memory(self, place: Path) -> None:
        killed_after(5, *WORDS["gguf"], "--no-verify")
        again = runner.invoke(app, [*WORDS["gguf"], "--threads", "4", "--memory", "1MB", "--no-verify"])
        assert again.exit_code == 0 and "resumed: " in again.stderr

    def test_during_verification(self, place: Path) -> None:
        """All tensors are complete by then, so the second run only verifies."""
        killed_after(24, *WORDS["gguf"])
        again = run(*WORDS["gguf"], "--json")
        assert again.exit_code == 0, again.output
        content = json.loads(again.stdout)
        assert content["resumed_tensors"] == 24 and content["verified"]
        assert names(place) == ["out.gguf", "out.gguf.receipt.json"]

    def test_a_failed_verification_leaves_nothing(self, place: Path) -> None:
        killed_after(5, *WORDS["gguf"])
        again = run(*WORDS["gguf"], "--gate", "kl=0")
        assert again.exit_code == 1, again.output
        assert names(place) == []

    @pytest.mark.parametrize(
        "words", [WORDS["gguf"], WORDS["sharded"], ("quantize", "src", "many", "--type", "q8_0,nf4")]
    )
    def test_between_the_last_rename_and_the_end(self, place: Path, words: tuple[str, ...]) -> None:
        """The output is in place and complete: the next run says so, verifies it and cleans up, without --force."""

        def work() -> None:
            staged_output.Staging.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
            run(*words, "--no-verify")

        assert in_a_child(work) == signal.SIGKILL
        out = place / words[2]
        outputs = [path for path in out.iterdir() if not path.name.startswith(".")] if words[2] == "many" else [out]
        whole = [digest(path) for path in outputs]
        assert len(whole) == words[-1].count(",") + 1 and "absent" not in whole
        again = run(*words)
        assert again.exit_code == 0, again.output
        assert "already in place" in again.stderr and "PASSED" in again.stdout
        assert [digest(path) for path in outputs] == whole
        left = [path.name for path in place.rglob("*") if "gemma2tool-staging" in path.name]
        assert left == []

    def test_at_random(self, tmp_path: Path) -> None:
        """Some kills of the long campaign (tests/campaigns/kill.py)."""
        (tmp_path / "kill").mkdir()
        totals = campaign(tmp_path / "kill", 3, seed=1, commands=COMMANDS[1:2], layers=3, say=lambda line: None)
        assert totals["faults"] == []
        assert totals["identical"] == totals["trials"]


class TestInterrupted:
    def test_says_what_is_kept_and_continues(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped = interrupted_after(4, monkeypatch, *WORDS["gguf"], "--no-verify")
        assert stopped.exit_code == 130
        assert "the same command continues" in stopped.stderr and "gemma2tool clean" in stopped.stderr
        assert re.search(r"kept beside it \([\d.]+ [kM]B\)", stopped.stderr), "what clean would free"
        assert names(place) == [".out.gguf.gemma2tool-staging"]
        again = run(*WORDS["gguf"], "--no-verify")
        assert again.exit_code == 0 and "resumed: " in again.stderr
        assert names(place) == ["out.gguf"]

    def test_clean(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        interrupted_after(4, monkeypatch, *WORDS["gguf"], "--no-verify")
        listed = run_clean("out.gguf", "--dry-run")
        assert listed.exit_code == 0 and "would remove" in listed.stdout
        cleaned = run_clean("out.gguf")
        assert cleaned.exit_code == 0 and "removed .out.gguf.gemma2tool-staging" in cleaned.stdout
        assert names(place) == []
        assert "nothing to remove" in run_clean("out.gguf").stdout

    def test_clean_of_a_folder(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (place / "many").mkdir()
        interrupted_after(4, monkeypatch, "quantize", "src", "many", "--type", "q8_0,nf4", "--no-verify")
        content = json.loads(run_clean("many", "--json").stdout)
        assert [leftover["destination"] for leftover in content] == ["many/many-nf4", "many/many-q8_0.gguf"]
        assert all(leftover["removed"] and leftover["bytes"] > 0 for leftover in content)
        assert list((place / "many").iterdir()) == []

    def test_clean_leaves_a_running_one_alone(self, place: Path) -> None:
        with staged_output.Staging(place / "out.gguf") as busy:
            busy.file("out.gguf", 10)
            refused = run_clean("out.gguf")
            assert refused.exit_code == 4 and "output.locked" in refused.stderr
            second = run(*WORDS["gguf"], "--no-verify")
            assert second.exit_code == 4 and f"process {os.getpid()}" in second.stderr
            assert busy.path.exists()


def _interrupt(self: object) -> None:
    raise KeyboardInterrupt


def run_clean(*words: str) -> Result:
    return runner.invoke(app, ["clean", *words])


class TestRefusedToContinue:
    """Another source, plan or version: the error says what differs and leaves what is there."""

    @pytest.fixture
    def left(self, place: Path) -> Path:
        killed_after(5, *WORDS["gguf"], "--no-verify")
        return place

    def refused(self, left: Path, *words: str, difference: str) -> None:
        result = run(*(words or WORDS["gguf"]), "--no-verify")
        assert result.exit_code == 2, result.output
        assert "resume.mismatch" in result.stderr and difference in result.stderr, result.stderr
        assert "--restart" in result.stderr and "gemma2tool clean" in result.stderr
        assert names(left) == [".out.gguf.gemma2tool-staging"]

    def test_another_type(self, left: Path) -> None:
        self.refused(left, "quantize", "src", "out.gguf", "--type", "q8_0", difference="type was q4_0, is q8_0")

    def test_another_option(self, left: Path) -> None:
        self.refused(left, *WORDS["gguf"], "--pure", difference="pure was absent, is True")

    def test_a_touched_source(self, left: Path) -> None:
        os.utime(left / "src" / "model.safetensors", ns=(0, 1))
        self.refused(left, difference="source model.safetensors was")

    def test_a_source_with_other_values(self, left: Path) -> None:
        """With the same sizes and the same modification time."""
        path = left / "src" / "model.safetensors"
        times = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.refused(left, difference="source model.safetensors was")

    def test_another_config(self, left: Path) -> None:
        path = left / "src" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
        self.refused(left, difference="source config.json was")

    def test_another_version(self, left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fingerprints, "__version__", "9.9")
        self.refused(left, difference="is gemma2tool 9.9")

    def test_other_kernels(self, left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fingerprints, "_kernels", lambda: "other")
        self.refused(left, difference="kernels other")

    def test_allowing_what_was_refused(self, left: Path) -> None:
        self.refused(left, *WORDS["gguf"], "--allow-nonfinite", difference="allow-nonfinite was absent, is True")

    def test_restart(self, left: Path) -> None:
        result = run("quantize", "src", "out.gguf", "--type", "q8_0", "--no-verify", "--restart")
        assert result.exit_code == 0 and "resumed" not in result.stderr
        assert names(left) == ["out.gguf"]

    def test_a_moved_source_is_the_same(self, left: Path) -> None:
        (left / "elsewhere").mkdir()
        (left / "src").rename(left / "elsewhere" / "src")
        result = run("quantize", "elsewhere/src", *WORDS["gguf"][2:], "--no-verify")
        assert result.exit_code == 0 and "resumed" in result.stderr, result.output


class TestCalibrated:
    """Codes depend on all earlier layers, so the residual streams between layers are kept as well."""

    WORDS: ClassVar = {
        "gguf": ("quantize", "src", "out.gguf", "--type", "q4_0"),
        "act-order": ("quantize", "src", "out", "--type", "gptq-4", "--group-size", "32", "--act-order"),
        "awq": ("quantize", "src", "out", "--type", "awq-4", "--group-size", "32"),
    }

    @pytest.fixture(autouse=True)
    def text(self, place: Path) -> None:
        np.save("ids.npy", np.arange(128).reshape(4, 32))

    def words(self, kind: str) -> tuple[str, ...]:
        return (*self.WORDS[kind], "--calibration", "ids.npy", "--calibration-length", "32", "--no-verify")

    def undisturbed(self, kind: str) -> str:
        assert run(*self.words(kind)).exit_code == 0
        out = Path(self.WORDS[kind][2])
        whole = digest(out)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        return whole

    def killed_in(self, kind: str, layer: int, *, torn: str = "") -> None:
        """Runs the command in its own process, which is killed in ``layer`` (2: the head) when all tensors of the
        layers before it are in the journal; ``torn``: while the kept file of that name is being written.
        """

        def work() -> None:
            save = boundaries.Boundaries.save

            def kill(*args: object, **named: object) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            def stop(self: boundaries.Boundaries, stage: int, residual: object) -> None:
                save(self, stage, residual)
                if stage == layer:

                    def wait(*args: object) -> None:
                        while self.first_missing() < layer:
                            time.sleep(0.001)
                        kill()

                    Session._next_layer = Session._run_head = wait

            rename = os.rename

            def tear(source: str, destination: str, **named: int) -> None:
                if torn in destination:
                    kill()
                rename(source, destination, **named)

            if torn:
                kept.os.rename = tear
            boundaries.Boundaries.save = stop
            run(*self.words(kind))

        assert in_a_child(work) == signal.SIGKILL

    @pytest.mark.parametrize("kind", WORDS)
    def test_continues_at_the_layer_where_it_stopped(self, place: Path, kind: str) -> None:
        whole = self.undisturbed(kind)
        self.killed_in(kind, 1, torn="residual-0001")
        self.killed_in(kind, 1)
        again = run(*self.words(kind))
        assert again.exit_code == 0 and "1 of 2 layers were calibrated" in again.stderr, again.output
        assert digest(place / self.WORDS[kind][2]) == whole
        assert names(place) == ["ids.npy", self.WORDS[kind][2]]

    def test_killed_again_at_the_head(self, place: Path) -> None:
        whole = self.undisturbed("gguf")
        self.killed_in("gguf", 1)
        self.killed_in("gguf", 2)
        staged = place / ".out.gguf.gemma2tool-staging" / "kept"
        assert sorted(path.name for path in staged.iterdir()) == ["output-0001", "residual-0001", "residual-0002"]
        again = run(*self.words("gguf"))
        assert again.exit_code == 0 and "2 of 2 layers were calibrated" in again.stderr, again.output
        assert digest(place / "out.gguf") == whole

    @pytest.mark.parametrize("tensors", [3, 9, 20])
    def test_killed_while_a_layer_is_written(self, place: Path, tensors: int) -> None:
        whole = self.undisturbed("gguf")
        killed_after(tensors, *self.words("gguf"))
        again = run(*self.words("gguf"), "--json")
        assert again.exit_code == 0 and json.loads(again.stdout)["resumed_tensors"] >= tensors, again.output
        assert digest(place / "out.gguf") == whole

    def test_killed_while_the_gradients_are_collected(self, place: Path) -> None:
        whole = self.undisturbed("gguf")
        self.killed_in("gguf", 1, torn="output-0000")
        again = run(*self.words("gguf"))
        assert again.exit_code == 0, again.output
        assert digest(place / "out.gguf") == whole

    @pytest.mark.parametrize("name", ["residual-0001", "output-0001"])
    def test_what_is_kept_and_damaged_is_computed_again(self, place: Path, name: str) -> None:
        whole = self.undisturbed("gguf")
        self.killed_in("gguf", 1)
        file = place / ".out.gguf.gemma2tool-staging" / "kept" / name
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        again = run(*self.words("gguf"))
        assert again.exit_code == 0 and ("calibrated" in again.stderr) == (name == "output-0001"), again.output
        assert digest(place / "out.gguf") == whole

    def test_another_text(self, place: Path) -> None:
        self.killed_in("gguf", 1)
        np.save("ids.npy", np.arange(1, 129).reshape(4, 32))
        refused = run(*self.words("gguf"))
        assert refused.exit_code == 2 and "resume.mismatch" in refused.stderr, refused.output
        assert "calibration-run was" in refused.stderr
        assert run(*self.words("gguf"), "--restart").exit_code == 0
        assert names(place) == ["ids.npy", "out.gguf"]

    def test_clean_removes_the_streams(self, place: Path) -> None:
        self.killed_in("gguf", 1)
        assert run_clean("out.gguf").exit_code == 0
        assert names(place) == ["ids.npy"]
