"""Commands that cannot be carried out: the documented exit code, one line, nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import assert_refused, listing, run


@pytest.mark.slow
def test_existing_destination_needs_force(place: Path) -> None:
    (place / "out.gguf").write_bytes(b"mine")
    assert_refused(run("convert", place / "src", place / "out.gguf"), 2, "out.gguf", "--force")
    assert (place / "out.gguf").read_bytes() == b"mine"
    assert run("convert", place / "src", place / "out.gguf", "--force").exit_code == 0
    assert (place / "out.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
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


@pytest.mark.slow
def test_hard_link_to_the_source(place: Path) -> None:
    assert run("convert", place / "src", place / "a.gguf", "--no-verify").exit_code == 0
    os.link(place / "a.gguf", place / "b.gguf")
    before = (place / "a.gguf").read_bytes()
    assert_refused(run("convert", place / "a.gguf", place / "b.gguf", "--force"), 2, "b.gguf")
    assert (place / "a.gguf").read_bytes() == before


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--dtype", "f8"], ["--to", "onnx"], ["--memory", "lots"], ["--gate", "kl"], ["--gate", "nonsense=1"]]
)
def test_options_with_invalid_values(place: Path, words: list[str]) -> None:
    assert_refused(run("convert", place / "src", place / "out", *words), 2, words[1].split("=")[0])
    assert sorted(p.name for p in place.iterdir()) == ["src"]


def test_truncated_weights(place: Path) -> None:
    path = place / "src" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run("convert", place / "src", place / "out.gguf"), 3, "model.safetensors")
    assert sorted(p.name for p in place.iterdir()) == ["src"]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("command", ["inspect", "scan", "verify", "check"])
def test_a_path_that_no_file_can_have(command: str) -> None:
    assert_refused(run(command, "x" * 300), 3, "file.missing", "too long")


def test_a_pipe_is_not_a_checkpoint(place: Path) -> None:
    os.mkfifo(place / "pipe")
    assert_refused(run("inspect", place / "pipe"), 3, "pipe", "input.kind")


@pytest.mark.parametrize("name", ["x.gguf", "x.ckpt", "x.safetensors", "x.sbs"])
def test_empty_files_are_reported_as_empty(place: Path, name: str) -> None:
    (place / name).write_bytes(b"")
    assert_refused(run("inspect", place / name), 3, name, "is empty")


@pytest.mark.parametrize("value", [2**63, -(2**63), 2**31])
def test_ids_beyond_32_bits(place: Path, value: int) -> None:
    path = place / "src" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": value}))
    assert_refused(run("convert", place / "src", place / "out.gguf"), 3, "bos_token_id")


def test_invalid_token_files(place: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("first", ["nf4", "int8"])
def test_quantizing_again_needs_allow_requantize(place: Path, first: str) -> None:
    assert run("quantize", place / "src", place / "once", "--type", first, "--no-verify").exit_code == 0
    words = ["quantize", place / "once", place / "twice.gguf", "--type", "q4_0"]
    assert_refused(run(*words), 2, first, "--allow-requantize")
    assert run(*words, "--allow-requantize").exit_code == 0


def test_too_many_threads(place: Path) -> None:
    assert run("convert", place / "src", place / "out", "--threads", 100_000).exit_code == 2


@pytest.mark.slow
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
def test_what_no_verify_would_ignore_is_refused(
    place: Path, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)  # a refused run writes its reports, too
    assert_refused(run("convert", place / "src", place / "out", "--no-verify", *option), 2, option[0], "option.ignored")


def test_an_empty_type_is_refused(place: Path) -> None:
    for nothing in ("", ","):
        assert_refused(run("quantize", place / "src", place / "out", "--type", nothing), 2, "--type", "type.missing")


def test_a_plan_needs_the_folder_that_the_run_needs(place: Path) -> None:
    command = ("convert", place / "src", place / "nowhere" / "out", "--dry-run")
    assert_refused(run(*command), 2, "nowhere", "output.no-parent")
