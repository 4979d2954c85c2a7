"""Files of Hessians: the same bytes from any number of shards and after any kill, and what they are used for."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.containers import safetensors
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import PackingOptions, WriteOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.calibration.collected import read_collected
from gemma2tool.pipeline.calibration.layer import CalibratedLayer
from gemma2tool.pipeline.calibration.session import Session
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.hessians.file import Writer
from gemma2tool.pipeline.hessians.run import HessiansOptions, collect_hessians
from gemma2tool.pipeline.sharding.merge import merge_parts
from gemma2tool.pipeline.sharding.pairwise import PairwiseSum
from gemma2tool.pipeline.sharding.shard import Shard
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.storage.staging import recorder
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.calibration import calibration_ids, divergence
from tests.support.checkpoints import SMALL, first_layers, random_checkpoint
from tests.support.commands import run

pytestmark = pytest.mark.slow

SEQUENCES, LENGTH = 20, 16
QUICK = HessiansOptions(threads=2)


def small(layers: int = 2, seed: int = 0) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    config = dataclasses.replace(SMALL, **sizes, num_hidden_layers=layers, layer_types=())
    return random_checkpoint(np.dtype(ml_dtypes.bfloat16), config, seed)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, SMALL.vocab_size, (SEQUENCES, LENGTH)))
    return tmp_path / "ids.npy"


def collected(ids: Path, source: Checkpoint | None = None, name: str = "whole", **options: object) -> Path:
    path = ids.with_name(name)
    collect_hessians(source or small(), ids, path, dataclasses.replace(QUICK, **options))
    return path


@pytest.mark.parametrize("options", [{}, {"hessian_block": 96}], ids=["whole", "blocks"])
def test_shards_merge_to_the_bytes_of_one_machine(ids: Path, options: dict[str, int]) -> None:
    whole = collected(ids, **options)
    for index in range(4):  # slices of inputs: 3, of outputs: 5
        collected(ids, name="merged", shard=Shard(index, 4), threads=1 + index, **options)
    merged = merge_parts(ids.with_name("merged"), (), force=False)
    assert merged.kind == "hessians" and len(merged.parts) == 4
    assert merged.out.read_bytes() == whole.read_bytes()


def test_parts_of_different_texts_or_models_do_not_merge(ids: Path) -> None:
    collected(ids, name="merged", shard=Shard(0, 2))
    collected(ids, small(seed=1), name="merged", shard=Shard(1, 2))
    with pytest.raises(UsageError, match="model is") as refused:
        merge_parts(ids.with_name("merged"), (), force=False)
    assert refused.value.id == "part.mismatch"


def test_sums_are_those_of_the_activations(ids: Path) -> None:
    """The first layer's input, computed here by hand."""
    source = small()
    hessians = read_collected(collected(ids, source), source, threads=1)
    rows = np.load(ids)
    x = StreamedForward(source, rows).embeddings().numpy().reshape(rows.size, -1)
    weight = source.tensors["model.layers.0.input_layernorm.weight"].load().astype(np.float64)
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + source.config.rms_norm_eps) * (1 + weight)
    entry = hessians.header.tensors["model.layers.0.self_attn.q_proj.inputs"]
    stored = np.fromfile(hessians.path, "<f4", entry.nbytes // 4, offset=entry.offset).reshape(256, 256)
    assert np.allclose(np.tril(stored), np.tril(normed.T @ normed), rtol=1e-4, atol=1e-3)


@pytest.fixture
def journaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is complete is journaled at once."""
    monkeypatch.setattr(recorder, "SYNC_SECONDS", 0.0)


def stopped_at(ids: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a collection when it has written this many Hessians and they are durable."""
    original, written = Writer.write, list[str]()

    def write(self: Writer, name: str, sums: PairwiseSum) -> None:
        if len(written) == number:
            while not all(map(self.staging.is_recorded, written)):
                time.sleep(0.001)
            raise KeyboardInterrupt
        original(self, name, sums)
        written.append(name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", write)
        collected(ids, name=name)


@pytest.mark.usefixtures("journaled")
@pytest.mark.parametrize(("number", "layers"), [(0, 2), (7, 2), (14, 2), (18, 1), (22, 0)])
def test_stopped_at_every_layer_it_ends_with_the_same_bytes(
    number: int, layers: int, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the gradients, between their layers and after them; then between the layers of inputs, before the head."""
    expected, path = collected(ids).read_bytes(), ids.with_name("stopped")
    stopped_at(ids, path.name, number, monkeypatch)
    assert not path.exists()
    written, run, write, run_layer = list[str](), list[str](), Writer.write, CalibratedLayer.calibrate

    def counted(self: CalibratedLayer, *arguments: object) -> None:
        run.append(self.prefix)
        run_layer(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", lambda self, name, sums: (written.append(name), write(self, name, sums)))
        patch.setattr(CalibratedLayer, "calibrate", counted)
        collected(ids, name=path.name, threads=1)
    assert path.read_bytes() == expected
    assert len(written) == 23 - number and len(run) == layers
    assert not list(ids.parent.glob(".*"))


@pytest.mark.usefixtures("journaled")
def test_an_interrupted_collection_of_another_text_is_not_continued(ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(ids, "whole", 3, monkeypatch)
    with pytest.raises(UsageError) as refused:
        collected(ids, samples=10)
    assert refused.value.id == "resume.mismatch" and "sequences" in refused.value.message
    collected(ids, samples=10, restart=True)


@pytest.mark.parametrize(
    ("type", "packing", "more"),
    [
        ("q4_0", PackingOptions(), {}),
        ("gptq-4", PackingOptions(group_size=32), {"act_order": True, "method": "textbook"}),
        ("nf4", PackingOptions(), {}),
    ],
)
def test_a_file_serves_every_type_and_any_number_of_threads(
    type: str, packing: PackingOptions, more: dict[str, object], ids: Path, tmp_path: Path
) -> None:
    source, hessians = small(), collected(ids)
    suffix = ".gguf" if packing == PackingOptions() and type != "nf4" else ""
    outputs = []
    for threads in (1, 3):
        out = tmp_path / f"{threads}" / f"model{suffix}"
        out.parent.mkdir()
        calibration = Calibration(hessians=hessians, **more)
        save(source, out, WriteOptions(type=type, packing=packing, calibration=calibration), threads=threads)
        outputs.append((out if suffix else out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    with registry.open_checkpoint(out) as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("completeness", "config", "tensors")))
    assert verification.passed, [finding.message for finding in verification.failures]


def test_codes_are_as_good_as_those_by_the_text(fixture_dir: Path, tmp_path: Path) -> None:
    heldout = np.load(fixture_dir / "heldout.npy")[::12, :64]
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as trained:
        source = first_layers(trained, 1)
        np.save(tmp_path / "ids.npy", calibration_ids(source, 8, 128))
        logits = StreamedForward(source, heldout).logits().reshape(heldout.size, -1)
        hessians = collected(tmp_path / "ids.npy", source)
        kl = {}
        for name, calibration in (
            ("nearest", Calibration()),
            ("text", Calibration(text=tmp_path / "ids.npy")),
            ("file", Calibration(hessians=hessians)),
        ):
            path = tmp_path / f"{name}.gguf"
            save(source, path, WriteOptions(type="q4_0", calibration=calibration), threads=2)
            kl[name] = divergence(path, heldout, logits).mean()
    assert kl["file"] < 0.7 * kl["nearest"] and kl["file"] < 1.1 * kl["text"]


def test_a_tied_copy_of_the_head_is_the_same_model(ids: Path) -> None:
    source = small()
    copied = {**source.tensors, "lm_head.weight": source.tensors["model.embed_tokens.weight"]}
    untied = dataclasses.replace(
        source, tensors=copied, config=dataclasses.replace(source.config, tie_word_embeddings=False)
    )
    path = collected(ids, untied)
    for checkpoint in (untied, with_tied_head(untied)):
        assert read_collected(path, checkpoint, threads=1).about.sequences == SEQUENCES


def test_files_of_other_models_and_damaged_ones_are_refused(ids: Path) -> None:
    path = collected(ids)
    with pytest.raises(InputRefused) as refused:
        read_collected(path, small(seed=1), threads=1)
    assert refused.value.id == "hessians.other-model" and "\n" not in refused.value.message
    whole = path.read_bytes()
    entry = safetensors.read_header(path).tensors["lm_head.inputs"]
    infinite = bytearray(whole)
    infinite[entry.offset : entry.offset + 4] = np.float32(np.inf).tobytes()
    document = whole.replace(b"hessians/1", b"hessians/9")
    for content in (b"", b"{}", whole[:-4], document, whole.replace(b"lm_head.inputs", b"lm_head.outputs")):
        path.write_bytes(content)
        with pytest.raises(InputRefused) as refused:
            read_collected(path, small(), threads=1)
        assert refused.value.id == "hessians.damaged" and "\n" not in refused.value.message
    path.write_bytes(infinite)
    with pytest.raises(InputRefused) as refused:
        read_collected(path, small(), threads=1).head()
    assert refused.value.id == "hessians.damaged" and "lm_head.inputs" in refused.value.message


def test_values_that_are_not_finite_are_refused(ids: Path) -> None:
    source, name = small(), "model.layers.1.mlp.up_proj.weight"
    huge = np.full(source.tensors[name].shape, 3e38, ml_dtypes.bfloat16)
    broken = dataclasses.replace(source, tensors={**source.tensors, name: ArrayTensor(huge)})
    with pytest.raises(InputRefused) as refused:
        collected(ids, broken)
    assert refused.value.id == "calibration.nonfinite" and not ids.with_name("whole").exists()


@pytest.mark.parametrize(
    ("calibration", "id"),
    [
        (Calibration(text=Path("text.txt"), hessians=Path("h")), "hessians.calibration"),
        (Calibration(hessians=Path("h"), samples=4), "option.ignored"),
        (Calibration(hessians=Path("h"), tune_norms=True), "option.ignored"),
    ],
)
def test_options_that_do_not_go_together(calibration: Calibration, id: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        save(small(), tmp_path / "x.gguf", WriteOptions(type="q4_0", calibration=calibration))
    assert refused.value.id == id


def test_scales_that_would_change_the_inputs_are_refused(ids: Path, tmp_path: Path) -> None:
    calibration = Calibration(hessians=collected(ids), method="textbook")
    options = WriteOptions(type="awq-4", packing=PackingOptions(group_size=64), calibration=calibration)
    with pytest.raises(UsageError) as refused:
        save(small(), tmp_path / "out", options)
    assert refused.value.id == "hessians.folding"


def test_from_the_command_line(ids: Path, tmp_path: Path) -> None:
    model, out, file = tmp_path / "model", tmp_path / "q.gguf", tmp_path / "h"
    save(small(), model, WriteOptions())
    command = ("calibrate", model, file, "--hessians", "--text", ids)
    planned = run(*command, "--dry-run", "--json")
    assert planned.exit_code == 0 and not file.exists(), planned.output
    plan = json.loads(planned.stdout)
    assert plan["written"] is False and plan["sequences"] == SEQUENCES
    assert plan["needs"]["disk_bytes"] > plan["bytes"]
    assert run(*command).exit_code == 0
    assert file.stat().st_size == pytest.approx(plan["bytes"], abs=8)
    quantize = ("quantize", model, out, "--type", "q4_0", "--no-readers")
    shown = run(*quantize, "--hessians", file, "--dry-run")
    assert shown.exit_code == 0 and "calibration by collected Hessians" in shown.stdout, shown.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {model}\noutput: {out}\ntype: q4_0\nhessians: {file.name}\nno-readers: true\n")
    done = run("run", recipe)
    assert done.exit_code == 0, done.output
    receipt = json.loads((tmp_path / "q.gguf.receipt.json").read_text())
    assert receipt["plan"]["options"]["hessian"] == "model" and "hessians" in receipt["plan"]["options"]
    refused = run(*quantize, "--force", "--hessians", ids)
    assert refused.exit_code == 3 and "hessians.damaged" in refused.output and "hint" in refused.output


@pytest.mark.usefixtures("journaled")
def test_a_calibrated_run_that_was_interrupted_resumes(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, whole = tmp_path / "model", tmp_path / "q.gguf", tmp_path / "whole.gguf"
    save(small(), model, WriteOptions())
    command = ("--type", "q4_0", "--hessians", collected(ids), "--no-verify", "--threads", 1)
    assert run("quantize", model, whole, *command).exit_code == 0
    layers: list[int] = []
    run_layer = Session._next_layer

    def stopped(self: Session) -> None:
        layers.append(self._done)
        if layers == [0, 1]:
            assert self._boundaries is not None
            while self._boundaries.first_missing() == 0:
                time.sleep(0.001)
            raise KeyboardInterrupt
        run_layer(self)

    monkeypatch.setattr(Session, "_next_layer", stopped)
    assert run("quantize", model, out, *command).exit_code == 130
    assert run("quantize", model, out, *command).exit_code == 0
    assert layers == [0, 1, 1]
    assert out.read_bytes() == whole.read_bytes()
