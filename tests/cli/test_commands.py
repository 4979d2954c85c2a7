"""The commands as a user runs them: their results, and what they report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.commands import assert_refused, listing, run


@pytest.mark.slow
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


@pytest.mark.slow
def test_json_is_one_object_on_stdout(place: Path) -> None:
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q8_0", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["written"] and content["verified"]
    assert content["bytes"] == (place / "out.gguf").stat().st_size


@pytest.mark.slow
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


@pytest.mark.slow
def test_logits_of_one_and_two_dimensions(place: Path) -> None:
    from gemma2tool.reference.streaming import logits

    ids = np.random.default_rng(1).integers(0, 160, (2, 12))
    expected = logits(registry.open_checkpoint(place / "src"), ids)
    for name, array in {"one": ids[0], "two": ids.astype(np.int32)}.items():
        np.save(place / f"{name}.npy", array)
        result = run("logits", place / "src", "--tokens", place / f"{name}.npy", "--out", place / f"{name}-logits.npy")
        assert result.exit_code == 0, result.output
        saved = np.load(place / f"{name}-logits.npy")
        assert saved.dtype == np.float32
        reference = expected[:1] if name == "one" else expected
        assert saved.shape == reference.shape
        assert np.abs(saved - reference).max() <= 5e-5


@pytest.mark.slow
def test_output_does_not_depend_on_threads_or_memory(place: Path) -> None:
    outputs = []
    for number, (threads, memory) in enumerate([(1, "1MiB"), (2, "64KiB"), (4, "2MiB")]):
        path = place / f"{number}" / "out.gguf"
        path.parent.mkdir()
        options = ["--threads", threads, "--memory", memory, "--no-verify"]
        assert run("quantize", place / "src", path, "--type", "q8_0", *options).exit_code == 0
        outputs.append(path.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.slow
def test_dry_run_writes_nothing_and_predicts_the_size(place: Path) -> None:
    before = listing(place)
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q4_0", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert listing(place) == before
    predicted = json.loads(result.stdout)["bytes"]
    assert run("quantize", place / "src", place / "out.gguf", "--type", "q4_0").exit_code == 0
    assert (place / "out.gguf").stat().st_size == predicted


@pytest.mark.slow
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


@pytest.mark.slow
def test_split_output_is_a_folder_of_shards(place: Path) -> None:
    result = run("quantize", place / "src", place / "out.gguf", "--type", "q8_0", "--split-max-tensors", 15)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (place / "out").iterdir())
    assert names == [f"out-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert run("verify", place / "out" / names[1], "--reference", place / "src").exit_code == 0


@pytest.mark.slow
def test_what_norms_lose_is_one_line(place: Path) -> None:
    from gemma2tool.pipeline.remarks import rounding

    assert rounding([("a", 1e-8), ("b", 2e-8)]) == "2 norms lose up to 2e-08 (--json lists them)"
    assert run("convert", place / "src", place / "f32", "--dtype", "f32", "--no-verify").exit_code == 0
    path = place / "f32" / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = {name: np.array(tensor) for name, tensor in load_file(path).items()}
    tensors["model.layers.1.input_layernorm.weight"] += np.float32(1e-9)
    save_file(tensors, path, {"format": "pt"})
    result = run("convert", place / "f32", place / "out.gguf")
    assert result.exit_code == 0, result.output
    assert sum("stores w + 1 of a norm w: 1 norm loses up to" in line for line in result.stderr.splitlines()) == 1


def test_several_types_may_be_written_with_spaces(place: Path) -> None:
    result = run("quantize", place / "src", place / "out", "--type", "q8_0, q4_0,", "--no-verify")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (place / "out").iterdir()) == ["out-q4_0.gguf", "out-q8_0.gguf"]


@pytest.mark.slow
def test_a_lost_tokenizer_gets_a_warning(place: Path) -> None:
    result = run("convert", place / "src", place / "out")
    assert result.exit_code == 0 and "no tokenizer" in result.stderr


@pytest.mark.slow
def test_a_passing_conversion_fits_on_one_screen(fixture_dir: Path, tmp_path: Path) -> None:
    """The verdict first, at most twelve lines; -v has the gates, -q one line, several outputs one table."""
    source = fixture_dir / "model.ckpt"
    result = run("quantize", source, tmp_path / "a.gguf", "--type", "q4_k_m")
    lines = result.stdout.splitlines()
    assert lines[0] == "PASSED: the same model, within q4_k tolerance" and len(lines) <= 12
    assert any(line.startswith("quality: KL 0.00") for line in lines) and lines[-1].startswith("next: llama-cli -m ")
    assert not any(line.startswith(("\u2713", "\u00b7")) for line in lines)
    result = run("quantize", source, tmp_path / "a.gguf", "--type", "q4_k_m", "--force", "-v")
    assert sum(line.startswith("\u2713 ") for line in result.stdout.splitlines()) >= 5
    result = run("quantize", source, tmp_path / "several", "--type", "q4_k_m,q8_0", "-q")
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["PASSED", "PASSED"]
    result = run("quantize", source, tmp_path / "several", "--type", "q4_k_m,q8_0", "--force")
    assert "bits/weight" in result.stdout and len(result.stdout.splitlines()) <= 12


@pytest.mark.slow
def test_help_and_version_by_every_spelling() -> None:
    whole = run("--help").stdout
    assert run("-h").stdout == run("help").stdout == whole
    assert run("help", "verify").stdout == run("verify", "-h").stdout
    assert run("-V").stdout == run("version").stdout == run("--version").stdout
    assert run("help", "verfy").exit_code == 2
    assert "\nVerification:\n" in run("quantize", "-h").stdout and "\nGGUF:\n" in run("quantize", "-h").stdout


def test_inspect_lists_the_tensors_that_match(place: Path) -> None:
    result = run("inspect", place / "src", "--match", r"layers\.0\.mlp", "--json")
    assert {row["name"].split(".")[3] for row in json.loads(result.stdout)["tensors"]} == {"mlp"}
    assert_refused(run("inspect", place / "src", "--match", "("), 2, "--match", "option.regex")
