"""Calibrated outputs of the trained fixture: better than rounded to nearest on text nobody has seen, the same for any
number of threads, true to the source, and made in memory that the number of layers does not move.
"""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.containers.safetensors import read_header
from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor, to_float32
from gemma2tool.pipeline.calibration.gradients import output_hessians
from gemma2tool.pipeline.calibration.output import CalibratedMatrix, CalibrationSettings, calibrated
from gemma2tool.pipeline.calibration.text import read_sequences
from gemma2tool.pipeline.conversion import save
from gemma2tool.pipeline.write import write_output
from gemma2tool.reference.streaming import StreamedForward
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.calibration import calibration_ids, calibration_text, divergence, paired_bootstrap
from tests.support.checkpoints import SMALL, first_layers, random_checkpoint
from tests.support.options import write_options

pytestmark = pytest.mark.slow

WINDOWS, SEQUENCES, LENGTH = 12, 16, 160


@pytest.fixture(scope="module")
def source(fixture_dir: Path):
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield first_layers(checkpoint, 2)


@pytest.fixture(scope="module")
def ids_file(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "calibration.npy"
    np.save(path, calibration_ids(source, SEQUENCES, LENGTH))
    return path


@pytest.fixture(scope="module")
def heldout(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")[::6][:WINDOWS]


@pytest.fixture(scope="module")
def true_logits(source: Checkpoint, heldout: np.ndarray) -> np.ndarray:
    return StreamedForward(source, heldout).logits().reshape(heldout.size, -1)


def written(source: Checkpoint, path: Path, kind: str | None, threads: int = 2, **extra: object) -> Path:
    save(source, path, write_options(type=kind, **extra), threads=threads)
    return path


def test_the_texts_are_disjoint(fixture_dir: Path) -> None:
    heldout, lines = (fixture_dir / "heldout.txt").read_text(), calibration_text().splitlines()
    shared = [line for line in lines if len(line) > 60 and line in heldout]
    assert len(lines) > 1000
    assert len(shared) <= len(lines) // 1000  # phrases of the language reference that topics repeat


@pytest.mark.parametrize(
    ("kind", "extra", "limit"),
    [
        ("gptq-4", {"group_size": 32, "calibration_method": "textbook"}, 1.0),
        ("awq-4", {"group_size": 128}, 0.7),
        ("nf4", {}, 0.7),
    ],
)
def test_calibrated_beats_rounded_to_nearest_on_unseen_text(
    kind: str,
    extra: dict,
    limit: float,
    source: Checkpoint,
    ids_file: Path,
    heldout: np.ndarray,
    true_logits: np.ndarray,
    tmp_path: Path,
) -> None:
    plain = {name: value for name, value in extra.items() if name != "calibration_method"}
    nearest = written(source, tmp_path / "nearest", kind, **plain)
    chosen = written(source, tmp_path / "chosen", kind, calibration=ids_file, **extra)
    assert stored_tensors(chosen) == stored_tensors(nearest)
    better = divergence(chosen, heldout, true_logits) - limit * divergence(nearest, heldout, true_logits)
    low, high = paired_bootstrap(better)
    assert high < 0, f"KL changes by {better.mean():.6f}, 95 % interval {low:.6f} to {high:.6f}"
    with registry.open_checkpoint(chosen) as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("completeness", "config", "tensors")))
    assert verification.passed, [finding.message for finding in verification.failures]


def stored_tensors(folder: Path) -> dict[str, tuple]:
    """Dtype and shape of every stored tensor."""
    header = read_header(folder / "model.safetensors")
    return {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}


def small(dtype: type = ml_dtypes.bfloat16, layers: int = 2) -> Checkpoint:
    config = dataclasses.replace(
        SMALL, hidden_size=128, intermediate_size=192, num_hidden_layers=layers, head_dim=32, layer_types=()
    )
    return random_checkpoint(np.dtype(dtype), config)


def small_ids(tmp_path: Path, count: int = 6) -> Path:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, SMALL.vocab_size, (count, 48)))
    return path


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gptq-4", {"group_size": 32, "act_order": True}),
        ("gptq-4", {"group_size": 32, "act_order": True, "calibration_method": "textbook"}),
        ("gptq-8", {"group_size": -1, "symmetric": False, "hessian_block": 64}),
        ("awq-4", {"group_size": 32}),
        ("awq-4", {"group_size": 64, "hessian_block": 64, "calibration_method": "textbook"}),
        ("w4a16", {"group_size": -1}),
        ("w4a16-asym", {"group_size": 32, "calibration_method": "textbook"}),
        ("nf4", {"double_quant": True}),
        ("mlx-3", {"group_size": 32}),
        ("fp8-block", {}),
        ("int8", {}),
    ],
)
def test_same_bytes_for_any_number_of_threads(tmp_path: Path, kind: str, extra: dict) -> None:
    source, ids = small(), small_ids(tmp_path)
    files = [
        written(source, tmp_path / str(threads), kind, threads, calibration=ids, **extra) / "model.safetensors"
        for threads in (1, 5)
    ]
    assert len({file.read_bytes() for file in files}) == 1
    with registry.open_checkpoint(files[0].parent) as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("completeness", "tensors")))
    assert verification.passed, [finding.message for finding in verification.failures]
    method = ("act_order", "hessian_block", "calibration_method")
    nearest = {name: value for name, value in extra.items() if name not in method}
    assert (
        files[0].read_bytes() != (written(source, tmp_path / "nearest", kind, **nearest) / files[0].name).read_bytes()
    )


@pytest.mark.parametrize("kind", ["gptq-4", "awq-4"])
@pytest.mark.parametrize("skip", ["v_proj", r"layers\.0\.|up_proj", "self_attn"])
def test_what_is_skipped_stays_and_the_rest_is_calibrated(tmp_path: Path, kind: str, skip: str) -> None:
    """A scale is folded only where all that it meets is quantized; so what is left alone keeps every bit."""
    source = small()
    asked = {"group_size": 32, "calibration": small_ids(tmp_path), "calibration_method": "textbook"}
    path = written(source, tmp_path / "out", kind, skip=(skip,), **asked)
    with registry.open_checkpoint(path) as candidate:
        verification = verify(source, candidate, VerifySettings(levels=("completeness", "tensors")))
        stored = {name: tensor.stored for name, tensor in candidate.tensors.items()}
    assert verification.passed, [finding.message for finding in verification.failures]
    assert {"bf16", kind} == set(stored.values())


def test_act_order_permutes_the_groups_and_says_so(tmp_path: Path) -> None:
    source = small()
    path = written(source, tmp_path / "out", "gptq-4", group_size=32, calibration=small_ids(tmp_path), act_order=True)
    assert json.loads((path / "config.json").read_text())["quantization_config"]["desc_act"] is True
    with registry.open_checkpoint(path) as candidate:
        groups = {name: tensor.g_idx for name, tensor in candidate.tensors.items() if tensor.stored == "gptq-4"}
        assert verify(source, candidate, VerifySettings(levels=("tensors",))).passed
    assert all(np.array_equal(np.bincount(group), np.full(len(group) // 32, 32)) for group in groups.values())
    prefix = "model.layers.1."
    assert (np.diff(groups[f"{prefix}mlp.down_proj.weight"]) < 0).any()
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        first, *others = (groups[f"{prefix}{name}.weight"] for name in fused)
        assert all(np.array_equal(first, other) for other in others)


def test_post_norms_are_never_touched_and_the_others_fold(tmp_path: Path) -> None:
    source = small()
    asked = {"group_size": 32, "calibration": small_ids(tmp_path), "calibration_method": "textbook"}
    path = written(source, tmp_path / "out", "awq-4", **asked)
    with registry.open_checkpoint(path) as candidate:
        changed = {
            name.split(".", 3)[-1]
            for name, tensor in candidate.tensors.items()
            if name.endswith("norm.weight") and not np.array_equal(tensor.load(), source.tensors[name].load())
        }
    assert changed == {"input_layernorm.weight", "pre_feedforward_layernorm.weight"}


def test_scales_fold_away_exactly(tmp_path: Path) -> None:
    """Codes aside, the folded model computes what the source computes: in 8 bits hardly anything is left of the
    difference.
    """
    from gemma2tool.pipeline.calibration import methods

    source, ids = small(np.float32), np.load(small_ids(tmp_path))
    output = registry.by_name("hf").layout(source, write_options(type="awq-4", group_size=32))

    class Unrounded(methods.ByScale):
        def _round(self, layer, *names: str) -> None:
            for name in names:
                weight = layer.projection(name).weight
                folded[f"{layer.prefix}{name}.weight"] = weight.load_rows_f32(0, weight.rows)

    folded: dict[str, np.ndarray] = {}
    calibrated_output, _ = calibrated(output, source, CalibrationSettings(ids, textbook=True), threads=1)
    session = next(
        item.source.session for item in calibrated_output.tensors if isinstance(item.source, CalibratedMatrix)
    )
    norms = {item.name: item.encoder.dtype for item in output.tensors if item.name.endswith("norm.weight")}
    session._method = lambda run: Unrounded(session.grids, norms)
    for item in calibrated_output.tensors:
        if item.name.endswith("layernorm.weight"):
            folded[item.name] = item.source.load()
    changed = [name for name, values in folded.items() if not np.array_equal(values, source.tensors[name].load())]
    assert len(changed) > 10
    model = dataclasses.replace(
        source, tensors=source.tensors | {name: ArrayTensor(to_float32(v)) for name, v in folded.items()}
    )
    after, before = (StreamedForward(checkpoint, ids).logits() for checkpoint in (model, source))
    assert np.abs(after - before).max() < 1e-3 * np.abs(before).max()


def test_codes_are_freed_as_they_are_written(tmp_path: Path) -> None:
    """However many layers there are, no more are held than are being written."""
    source, held = small(layers=3), []
    output = registry.by_name("hf").layout(source, write_options(type="gptq-4", group_size=32))
    output, _ = calibrated(output, source, CalibrationSettings(np.load(small_ids(tmp_path))), threads=2)
    session = next(item.source.session for item in output.tensors if isinstance(item.source, CalibratedMatrix))

    class Nowhere:
        def pwrite(self, offset: int, data: object) -> None:
            held.append(len(session._rounded))

    write_output(output, {file.name: Nowhere() for file in output.files}, threads=1)
    assert max(held) <= 7
    assert not session._rounded


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    source = small()
    name = "model.layers.1.mlp.up_proj.weight"
    broken = source.tensors[name].load()
    broken[3, 5] = np.nan
    source.tensors[name] = ArrayTensor(broken, origin=name)
    with pytest.raises(Exception, match="NaN") as caught:
        written(source, tmp_path / "out", "gptq-4", group_size=32, calibration=small_ids(tmp_path))
    assert caught.value.id == "weights.nonfinite"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "extra", "expected"),
    [
        (None, {}, "calibration.type"),
        ("nf4", {"calibration_method": "textbook"}, "option.ignored"),
        ("gptq-4", {"group_size": 64, "hessian_block": 96}, "calibration.hessian-block"),
        ("gptq-4", {"group_size": 32, "calibration_length": 4096}, "calibration.length"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, kind: str | None, extra: dict, expected: str) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, SMALL.vocab_size, 480))
    with pytest.raises(UsageError) as caught:
        written(small(), tmp_path / "out", kind, calibration=ids, **extra)
    assert caught.value.id == expected


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"GGUF\3\0\0\0" * 9999, "text.binary"), (bytes(range(1, 256)) * 99, "text.encoding"), (b"", "text.empty")],
)
def test_calibration_files_without_text_are_refused(
    fixture_dir: Path, tmp_path: Path, content: bytes, code: str
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_bytes(content)
    words = [
        "quantize",
        fixture_dir / "model.ckpt",
        tmp_path / "out",
        "--type",
        "gptq-4",
        "--group-size",
        "32",
        "--calibration",
        text,
    ]
    status, message = command(*words)
    assert status == (2 if code == "text.empty" else 3) and code in message and "hint" in message
    assert not (tmp_path / "out").exists()


FINNISH = """Ohjelman teksti jaetaan ensin peräkkäisiin merkkijonoihin. Jokainen rivi päättyy rivinvaihtoon, ja
huomautus alkaa ristikkomerkillä ja jatkuu rivin loppuun. Sisennys määrää, mitkä lauseet kuuluvat yhteen: saman lohkon
lauseilla on oltava sama sisennys. Tunnisteet koostuvat kirjaimista, numeroista ja alaviivoista, mutta eivät saa alkaa
numerolla."""


@pytest.mark.parametrize("is_foreign", [True, False])
def test_a_text_in_a_language_that_the_model_does_not_know_is_named(
    is_foreign: bool, fixture_dir: Path, tmp_path: Path, logged: StringIO
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(FINNISH if is_foreign else calibration_text()[:2000])
    message = "the calibration text: perplexity"
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as trained:
        ids = read_sequences(text, trained, samples=1, length=64)
        next(output_hessians(trained, trained.tensors, ids, {}, map))  # as for GGUF's types, before anything is rounded
        assert (message in logged.getvalue()) == is_foreign
        logged.truncate(0)
        chosen = {"calibration": text, "calibration_samples": 1, "calibration_length": 64, "only": ("5.self_attn.q",)}
        written(trained, tmp_path / "out", "nf4", **chosen)
    assert (message in logged.getvalue()) == is_foreign


def test_the_length_of_sequences_that_are_given_whole(tmp_path: Path) -> None:
    """Rows have the length they have: another would be ignored. How many of them is the caller's choice."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(3, SMALL.vocab_size, (6, 32)))
    with pytest.raises(UsageError, match="have 32 tokens") as caught:
        read_sequences(ids, small(), samples=None, length=48)
    assert caught.value.id == "option.ignored"
    assert read_sequences(ids, small(), samples=4, length=32).shape == (4, 32)
    assert read_sequences(ids, small(), samples=None, length=None).shape == (6, 32)


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_command_line_tells_the_cost_first(source: Checkpoint, tmp_path: Path) -> None:
    model = written(first_layers(source, 1), tmp_path / "source", None)
    text = tmp_path / "text.txt"
    text.write_text(calibration_text()[:60_000])
    arguments = ["quantize", model, tmp_path / "out", "--type", "awq-4", "--calibration", text]
    arguments += ["--calibration-samples", "4", "--calibration-length", "128"]
    status, message = command(*arguments, "--dry-run")
    assert status == 0
    assert "calibration on 4 sequences of 128 tokens, errors weighed by the layer: about" in message
    assert "GiB of memory at its peak, " in message and "of disk" in message
    assert not (tmp_path / "out").exists()
    status, message = command(*arguments, "--dry-run", "--json", "--quiet")
    cost = json.loads(message)["calibration"]
    assert cost["sequences"] == 4
    assert cost["estimated_peak_bytes"] > 100 << 20
    assert cost["estimated_seconds"] > 0
    status, message = command(*arguments)
    assert status == 0, message
    assert json.loads((tmp_path / "out.receipt.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ["--type", "gptq-4", "--act-order"],
        ["--type", "nf4", "--calibration", "x.npy", "--calibration-method", "textbook"],
        ["--type", "w4a16", "--calibration", "x.npy", "--act-order"],
    ],
)
def test_options_that_would_do_nothing_are_refused(fixture_dir: Path, tmp_path: Path, words: list[str]) -> None:
    status, message = command("quantize", fixture_dir / "model.ckpt", tmp_path / "out", *words)
    assert status == 2
    assert "option.ignored" in message
