"""The GGUF header reader and writer compared with gguf-py's, and hostile GGUF files."""

from __future__ import annotations

import struct
import time
from array import array
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma2tool.containers import gguf as container
from gemma2tool.containers.gguf import GGUFValue
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.hostile.gguf import ARCH, CASES, F32, STR, U8, U16, arr, file, kv, tensor, text
from tests.support.hostile.refusal import Hostile, as_params, assert_refused

TYPES = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "I8")]


def _library_file(path: Path, *, alignment: int | None = None) -> dict[str, tuple]:
    """Writes a file with gguf-py with every value type. Returns its tensors as (dims innermost first, type, bytes)."""
    writer = gguf.GGUFWriter(path, "gemma2")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "grüße\n\0end")
    writer.add_array("texts", ["", "a", "▁b", "\U0001f600"])
    writer.add_array("ints", [-1, 0, 7])
    writer.add_array("floats", [0.5, -0.0, float("inf")])
    writer.add_array("truths", [True, False, True])
    writer.add_key_value("types", b"\1\2\3", gguf.GGUFValueType.ARRAY)
    writer.add_key_value("shorts", [1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT16)
    rng = np.random.default_rng(0)
    tensors = {}
    for index, kind in enumerate(TYPES):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
        name = f"blk.{index}.weight"
        writer.add_tensor(name, raw, raw_dtype=kind)
        tensors[name] = (512, 3), int(kind), raw.tobytes()
    odd = rng.standard_normal(5).astype(np.float32)
    writer.add_tensor("odd", odd)
    tensors["odd"] = (5,), 0, odd.tobytes()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("alignment", [None, 64])
def test_reads_and_rewrites_files_of_the_library(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "model.gguf"
    tensors = _library_file(path, alignment=alignment)
    data = path.read_bytes()
    header = container.read_header(path, GGML_BLOCKS)
    assert (header.version, header.alignment, header.file_size) == (3, alignment or 32, len(data))
    entries = {
        t.name: (t.dims, t.type_id, data[t.offset : t.offset + t.nbytes]) for t in header.tensors.values()
    }  # fmt: skip
    assert entries == tensors

    again, offsets, size = container.encode_header(
        list(header.kv.items()),
        [(t.name, t.dims, t.type_id, t.nbytes) for t in header.tensors.values()],
        header.alignment,
    )
    assert data.startswith(again)
    assert size == len(data)
    assert offsets == {t.name: t.offset for t in header.tensors.values()}


def test_values_equal_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    _library_file(path)
    reader = gguf.GGUFReader(path)
    header = container.read_header(path, GGML_BLOCKS)
    assert [key for key in reader.fields if not key.startswith("GGUF.")] == list(header.kv)
    for key, value in header.kv.items():
        field = reader.fields[key]
        assert value.type == field.types[0]
        assert value.element_type == (field.types[-1] if value.type == container.ARRAY else None)
        got = value.value.tolist() if isinstance(value.value, array) else value.value
        assert got == field.contents()


def test_library_reads_encoded_headers(tmp_path: Path) -> None:
    values = [
        ("general.architecture", GGUFValue(container.STRING, None, "gemma2")),
        ("tokens", GGUFValue(container.ARRAY, container.STRING, ["a", "▁b"])),
        ("scores", GGUFValue(container.ARRAY, container.FLOAT32, array("f", [0.0, -1.5]))),
        ("flag", GGUFValue(container.BOOL, None, True)),
    ]
    header, offsets, size = container.encode_header(values, [("w", (4, 2), 0, 32), ("v", (3,), 0, 12)])
    out = bytearray(size)
    out[: len(header)] = header
    out[offsets["w"] : offsets["w"] + 32] = np.arange(8, dtype=np.float32).tobytes()
    out[offsets["v"] : offsets["v"] + 12] = np.arange(3, dtype=np.float32).tobytes()
    path = tmp_path / "written.gguf"
    path.write_bytes(out)
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokens"].contents() == ["a", "▁b"]
    assert reader.fields["scores"].contents() == [0.0, -1.5]
    assert np.array_equal(reader.tensors[0].data, np.arange(8, dtype=np.float32).reshape(2, 4))
    assert np.array_equal(reader.tensors[1].data, np.arange(3, dtype=np.float32))


def test_block_sizes_equal_those_of_the_library() -> None:
    expected = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    expected[int(gguf.GGMLQuantizationType.Q8_1)] = (
        32,
        36,
    )  # ggml's block_q8_1: two float16 and 32 codes; gguf-py 0.19 is outdated
    expected |= {41: (128, 18), 42: (64, 18)}  # Q1_0 and Q2_0 of newer releases of ggml
    assert expected == GGML_BLOCKS


def test_oracle_files_are_rewritten_byte_for_byte(oracles: Path) -> None:
    for name in ("checkpoints/gguf/hd.gguf", "checkpoints/gguf/27b.gguf", "gguf/imatrix/tiny_gqa4.gguf"):
        header = container.read_header(oracles / name, GGML_BLOCKS)
        again, _, size = container.encode_header(
            list(header.kv.items()), [(t.name, t.dims, t.type_id, t.nbytes) for t in header.tensors.values()]
        )
        data = (oracles / name).read_bytes()
        assert data.startswith(again)
        assert size == len(data)


@pytest.mark.slow
def test_a_vocabulary_of_256000_is_read_in_two_seconds(tmp_path: Path) -> None:
    tokens = [f"▁token{i}" for i in range(256_000)]
    values = [
        ("tokenizer.ggml.tokens", GGUFValue(container.ARRAY, container.STRING, tokens)),
        ("tokenizer.ggml.scores", GGUFValue(container.ARRAY, container.FLOAT32, array("f", range(256_000)))),
    ]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(container.encode_header(values, [])[0])
    begin = time.process_time()
    header = container.read_header(path, GGML_BLOCKS)
    assert time.process_time() - begin < 2
    assert header.kv["tokenizer.ggml.tokens"].value == tokens


@pytest.mark.slow
@as_params(CASES)
def test_hostile_file_is_refused(case: Hostile, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(case.data)
    assert_refused(lambda: container.read_header(path, GGML_BLOCKS), case.id)


@pytest.mark.parametrize(
    "data",
    [
        file([ARCH]),
        file([ARCH], version=2),
        file([ARCH])[:-1],  # without tensors there is no padding
        file([ARCH], [tensor()], bytes(32)),
        file([ARCH], [tensor(dims=(5,))], bytes(20)),  # the last tensor's padding is missing
        file([ARCH], [tensor(dims=(5,))], bytes(32)),
        file([ARCH], [tensor(dims=())], bytes(32)),
        file([ARCH], [tensor(dims=(0, 3)), tensor("b")], bytes(32)),
        file([ARCH], [tensor("../../etc/x\x1b[2J\n")], bytes(32)),
        file([ARCH, arr("empty", STR, 0), arr("none", F32, 0)]),
        file(
            [kv("general.alignment", 4, struct.pack("<I", 8)), ARCH],
            [tensor(dims=(2,)), tensor("b", offset=8)], bytes(40), alignment=8,
        ),
    ],
)  # fmt: skip
def test_harmless_oddities_are_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    header = container.read_header(path, GGML_BLOCKS)
    assert all(t.offset + t.nbytes <= header.file_size for t in header.tensors.values())


def test_text_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(
        file([kv("text", STR, text(b"\xff\xfe")), arr("texts", STR, 1, text(b"a\x80")), arr("bytes", U8, 1, b"\x80")])
    )
    header = container.read_header(path, GGML_BLOCKS)
    assert header.kv["text"].value.encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert path.read_bytes().startswith(container.encode_header(list(header.kv.items()), [])[0].rstrip(b"\0"))


def test_only_types_known_to_the_caller_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file([ARCH], [tensor(type_id=0)], bytes(32)))
    assert_refused(lambda: container.read_header(path, {1: (1, 2)}), "gguf.tensor-type")


def test_array_of_int8_keeps_its_type(tmp_path: Path) -> None:
    """A file may store its scores as int8; the caller must be able to see that."""
    path = tmp_path / "model.gguf"
    path.write_bytes(file([arr("scores", 1, 2, b"\xff\1"), arr("shorts", U16, 1, b"\1\0")]))
    value = container.read_header(path, GGML_BLOCKS).kv["scores"]
    assert (value.element_type, list(value.value)) == (container.INT8, [-1, 1])


def test_encoding_refuses_what_cannot_be_read_back() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        container.encode_header([], [("a", (1,), 0, 4), ("a", (1,), 0, 4)])
    with pytest.raises(ValueError, match="type"):
        container.encode_header([("a", GGUFValue(99, None, 1))], [])
