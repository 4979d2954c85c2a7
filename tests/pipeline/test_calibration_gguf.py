"""Calibrated GGUF files: as large as the file with an importance matrix, and nearer to the source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.containers import gguf
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.gguf.tensors import StoredBlocks
from gemma2tool.formats.options import GGUFOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.pipeline.calibration import output_side
from gemma2tool.pipeline.calibration.output import CalibratedHead, CalibrationSettings, calibrated
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.importance import ImatrixOptions, collect, collect_imatrix
from gemma2tool.pipeline.write import write_output
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.calibration import calibration_ids, calibration_text, divergence
from tests.support.checkpoints import SMALL, first_layers, random_checkpoint
from tests.support.commands import run

pytestmark = pytest.mark.slow

SEQUENCES, LENGTH, WINDOWS = 24, 256, 8


@pytest.fixture(scope="module")
def source(fixture_dir: Path):
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield first_layers(checkpoint, 2)


@pytest.fixture(scope="module")
def folder(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration ids and an importance matrix from as much of the same text."""
    path = tmp_path_factory.mktemp("calibration")
    np.save(path / "ids.npy", calibration_ids(source, SEQUENCES, LENGTH))
    (path / "text.txt").write_text(calibration_text())
    options = ImatrixOptions(chunk_size=LENGTH, max_chunks=SEQUENCES, threads=2)
    collect_imatrix(source, path / "text.txt", path / "imatrix.gguf", options)
    return path


@pytest.fixture(scope="module")
def heldout(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")[::6][:WINDOWS]


@pytest.fixture(scope="module")
def true_logits(source: Checkpoint, heldout: np.ndarray) -> np.ndarray:
    return StreamedForward(source, heldout).logits().reshape(heldout.size, -1)


@pytest.mark.parametrize(
    ("type", "hessian", "limit"),
    [("q4_k_m", "model", 0.5), ("iq3_xxs", "layer", 0.85)],
)
def test_nearer_to_the_source_at_the_same_size(
    type: str,
    hessian: str,
    limit: float,
    source: Checkpoint,
    folder: Path,
    heldout: np.ndarray,
    true_logits: np.ndarray,
    tmp_path: Path,
) -> None:
    with_matrix, chosen = tmp_path / "imatrix.gguf", tmp_path / "calibrated.gguf"
    save(source, with_matrix, WriteOptions(type=type, gguf=GGUFOptions(imatrix=folder / "imatrix.gguf")))
    calibration = Calibration(text=folder / "ids.npy", hessian=hessian)
    save(source, chosen, WriteOptions(type=type, calibration=calibration), threads=2)
    with registry.open_checkpoint(with_matrix) as one, registry.open_checkpoint(chosen) as other:
        assert {name: tensor.stored for name, tensor in one.tensors.items()} == {
            name: tensor.stored for name, tensor in other.tensors.items()
        }
        verification = verify(source, other, VerifySettings(levels=("completeness", "config", "tensors")))
    assert verification.passed, [finding.message for finding in verification.failures]
    calibrated, weighted = (divergence(path, heldout, true_logits).mean() for path in (chosen, with_matrix))
    ratio = calibrated / weighted
    assert ratio < limit


@pytest.mark.parametrize("type", ["q8_0", "q1_0", "q2_0"])
def test_codes_that_wander_far_with_little_text_are_no_damage(
    type: str, source: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    calibration = Calibration(text=folder / "text.txt", samples=2, length=48, hessian="layer")
    save(source, tmp_path / "x.gguf", WriteOptions(type=type, calibration=calibration))
    with registry.open_checkpoint(tmp_path / "x.gguf") as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("tensors",)))
    assert verification.passed, [finding.message for finding in verification.failures]


@pytest.mark.peer
def test_llama_cpp_finds_the_same_values(tmp_path: Path) -> None:
    from tests.support.llama_peer import dequantize

    path = tmp_path / "model.gguf"
    save(small(), path, WriteOptions(type="q3_k_m", calibration=Calibration(text=small_ids(tmp_path))))
    with registry.open_checkpoint(path) as candidate:
        tensors = [tensor for tensor in candidate.tensors.values() if tensor.stored in ("q3_k", "q4_k", "q5_k", "q6_k")]
        assert len(tensors) == 15 and {"q3_k", "q4_k", "q5_k", "q6_k"} == {tensor.stored for tensor in tensors}
        for tensor in tensors:
            blocks = StoredBlocks(tensor).load_rows(0, 8)
            assert np.array_equal(dequantize(tensor.type, blocks, tensor.row_size), tensor.load_rows_f32(0, 8))


def small(layers: int = 2) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    config = dataclasses.replace(SMALL, **sizes, num_hidden_layers=layers, layer_types=())
    return random_checkpoint(np.dtype(ml_dtypes.bfloat16), config)


def small_ids(path: Path) -> Path:
    np.save(path / "ids.npy", np.random.default_rng(0).integers(3, SMALL.vocab_size, (6, 48)))
    return path / "ids.npy"


@pytest.mark.parametrize(
    ("type", "hessian"),
    [("q4_k_m", "model"), ("iq2_m", "layer"), ("q4_0", "layer"), ("tq2_0", "layer"), ("iq1_s", "layer")],
)
def test_same_bytes_for_any_number_of_threads(tmp_path: Path, type: str, hessian: str) -> None:
    source, calibration = small(), Calibration(text=small_ids(tmp_path), hessian=hessian)
    files = []
    for threads in (1, 5):
        path = tmp_path / str(threads) / "model.gguf"
        path.parent.mkdir()
        save(source, path, WriteOptions(type=type, calibration=calibration), threads=threads)
        files.append(path.read_bytes())
    assert len(set(files)) == 1


def test_outputs_of_one_run_share_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the bytes that it has alone."""
    model, ids, passes = tmp_path / "model", small_ids(tmp_path), []
    collect_gradients = output_side.output_hessians

    def counted(*arguments: object, **named: object) -> object:
        passes.append(arguments)
        return collect_gradients(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(output_side, "output_hessians", counted)
    save(small(), model, WriteOptions())
    more = ("--calibration", ids, "--no-verify", "--threads", 3)
    together = run("quantize", model, tmp_path / "files", "--to", "gguf", "--type", "q4_0", "--type", "q5_0", *more)
    assert together.exit_code == 0 and len(passes) == 1, together.output
    for path in sorted((tmp_path / "files").iterdir()):
        type = "q4_0" if "q4_0" in path.name.lower() else "q5_0"
        assert run("quantize", model, tmp_path / path.name, "--type", type, *more).exit_code == 0
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert len(passes) == 3


def test_the_embedding_is_written_last_and_no_more_than_a_layer_is_held(tmp_path: Path) -> None:
    """It stands first in the file; waiting for it, every layer would be held."""
    source, held = small(layers=3), []
    output = registry.by_name("gguf").layout(source, WriteOptions(type="q4_k_m"))
    output, _ = calibrated(output, source, CalibrationSettings(np.load(small_ids(tmp_path))), threads=2)
    last = output.tensors[-1]
    assert isinstance(last.source, CalibratedHead)
    assert last.name == "token_embd.weight"

    class Nowhere:
        def pwrite(self, offset: int, data: object) -> None:
            held.append(len(last.source.session._rounded))

    write_output(output, {file.name: Nowhere() for file in output.files}, threads=1)
    assert max(held) <= 7


def test_an_importance_matrix_beside_a_text_is_refused(source: Checkpoint, folder: Path, tmp_path: Path) -> None:
    options = WriteOptions(
        type="q4_k_m",
        gguf=GGUFOptions(imatrix=folder / "imatrix.gguf"),
        calibration=Calibration(text=folder / "ids.npy"),
    )
    with pytest.raises(UsageError) as caught:
        save(source, tmp_path / "model.gguf", options)
    assert caught.value.id == "imatrix.calibration"


@pytest.mark.parametrize(("words", "expected"), [((), "model"), (("--hessian", "layer"), "layer")])
def test_plan_file_and_receipt_say_what_errors_were_weighed_by(
    words: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "q.gguf"
    save(small(), source, WriteOptions())
    options = ("--type", "q4_0", "--calibration", small_ids(tmp_path))
    command = ("quantize", source, out, *options, *words, "--no-readers")
    plan = run(*command, "--dry-run")
    assert plan.exit_code == 0 and f"errors weighed by the {expected}" in plan.stdout, plan.output
    written = run(*command, "--json")
    assert written.exit_code == 0, written.output
    receipt = json.loads((tmp_path / "q.gguf.receipt.json").read_text())
    assert receipt["plan"]["options"]["hessian"] == expected
    header = gguf.read_header(out, GGML_BLOCKS)
    assert header.kv["gemma2tool.calibration.hessian"].value == expected


def test_a_calibrated_file_says_so_and_is_verified_without_being_told(tmp_path: Path) -> None:
    source, path = small(), tmp_path / "model.gguf"
    save(source, path, WriteOptions(type="q3_k_s", calibration=Calibration(text=small_ids(tmp_path))))
    assert b"gemma2tool.calibration.file" in path.read_bytes()
    with registry.open_checkpoint(path) as candidate:
        expected = registry.by_name("gguf").expected_after_roundtrip(source, candidate)
        settings = VerifySettings(levels=("completeness", "config", "tensors"), expected=expected)
        verification = verify(source, candidate, settings)
    assert verification.passed, [finding.message for finding in verification.failures]


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source, ids, name = small(), small_ids(tmp_path), "model.layers.1.mlp.up_proj.weight"
    huge = ArrayTensor(np.full(source.tensors[name].shape, 3e38, ml_dtypes.bfloat16), origin=name)
    broken = dataclasses.replace(source, tensors={**source.tensors, name: huge})
    for hessian, where in (("model", "outputs of model.layers.1:"), ("layer", "model.layers.1.mlp.down_proj:")):
        with pytest.raises(InputRefused) as refused:
            save(broken, tmp_path / "q.gguf", WriteOptions(type="q4_0", calibration=Calibration(ids, hessian=hessian)))
        assert refused.value.id == "calibration.nonfinite" and where in refused.value.message
    with pytest.raises(InputRefused) as refused:
        collect(broken, np.load(ids), threads=1, folder=tmp_path)
    assert refused.value.id == "calibration.nonfinite" and "model.layers.1.mlp.down_proj" in refused.value.message


@pytest.mark.parametrize("change", [{"hessian": "modle"}, {"method": "textbok"}])
def test_misspelled_choices_are_refused(change: dict[str, str], tmp_path: Path) -> None:
    type, format_name = ("q4_0", "gguf") if "hessian" in change else ("gptq-4", "hf")
    with pytest.raises(UsageError) as refused:
        WriteOptions(type=type, calibration=Calibration(tmp_path, **change)).check_target(format_name)
    assert refused.value.id == "option.choice" and "did you mean" in refused.value.hint
