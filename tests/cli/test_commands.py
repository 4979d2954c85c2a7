"""The commands as a user runs them: results, exit codes, one line for every failure, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gemma2tool.cli.main import app
from gemma2tool.formats import registry
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.signals import accept_interrupts

runner = CliRunner()


def run(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    return write_checkpoint(random_checkpoint(np.dtype(ml_dtypes.bfloat16)), folder)


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Path:
    shutil.copytree(source, tmp_path / "src")
    return tmp_path


def assert_refused(result: Result, code: int, *words: str) -> None:
    """The documented exit code, and on standard error one line of error and at most one of hint, naming the words."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error", "hint"))]
    assert 1 <= len(lines) <= 2 and lines[0].startswith("error"), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in " ".join(lines), result.stderr


def test_convert_verifies_and_reports(place: Path) -> None:
    result = run("convert", place / "src", place / "out.ckpt")
    assert result.exit_code == 0, result.output
    assert "verified" in result.output
    back = run("convert", place / "out.ckpt", place / "back", "--quiet")
    assert back.exit_code == 0, back.output
    assert (place / "back" / "model.safetensors").read_bytes() == (place / "src" / "model.safetensors").read_bytes()
    receipts = ["back.receipt.json", "out.ckpt.receipt.json"]
    assert sorted(p.name for p in place.iterdir()) == sorted(["back", "out.ckpt", "src", *receipts])


def test_no_verify_says_so(place: Path) -> None:
    result = run("convert", place / "src", place / "out", "--no-verify")
    assert result.exit_code == 0 and "not verified" in result.output


def test_json_is_one_object_on_stdout(place: Path) -> None:
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q8_0", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["written"] and content["verified"]
    assert content["bytes"] == (place / "out.gguf").stat().st_size


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantize_to_a_folder(place: Path, kind: str) -> None:
    result = run("quantize", place / "src", place / "out", "--type", kind)
    assert result.exit_code == 0, result.output
    assert (
        json.loads((place / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    )


@pytest.mark.slow
def test_verify_command(place: Path) -> None:
    assert run("convert", place / "src", place / "out.gguf", "--quiet").exit_code == 0
    result = run("verify", place / "out.gguf", "--reference", place / "src")
    assert result.exit_code == 0, result.output
    with open(place / "out.gguf", "r+b") as file:
        file.seek(-40_000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-40_000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0x40]))
    result = run("verify", place / "out.gguf", "--reference", place / "src", "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["passed"]


def test_logits_of_one_and_two_dimensions(place: Path) -> None:
    from gemma2tool.reference.streaming import logits

    ids = np.random.default_rng(1).integers(0, 160, (2, 12))
    expected = logits(registry.open_checkpoint(place / "src"), ids)
    for name, array in {"one": ids[0], "two": ids.astype(np.int32)}.items():
        np.save(place / f"{name}.npy", array)
        result = run("logits", place / "src", "--tokens", place / f"{name}.npy", "--out", place / f"{name}-logits.npy")
        assert result.exit_code == 0, result.output
        found = np.load(place / f"{name}-logits.npy")
        assert found.dtype == np.float32
        reference = expected[:1] if name == "one" else expected
        assert found.shape == reference.shape
        assert np.abs(found - reference).max() <= 5e-5


def test_output_does_not_depend_on_threads_or_memory(place: Path) -> None:
    made = []
    for number, (threads, memory) in enumerate([(1, "1MiB"), (2, "64KiB"), (4, "2MiB")]):
        path = place / f"{number}" / "out.gguf"
        path.parent.mkdir()
        options = ["--threads", threads, "--memory", memory, "--no-verify"]
        assert run("quantize", place / "src", path, "--type", "q8_0", *options).exit_code == 0
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


def test_dry_run_writes_nothing_and_predicts_the_size(place: Path) -> None:
    before = listing(place)
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q4_0", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert listing(place) == before
    predicted = json.loads(result.stdout)["bytes"]
    assert run("quantize", place / "src", place / "out.gguf", "--type", "q4_0").exit_code == 0
    assert (place / "out.gguf").stat().st_size == predicted


def test_inspect_and_formats(place: Path) -> None:
    result = run("inspect", place / "src", "--tensors", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["format"] == "hf" and len(content["tensors"]) == 2 + 11 * 3
    assert run("inspect", place / "src").exit_code == 0
    result = run("formats")
    assert result.exit_code == 0 and "nf4" in result.output and "q8_0" in result.output


@pytest.mark.slow
def test_many_outputs_in_one_pass_are_the_same_files(place: Path) -> None:
    kinds = ["q8_0", "q4_0", "nf4", "f16"]
    result = run("quantize", place / "src", place / "many", "--type", ",".join(kinds))
    assert result.exit_code == 0, result.output
    for kind in kinds:
        alone = place / ("alone" if kind == "nf4" else f"alone-{kind}.gguf")
        assert run("quantize", place / "src", alone, "--type", kind, "--no-verify").exit_code == 0
        together = place / "many" / ("many-nf4" if kind == "nf4" else f"many-{kind}.gguf")
        if kind == "nf4":
            assert listing(together) == listing(alone)
        else:
            assert together.read_bytes() == alone.read_bytes()
    assert len(list((place / "many").iterdir())) == 2 * len(kinds)  # each with its receipt
    assert_refused(
        run("quantize", place / "src", place / "many", "--type", "q8_0,q6_k"), 2, "many-q8_0.gguf", "--force"
    )


def test_split_output_is_a_folder_of_shards(place: Path) -> None:
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q8_0", "--split-max-tensors", 15)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (place / "out").iterdir())
    assert names == [f"out-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert run("verify", place / "out" / names[1], "--reference", place / "src").exit_code == 0


def test_losses_are_named_by_kind_and_layer(place: Path) -> None:
    from gemma2tool.pipeline.remarks import rounding_lines

    names = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1, 2, 5)]
    lines = rounding_lines([*((name, 1e-8) for name in names), ("model.norm.weight", 2e-8)])
    assert lines == [
        "model.layers.{0-2,5}.input_layernorm.weight loses up to 1e-08",
        "model.norm.weight loses up to 2e-08",
    ]
    assert run("convert", place / "src", place / "f32", "--dtype", "f32", "--no-verify").exit_code == 0
    path = place / "f32" / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    tensors["model.layers.1.input_layernorm.weight"] += np.float32(1e-9)
    save_file(tensors, path, {"format": "pt"})
    result = run("convert", place / "f32", place / "out.gguf")
    assert result.exit_code == 0, result.output
    assert "model.layers.{1}.input_layernorm.weight loses up to" in result.stderr


# -- failures ----------------------------------------------------------------------------------------------------------


def test_existing_destination_needs_force(place: Path) -> None:
    (place / "out.gguf").write_bytes(b"mine")
    assert_refused(run("convert", place / "src", place / "out.gguf"), 2, "out.gguf", "--force")
    assert (place / "out.gguf").read_bytes() == b"mine"
    assert run("convert", place / "src", place / "out.gguf", "--force").exit_code == 0
    assert (place / "out.gguf").read_bytes()[:4] == b"GGUF"


def test_failing_verification_leaves_the_old_output(place: Path) -> None:
    (place / "out.gguf").write_bytes(b"mine")
    words = ["quantize", place / "src", place / "out.gguf", "--type", "q4_0", "--force", "--gate", "kl=0"]
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert "NOT written" in result.output
    assert (place / "out.gguf").read_bytes() == b"mine"
    assert sorted(p.name for p in place.iterdir()) == ["out.gguf", "src"]


@pytest.mark.parametrize("link", [False, True])
def test_destination_that_is_the_source(place: Path, link: bool) -> None:
    target = place / "src"
    if link:
        target = place / "link"
        target.symlink_to(place / "src")
    before = listing(place / "src")
    result = run("convert", place / "src", target, "--force")
    assert_refused(result, 2, str(target))
    assert listing(place / "src") == before


def test_hard_link_to_the_source(place: Path) -> None:
    assert run("convert", place / "src", place / "a.gguf", "--no-verify").exit_code == 0
    os.link(place / "a.gguf", place / "b.gguf")
    before = (place / "a.gguf").read_bytes()
    assert_refused(run("convert", place / "a.gguf", place / "b.gguf", "--force"), 2, "b.gguf")
    assert (place / "a.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--type", "q9_z"], 2, "q9_z"),
        (["--type", "nf4"], 2, "nf4"),
    ],
)
def test_unknown_types(place: Path, words: list[str], code: int, named: str) -> None:
    assert_refused(run("quantize", place / "src", place / "out.gguf", *words), code, named)
    assert not (place / "out.gguf").exists()


def test_gguf_type_for_a_folder(place: Path) -> None:
    assert_refused(run("quantize", place / "src", place / "out", "--type", "q8_0"), 2, "q8_0")


@pytest.mark.parametrize(
    "words", [["--dtype", "f8"], ["--to", "onnx"], ["--memory", "lots"], ["--gate", "kl"], ["--gate", "nonsense=1"]]
)
def test_options_that_make_no_sense(place: Path, words: list[str]) -> None:
    assert_refused(run("convert", place / "src", place / "out", *words), 2, words[1].split("=")[0])
    assert sorted(p.name for p in place.iterdir()) == ["src"]


def test_truncated_weights(place: Path) -> None:
    path = place / "src" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run("convert", place / "src", place / "out.gguf"), 3, "model.safetensors")
    assert sorted(p.name for p in place.iterdir()) == ["src"]


def test_flipped_bit_in_a_torch_file(place: Path) -> None:
    """The container's own checksum is checked while the bytes stream past: torch.load would not notice."""
    assert run("convert", place / "src", place / "a.ckpt", "--no-verify").exit_code == 0
    content = bytearray((place / "a.ckpt").read_bytes())
    at = content.find(
        (place / "src" / "model.safetensors").read_bytes()[-128:]
    )  # the last tensor of the safetensors file, model.norm
    assert at > 0
    content[at + 100] ^= 1
    (place / "a.ckpt").write_bytes(content)
    assert_refused(run("convert", place / "a.ckpt", place / "out.gguf"), 3, "a.ckpt", "torch.crc")
    assert sorted(p.name for p in place.iterdir()) == ["a.ckpt", "src"]


def test_git_repository_is_not_replaced(place: Path) -> None:
    (place / "repo" / ".git").mkdir(parents=True)
    assert_refused(run("convert", place / "src", place / "repo", "--force"), 2, "git")


def test_nonfinite_weights(place: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = place / "src" / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, path, {"format": "pt"})
    before = listing(place)
    for words in (
        ["quantize", place / "src", place / "out.gguf", "--type", "q8_0"],
        ["convert", place / "src", place / "out"],
    ):
        assert_refused(run(*words), 3, "model.layers.0.mlp.up_proj.weight", "weights.nonfinite")
        assert listing(place) == before
    assert run("convert", place / "src", place / "out", "--allow-nonfinite", "--no-verify").exit_code == 0


def test_f16_overflow_is_refused(place: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = place / "src" / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(tensors, path, {"format": "pt"})
    result = run("convert", place / "src", place / "out", "--dtype", "f16")
    assert_refused(result, 3, "model.layers.2.self_attn.q_proj.weight", "float16")
    assert not (place / "out").exists()


def test_missing_source(place: Path) -> None:
    assert_refused(run("convert", place / "nowhere", place / "out"), 3, "nowhere")


def test_missing_parent_of_the_destination(place: Path) -> None:
    result = run("convert", place / "src", place / "no" / "such" / "out.gguf")
    assert_refused(result, result.exit_code, "no/such")
    assert result.exit_code in (2, 4)


def test_usage_errors_exit_with_2() -> None:
    assert run("convert").exit_code == 2
    assert run("nonsense").exit_code == 2


def limited(limit: int):
    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


@pytest.mark.slow
def test_disk_that_takes_no_more(place: Path) -> None:
    """A file size limit stands in for a full disk: the write fails half way."""
    before = listing(place)
    words = [sys.executable, "-m", "gemma2tool", "convert", place / "src", place / "out.gguf", "--no-verify"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limited(50_000))
    assert done.returncode == 4, done.stderr
    assert "out.gguf" in done.stderr and "Traceback" not in done.stderr
    assert listing(place) == before
    assert sorted(p.name for p in place.iterdir()) == ["src"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing_at_the_destination(place: Path, number: int) -> None:
    words = [sys.executable, "-m", "gemma2tool", "convert", place / "src", place / "out.gguf"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts)
    deadline = time.monotonic() + 30
    while len(list(place.iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the staging place appears
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been quicker than the signal
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        left = sorted(p.name for p in place.iterdir())
        # On a slow machine tensors may have been journaled by then: they are kept, and the user is told.
        assert left == ["src"] or (left == [".out.gguf.gemma2tool-staging", "src"] and "gemma2tool clean" in errors)


# -- found by a user who tried ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(place: Path) -> None:
    words = [sys.executable, "-m", "gemma2tool", "inspect", str(place / "src"), "--tensors"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.close()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0 and not errors, errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_takes_nothing(place: Path) -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "gemma2tool", "inspect", str(place / "src")]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4 and "output.unwritable" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_a_pipe_is_no_checkpoint(place: Path) -> None:
    os.mkfifo(place / "pipe")
    assert_refused(run("inspect", place / "pipe"), 3, "pipe", "input.kind")


@pytest.mark.parametrize("name", ["x.gguf", "x.ckpt", "x.safetensors", "x.sbs"])
def test_empty_files_are_said_to_be_empty(place: Path, name: str) -> None:
    (place / name).write_bytes(b"")
    assert_refused(run("inspect", place / name), 3, name, "is empty")


@pytest.mark.parametrize("value", [2**63, -(2**63), 2**31])
def test_ids_beyond_32_bits(place: Path, value: int) -> None:
    path = place / "src" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": value}))
    assert_refused(run("convert", place / "src", place / "out.gguf"), 3, "bos_token_id")


def test_token_files_that_lie(place: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999,), }"
    bomb = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    huge = place / "huge.npy"
    np.save(huge, np.array([2**63], np.uint64))
    (place / "bomb.npy").write_bytes(bomb)
    (place / "text.npy").write_text("1 2 3")
    for name, word in (("bomb", "whole .npy"), ("text", "whole .npy"), ("huge", str(2**63))):
        result = run("logits", place / "src", "--tokens", place / f"{name}.npy", "--out", place / "l.npy")
        assert_refused(result, 3, f"{name}.npy", word)
        assert "pickle" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--type", "nf4", "--pure"],
        ["--type", "nf4", "--imatrix", "nowhere"],
        ["--type", "int8", "--double-quant"],
        ["--type", "f32"],
        ["--type", "Q8_0"],
    ],
)
def test_options_and_types_that_the_target_would_ignore(place: Path, words: list[str]) -> None:
    assert_refused(run("quantize", place / "src", place / "out", *words), 2)
    assert sorted(p.name for p in place.iterdir()) == ["src"]


def test_several_types_may_be_written_with_spaces(place: Path) -> None:
    result = run("quantize", place / "src", place / "out", "--type", "q8_0, q4_0,", "--no-verify")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (place / "out").iterdir()) == ["out-q4_0.gguf", "out-q8_0.gguf"]


@pytest.mark.parametrize("first", ["nf4", "int8"])
def test_quantizing_what_is_quantized_needs_leave(place: Path, first: str) -> None:
    assert run("quantize", place / "src", place / "once", "--type", first, "--no-verify").exit_code == 0
    words = ["quantize", place / "once", place / "twice.gguf", "--type", "q4_0"]
    assert_refused(run(*words), 2, first, "--allow-requantize")
    assert run(*words, "--allow-requantize").exit_code == 0


def test_too_many_threads(place: Path) -> None:
    assert run("convert", place / "src", place / "out", "--threads", 100_000).exit_code == 2


def test_a_lost_tokenizer_is_warned_of(place: Path) -> None:
    result = run("convert", place / "src", place / "out")
    assert result.exit_code == 0 and "no tokenizer" in result.stderr


def test_force_does_not_replace_a_folder_that_holds_no_checkpoint(place: Path) -> None:
    own = place / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    assert_refused(run("convert", place / "src", own, "--force"), 2, "own", "output.not-a-checkpoint")
    assert (own / "thesis.txt").read_text() == "years of work"
    (own / "thesis.txt").unlink()
    assert run("convert", place / "src", own, "--force", "--no-verify").exit_code == 0
    assert run("convert", place / "src", own, "--force", "--no-verify").exit_code == 0


@pytest.mark.parametrize(
    "option",
    [("--html", "x.html"), ("--junit", "x.xml"), ("--card",), ("--gate", "kl=1"), ("--text", "t.txt")],
    ids=str,
)
def test_what_no_verify_would_ignore_is_refused(place: Path, option: tuple[str, ...]) -> None:
    assert_refused(run("convert", place / "src", place / "out", "--no-verify", *option), 2, option[0], "option.ignored")


def test_no_type_is_no_quantization(place: Path) -> None:
    for nothing in ("", ","):
        assert_refused(run("quantize", place / "src", place / "out", "--type", nothing), 2, "--type", "type.missing")


def test_a_plan_needs_the_folder_that_the_run_needs(place: Path) -> None:
    command = ("convert", place / "src", place / "nowhere" / "out", "--dry-run")
    assert_refused(run(*command), 2, "nowhere", "output.no-parent")
