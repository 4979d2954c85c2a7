"""Files with tuned norms: what is kept, what the file says, and that a verification believes no other change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ResourceError, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import FLOAT32, ArrayTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.norm_checksums import norm_checksum, norm_names
from gemma2tool.pipeline import memory
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.run import ConversionResult
from gemma2tool.pipeline.tuning import tune
from gemma2tool.verify.compare.tuned_norms import LARGEST_CHANGE
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import run

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(SMALL, num_hidden_layers=2, layer_types=())
POST = "model.layers.1.post_feedforward_layernorm.weight"
FEW = 8


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    """With small embeddings, so that the layers matter."""
    checkpoint = random_checkpoint(np.dtype(FLOAT32), CONFIG)
    small = checkpoint.tensors[EMBEDDING].load() * np.float32(0.1)
    checkpoint.tensors[EMBEDDING] = ArrayTensor(small)
    return checkpoint


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, CONFIG.vocab_size, (FEW + 64, 24)))
    return path


def write(source: Checkpoint, ids: Path, path: Path) -> ConversionResult:
    calibration = Calibration(text=ids, samples=FEW, tune_norms=True, hessian="layer")
    return save(source, path, WriteOptions(type="q4_0", calibration=calibration), force=True)


@pytest.fixture(scope="module")
def tuned(source: Checkpoint, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConversionResult]:
    path = tmp_path_factory.mktemp("tuned") / "model.gguf"
    return path, write(source, ids, path)


def test_tuned_norms_lower_the_divergence_of_what_was_held_out(
    tuned: tuple[Path, ConversionResult], source: Checkpoint, ids: Path, tmp_path: Path
) -> None:
    path, result = tuned
    assert result.norm_tuning is not None
    assert result.norm_tuning.kept
    assert result.norm_tuning.kl_after < result.norm_tuning.kl_before
    assert 0 < result.norm_tuning.largest_change <= LARGEST_CHANGE
    with registry.open_checkpoint(path) as candidate:
        assert candidate.tuned_norms == {name: norm_checksum(candidate.tensors[name]) for name in norm_names(CONFIG)}
        verification = verify(source, candidate, VerifySettings(levels=("tensors",)))
    assert verification.passed
    assert f"{len(norm_names(CONFIG))} norms tuned" in verification.gates[0].summary
    plain = tmp_path / "plain.gguf"
    save(source, plain, WriteOptions(type="q4_0", calibration=Calibration(text=ids, samples=FEW, hessian="layer")))
    with registry.open_checkpoint(path) as candidate, registry.open_checkpoint(plain) as other:
        for name, tensor in other.tensors.items():
            is_same = np.array_equal(tensor.load(), candidate.tensors[name].load())
            assert is_same is not name.endswith("norm.weight"), name
    assert write(source, ids, tmp_path / "again.gguf").norm_tuning == result.norm_tuning
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def damaged(candidate: Checkpoint, name: str, values: np.ndarray) -> Checkpoint:
    return dataclasses.replace(candidate, tensors=candidate.tensors | {name: ArrayTensor(values.astype(np.float32))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w + 1, "at most 5%"),
        (lambda w: np.roll(w, 1), "at most 5%"),
        (lambda w: w * 0.999, "checksum"),
        (lambda w: np.append(w[:-1], w[-1] + np.float32(1e-4)), "checksum"),
    ],
)
def test_another_change_of_a_norm_is_damage(
    change: object, words: str, tuned: tuple[Path, ConversionResult], source: Checkpoint
) -> None:
    with registry.open_checkpoint(tuned[0]) as candidate:
        values = change(candidate.tensors[POST].load())
        verification = verify(source, damaged(candidate, POST, values), VerifySettings(levels=("tensors",)))
    [failure] = [finding for finding in verification.failures if finding.subject == POST]
    assert words in failure.message


def test_a_file_that_does_not_say_so_has_the_norms_of_its_source(
    tuned: tuple[Path, ConversionResult], source: Checkpoint
) -> None:
    with registry.open_checkpoint(tuned[0]) as candidate:
        silent = dataclasses.replace(candidate, tuned_norms={})
        verification = verify(source, silent, VerifySettings(levels=("tensors",)))
    assert {finding.subject for finding in verification.failures} == set(norm_names(CONFIG))


def test_what_the_held_out_text_does_not_confirm_is_not_kept(
    source: Checkpoint, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tune,
        "tuned_changes",
        lambda candidate, norms, *more: {name: np.full(len(norm), 0.3, np.float32) for name, norm in norms.items()},
    )
    result = write(source, ids, tmp_path / "model.gguf")
    assert result.norm_tuning is not None
    assert not result.norm_tuning.kept
    assert "as in the source" in result.norm_tuning.sentence()
    with registry.open_checkpoint(tmp_path / "model.gguf") as candidate:
        for name in norm_names(CONFIG):
            restored = (1 + source.tensors[name].load()) - 1  # as GGUF stores it
            assert np.array_equal(candidate.tensors[name].load(), restored)
            assert candidate.tuned_norms[name] == norm_checksum(candidate.tensors[name])


def interrupt(before: np.ndarray, after: np.ndarray) -> bool:
    """When the file already has norms that were tuned."""
    raise KeyboardInterrupt


def test_an_interrupted_tuning_starts_over(
    tuned: tuple[Path, ConversionResult], source: Checkpoint, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(tune, "agrees", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(source, ids, path)
    assert not path.exists()
    result = write(source, ids, path)
    assert result.resumed_tensors == result.tensors
    assert path.read_bytes() == tuned[0].read_bytes()


def test_what_cannot_be_tuned_is_refused_before_any_work(
    source: Checkpoint, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "few.npy", np.load(ids)[: FEW + 11])
    with pytest.raises(UsageError, match="needs 12 others") as short:
        write(source, tmp_path / "few.npy", tmp_path / "model.gguf")
    assert short.value.id == "calibration.short"
    monkeypatch.setattr(memory, "reported_memory", lambda: 1 << 16)
    with pytest.raises(ResourceError, match="tune-norms") as full:
        write(source, ids, tmp_path / "other.gguf")
    assert full.value.id == "memory.exhausted"
    with pytest.raises(UsageError, match="no effect"):
        WriteOptions(type="nf4", calibration=Calibration(text=ids, tune_norms=True)).check_target("hf")


def test_the_command_line_says_what_was_done(source: Checkpoint, ids: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(source, tmp_path / "model")
    out = tmp_path / "model.gguf"
    options = ("--type", "q4_0", "--calibration-samples", FEW, "--hessian", "layer", "--tune-norms")
    text = run("quantize", folder, out, "--calibration", ids, *options).stdout
    assert "norms: tuned: KL" in text
    assert run("verify", out, "--reference", folder).exit_code == 0
    receipt = json.loads((tmp_path / "model.gguf.receipt.json").read_text())
    assert receipt["plan"]["norm_tuning"]["kept"]
    assert receipt["plan"]["options"]["tune_norms"] is True
    assert receipt["tensors"][POST]["rule"] == "tuned"
