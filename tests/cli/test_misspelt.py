"""Values and names that are nearly right: what was meant is in the hint, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma2tool.errors import UsageError, choices
from gemma2tool.formats import registry
from gemma2tool.pipeline.output_names import check_type
from tests.support.commands import run

TYPES = [
    ("out.gguf", "q4km", "q4_k_m"),
    ("out.gguf", "Q4-K-M", "q4_k_m"),
    ("out.gguf", "int4", "q4_k_m"),
    ("out.gguf", "q8", "q8_0"),
    ("out.gguf", "iq4xs", "iq4_xs"),
    ("out", "int4", "nf4"),
    ("out", "4bit", "nf4"),
    ("out", "gptq", "gptq-4"),
    ("out", "fp8", "fp8-dynamic"),
    ("out", "q4km", "q4_k_m"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "type", "meant"), TYPES)
def test_types(source: Path, tmp_path: Path, name: str, type: str, meant: str) -> None:
    result = run("quantize", source, tmp_path / name, "--type", type)
    assert result.exit_code == 2 and f"did you mean {meant}" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (("--dtype", "bfloat16"), "bf16"),
        (("--dtype", "half"), "f16"),
        (("--to", "huggingface"), "hf"),
        (("--to", "pytorch"), "hf-bin"),
        (("--to", "gemma_cpp"), "gemma-cpp"),
        (("--gate", "kld=0.1"), "kl"),
        (("--gate", "top-1=0.9"), "top1"),
        (("--config", "27"), "27b"),
    ],
)
def test_other_values(source: Path, tmp_path: Path, options: tuple[str, str], meant: str) -> None:
    result = run("convert", source, tmp_path / "out", *options)
    assert result.exit_code in (2, 3) and f"did you mean {meant}" in result.stderr, result.stderr


def test_the_type_of_a_tensor(source: Path, tmp_path: Path) -> None:
    result = run("quantize", source, tmp_path / "out.gguf", "--type", "q4_k_m", "--tensor-type", "ffn_down=q6k")
    assert result.exit_code == 2 and "did you mean q6_k" in result.stderr


def test_a_type_of_the_other_kind_of_output(source: Path, tmp_path: Path) -> None:
    result = run("quantize", source, tmp_path / "out.gguf", "--type", "nf4")
    assert result.exit_code == 2 and "type of quantized folders" in result.stderr and "name a folder" in result.stderr


@pytest.mark.parametrize(
    ("format_name", "type_name", "words"),
    [
        ("gguf", "w4a16", "a type of quantized folders"),
        ("gguf", "mlx-4", "a type of quantized folders"),
        ("hf", "q4_k_m", "a GGUF type"),
        ("mlx", "Q4KM", "did you mean q4_k_m"),
        ("gemma-pytorch", "q8_0", "a GGUF type"),
        ("hf", "bf16", "not a quantization type"),
    ],
)
def test_a_type_of_another_family(format_name: str, type_name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        check_type(format_name, type_name)
    assert refused.value.id == "type.unknown"


@pytest.mark.parametrize(
    ("format_name", "type_name"), [("gguf", "f16"), ("gguf", "q4_k_m"), ("hf", "nf4"), ("mlx", "mlx-4"), ("hf", "nf5")]
)
def test_a_type_that_the_format_judges_itself(format_name: str, type_name: str) -> None:
    check_type(format_name, type_name)


def test_nonsense_is_not_guessed_at() -> None:
    for text in ("", "banana", "-", "zzz"):
        for names in (registry.NAMES, registry.by_name("gguf").types):
            assert choices.meant(text, names) == [], text
            long = len(names) > 20
            assert choices.hint(text, names).startswith("'gemma2tool formats' lists" if long else "choose one of ")


@pytest.mark.parametrize("text", ["q8_9", "q4km", "Q9", "int3"])
def test_a_hint_is_short(text: str) -> None:
    """The 37 types of GGUF are a command's output, not a hint."""
    hint = choices.hint(text, registry.by_name("gguf").types)
    assert len(hint) < 100 and "gemma2tool formats" in hint
    assert ("q8_0" in hint) == (text == "q8_9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("model.safetensors", (), ("is written as a folder", "such as")),
        ("out.bin", ("--to", "hf-bin"), ("is written as a folder",)),
        ("out.npz", (), ("is written as a folder",)),
        ("out.h5", ("--to", "keras"), ("is written as a folder",)),
        ("out.txt", (), ("is written as a folder",)),
        ("out.gguf", ("--to", "hf"), ("is written as a folder",)),
        ("out.gguf.gz", (), ("archives are not written", "out.gguf, then pack it")),
        ("out.tar.gz", (), ("archives are not written",)),
        ("out.ckpt", ("--to", "gguf"), ("is written as .gguf", "out.gguf")),
        ("out.bin", ("--to", "gguf"), ("is written as .gguf",)),
        ("-", (), ("standard output",)),
    ],
)
def test_a_name_that_the_output_cannot_have(
    source: Path, tmp_path: Path, name: str, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = run("convert", source, tmp_path / name, *options)
    assert result.exit_code == 2 and "output.kind" in result.stderr
    for word in words:
        assert word in result.stderr.replace("\n", " "), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-2.5", "v1.bf16", "out", "GEMMA.GGUF", "model"])
def test_names_with_a_dot_are_names(source: Path, tmp_path: Path, name: str) -> None:
    assert run("convert", source, tmp_path / name, "--dry-run").exit_code == 0


def test_several_types(source: Path, tmp_path: Path) -> None:
    """--type twice means both, as with a comma."""
    result = run("quantize", source, tmp_path / "out", "--type", "q8_0", "--type", "q4_0,q8_0", "--dry-run")
    assert result.exit_code == 0 and "out-q8_0.gguf" in result.stdout and "out-q4_0.gguf" in result.stdout


@pytest.mark.slow
def test_an_option_that_takes_one_value_is_not_given_two(source: Path, tmp_path: Path) -> None:
    for options in (("--dtype", "f16", "--dtype", "bf16"), ("--to", "mlx", "--to", "hf")):
        result = run("convert", source, tmp_path / "out", *options, "--dry-run")
        assert result.exit_code == 2 and f"{options[0]} is given twice" in result.stderr.replace("\n", " ")
    assert run("convert", source, tmp_path / "out", "-q", "-q", "--dry-run").exit_code == 0
