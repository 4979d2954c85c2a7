"""Whole GGUF files against those that llama.cpp's converter and llama-quantize wrote: keys, order, types, bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.hf.format import HuggingFace
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.gguf import described, differences, expected, options, write

pytestmark = pytest.mark.slow

CONVERTED = [
    "tiny_gqa4-auto",
    "tiny_gqa4-f32",
    "tiny_gqa4-bf16",
    "tiny_gqa4-q8_0",
    "tiny_odd-auto",
    "tiny_odd-f32",
    "tiny_odd-q8_0",
]
FILE_TYPES = [
    "COPY",
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
]
_QUANTIZED = re.compile(r"quantize/(tiny_\w+?)-f32-(.*?)(-im)?")


def check(checkpoint: Checkpoint, reference: dict, folder: Path, **parameters: object) -> None:
    (path,) = write(GGUF().layout(checkpoint, options(**parameters)), folder)
    assert not differences(described(path), reference)


@pytest.mark.parametrize("entry", CONVERTED)
def test_conversion_is_the_converters_file(oracles: Path, tmp_path: Path, entry: str) -> None:
    name, outtype = entry.rsplit("-", 1)
    with HuggingFace().open(oracles / "gguf" / name) as checkpoint:
        check(checkpoint, expected(oracles)[f"convert/{entry}"], tmp_path, dtype=outtype)


def test_every_conversion_is_listed(oracles: Path) -> None:
    assert sorted(key[8:] for key in expected(oracles) if key.startswith("convert/")) == sorted(CONVERTED)
    assert {_QUANTIZED.fullmatch(key)[2] for key in expected(oracles) if key.startswith("quantize/")} == set(FILE_TYPES)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_quantization_is_llama_quantizes_file(oracles: Path, tmp_path: Path, file_type: str) -> None:
    entries = {
        key: entry for key in expected(oracles) if (entry := _QUANTIZED.fullmatch(key)) and entry[2] == file_type
    }
    done = 0
    for key, entry in entries.items():
        extra = {"imatrix": str(oracles / "gguf" / "imatrix" / f"{entry[1]}.gguf")} if entry[3] else {}
        with HuggingFace().open(oracles / "gguf" / entry[1]) as checkpoint:
            check(checkpoint, expected(oracles)[key], tmp_path, dtype="f32", type=file_type.lower(), **extra)
        done += 1
    print(f"{file_type}: {done} of {len(entries)}")
    assert done


def _parsed(words: Iterable[str], folder: Path) -> dict[str, object]:
    """llama-quantize's options as those of ``WriteOptions.extra``."""
    extra: dict[str, object] = {}
    words = iter(words)
    for word in words:
        name = word[2:].replace("-", "_")
        if word == "--pure":
            extra["pure"] = True
        elif word == "--imatrix":
            extra["imatrix"] = str(folder / next(words))
        elif word == "--tensor-type":
            extra.setdefault("tensor_types", []).append(tuple(next(words).rsplit("=", 1)))
        elif word in ("--include-weights", "--exclude-weights", "--override-kv"):
            extra.setdefault(name, []).append(next(words))
        else:
            extra[name] = next(words)
    return extra


@pytest.fixture(scope="module")
def bf16(oracles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bf16 conversion that llama-quantize was given with options."""
    with HuggingFace().open(oracles / "gguf" / "tiny_gqa4") as checkpoint:
        return write(GGUF().layout(checkpoint, options("bf16.gguf", dtype="bf16")), tmp_path_factory.mktemp("bf16"))[0]


OPTIONS = [
    "--pure Q4_K",
    "--pure Q8_0",
    "--token-embedding-type q8_0 Q4_K_M",
    "--output-tensor-type q5_K Q4_K_M",
    "--tensor-type attn_v=q8_0 Q4_K_M",
    r"--tensor-type blk\.[0-3]\.ffn_down=q6_k --tensor-type ffn_down=q3_k Q4_K_S",
    "--imatrix imatrix/tiny_gqa4.gguf --exclude-weights ffn_down Q4_K_M",
    "--imatrix imatrix/tiny_gqa4.gguf --include-weights attn_v Q4_K_M",
    "--override-kv gemma2.context_length=int:2048 Q6_K",
    " Q4_K_M",
    " IQ4_XS",
    " Q2_K",
    " Q5_0",
    "--imatrix imatrix/tiny_gqa4.gguf Q4_K_M",
    "--imatrix imatrix/tiny_gqa4.gguf Q2_K_S",
    "--imatrix imatrix/tiny_gqa4.gguf Q3_K_M",
    "--imatrix imatrix/tiny_gqa4.gguf IQ2_M",
]


def test_every_option_is_listed(oracles: Path) -> None:
    assert sorted(key for key in expected(oracles) if key.startswith("options/")) == sorted(
        f"options/tiny_gqa4-bf16 {option}" for option in OPTIONS
    )


@pytest.mark.parametrize("source", ["hf", "gguf"])
@pytest.mark.parametrize("parameters", OPTIONS)
def test_options_from_the_original_and_from_its_gguf(
    oracles: Path, bf16: Path, tmp_path: Path, parameters: str, source: str
) -> None:
    *words, file_type = parameters.split()
    extra = _parsed(words, oracles / "gguf")
    reference = expected(oracles)[f"options/tiny_gqa4-bf16 {parameters}"]
    if source == "gguf":
        with GGUF().open(bf16) as checkpoint:
            check(checkpoint, reference, tmp_path, type=file_type.lower(), **extra)
    else:
        with HuggingFace().open(oracles / "gguf" / "tiny_gqa4") as checkpoint:
            check(checkpoint, reference, tmp_path, dtype="bf16", type=file_type.lower(), **extra)


def test_split_conversion_is_the_converters_shards(oracles: Path, tmp_path: Path) -> None:
    with HuggingFace().open(oracles / "gguf" / "tiny_gqa4") as checkpoint:
        output = GGUF().layout(checkpoint, options("split.gguf", dtype="f16", split_max_tensors=40))
        paths = write(output, tmp_path)
        assert not output.single_file
        assert [path.name for path in paths] == [f"split-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
        for path in paths:
            assert not differences(described(path), expected(oracles)[f"split-max-tensors 40 f16/{path.name}"])
        # Any shard, or the folder, opens the whole.
        for path in (tmp_path, *paths):
            with GGUF().open(path) as whole:
                assert len(whole.tensors) == 90
                for name in ("model.embed_tokens.weight", "model.norm.weight"):
                    assert whole.tensors[name].shape == checkpoint.tensors[name].shape


def test_layers_count_by_number_however_the_file_is_ordered(oracles: Path, bf16: Path, tmp_path: Path) -> None:
    """llama-quantize --keep-split counts in file order and gives other layers the better type."""
    with GGUF().open(bf16) as checkpoint:
        source = checkpoint.metadata["gguf"]
        shuffled = dict(sorted(source.tensors.items(), key=lambda item: item[0][::-1]))
        checkpoint.metadata["gguf"] = type(source)(source.kv, shuffled)
        check(checkpoint, expected(oracles)["options/tiny_gqa4-bf16  Q4_K_M"], tmp_path, type="q4_k_m")
