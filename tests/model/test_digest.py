"""The semantic hash: its definition computed another way, and equality across formats, types, layouts, threads and
files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.containers import tokenizer_model
from gemma2tool.formats import registry
from gemma2tool.model import digest as digests
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.digest import Hashes, chunk_digests, chunk_rows, hash_checkpoint, hash_tensors, tensor_digest
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor, LazyTensor
from gemma2tool.verify.compare.tensors import compare_tensors
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.formats import suffix_of, write_as

BF16 = np.dtype(ml_dtypes.bfloat16)
runner = CliRunner()


def plainly(values: list[float | int], shape: tuple[int, ...], kind: str) -> str:
    """The definition of a tensor's digest, value by value; ``values`` are the bits of type ``kind``, "<H" (bfloat16),
    "<I" or "<Q".
    """
    row = 1
    for dim in shape[1:]:
        row *= dim
    step = max(131072 // row, 1) * row
    chunk_digests = b""
    for first in range(0, len(values), step):
        chunk = values[first : first + step]
        if kind == "<Q":
            singles = [struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]) for bits in chunk]
            back = [struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", single)[0]))[0] for single in singles]
            kind_of_chunk, bits = (
                ("<I", [struct.unpack("<I", single)[0] for single in singles]) if back == chunk else (kind, chunk)
            )
        elif kind == "<H":
            kind_of_chunk, bits = "<I", [half << 16 for half in chunk]
        else:
            kind_of_chunk, bits = kind, chunk
        if kind_of_chunk == "<I" and all(single & 0xFFFF == 0 for single in bits):
            kind_of_chunk, bits = "<H", [single >> 16 for single in bits]
        data = b"".join(struct.pack(kind_of_chunk, value) for value in bits)
        chunk_digests += hashlib.sha256(data + bytes([struct.calcsize(kind_of_chunk)])).digest()
    head = "gemma2tool tensor 1\n" + "x".join(str(dim) for dim in shape) + "\n"
    return hashlib.sha256(head.encode() + chunk_digests).hexdigest()


def digest(array: np.ndarray) -> str:
    return hash_tensors({"t": ArrayTensor(array)})["t"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (300, 500), (2, 135_000), (5, 3, 2)])
def test_the_definition_computed_another_way(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).standard_normal(shape)
    single, half = values.astype(np.float32), values.astype(BF16)
    for array, unsigned, kind in ((values, np.uint64, "<Q"), (single, np.uint32, "<I"), (half, np.uint16, "<H")):
        array = np.asarray(array)
        bits = array.reshape(-1).view(unsigned).tolist()
        assert digest(array) == plainly(bits, shape, kind), array.dtype


def test_known_digests() -> None:
    """The definition never changes under its name."""
    ramp = np.arange(-3, 4, dtype=np.float32).reshape(7, 1) / 3
    assert digest(ramp) == "03da05d1ffb8334a62442ce346d9548802dd1908a4ce22d09884fda0a2c2b1cb"
    six = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(six) == "823af000ddaa0045ef660a05d03b0a50e947b2b1f3a539b847b62638a3d64507"


@pytest.mark.parametrize("narrow", [np.dtype(np.float16), BF16, np.dtype(np.float32)])
def test_the_stored_type_does_not_matter(narrow: np.dtype) -> None:
    values = np.random.default_rng(0).standard_normal((40, 33)).astype(narrow)
    expected = digest(values)
    assert digest(values.astype(np.float32)) == expected
    assert digest(values.astype(np.float64)) == expected


def test_every_float16_and_bfloat16_has_one_digest_in_every_type() -> None:
    """All 65536 of each, NaN and infinities included; widened, a signalling NaN of float16 is quiet."""
    bits = np.arange(65536, dtype=np.uint16)
    brain = bits.view(BF16)
    assert digest(brain) == digest((bits.astype(np.uint32) << 16).view(np.float32))
    half = bits.view(np.float16)
    wide = half.astype(np.float32)
    quiet = wide.view(np.uint32) | np.where(np.isnan(wide), np.uint32(1 << 22), np.uint32(0))
    assert digest(half) == digest(quiet.view(np.float32))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 9_999), st.integers(0, 31), st.sampled_from(["f32", "bf16", "f64", "f16"]))
def test_any_flipped_bit_changes_the_digest(place: int, bit: int, kind: str) -> None:
    dtype = {"f32": np.dtype(np.float32), "bf16": BF16, "f64": np.dtype(np.float64), "f16": np.dtype(np.float16)}[kind]
    values = np.random.default_rng(5).standard_normal((100, 100)).astype(dtype)
    before = digest(values)
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    values.reshape(-1).view(unsigned)[place] ^= unsigned(1) << unsigned(bit % (8 * dtype.itemsize))
    assert digest(values) != before


def test_what_counts_and_what_does_not() -> None:
    zeros = np.zeros((4, 6), np.float32)
    minus = zeros.copy()
    minus[3, 5] = -0.0
    assert digest(minus) != digest(zeros), "-0.0 is another value"
    payload = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert digest(payload[:1]) != digest(payload[1:]), "so is another NaN"
    assert digest(zeros.reshape(6, 4)) != digest(zeros), "and another shape"
    assert digest(np.array([1 / 3])) != digest(np.array([1 / 3], np.float32)), (
        "float64 counts where float32 cannot hold it"
    )
    next_up = np.nextafter(np.float32(1), np.float32(2))
    assert digest(np.array([next_up])) != digest(np.array([1], np.float32)), "and one unit in the last place"


def test_swapped_rows_and_chunks_change_the_digest() -> None:
    values = np.random.default_rng(1).standard_normal((1024, 512)).astype(np.float32)
    assert chunk_rows(512) == 256
    turned = np.concatenate([values[256:512], values[:256], values[512:]])
    assert digest(turned) != digest(values)


class Watched(LazyTensor):
    """Notes the largest range anyone asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.stored, self.origin = array, array.shape, array.dtype, "f32", "watched"
        self.largest = 0

    def load_rows(self, first: int, last: int) -> np.ndarray:
        self.largest = max(self.largest, (last - first) * self.row_size)
        return np.array(self.array[first:last])


def test_threads_change_nothing_and_no_more_than_a_chunk_is_read_at_once() -> None:
    tensor = Watched(np.random.default_rng(2).standard_normal((2000, 300)).astype(np.float32))
    alone = hash_tensors({"t": tensor}, threads=1)
    assert hash_tensors({"t": tensor}, threads=4) == alone
    assert tensor.largest <= digests.CHUNK_VALUES


def test_ranges_in_any_order_give_the_same_chunks() -> None:
    """Whoever reads rows for another purpose can hash them, wherever it begins a chunk."""
    values = np.random.default_rng(4).standard_normal((700, 1000)).astype(BF16)
    step = chunk_rows(1000)
    parts = {first: chunk_digests(values[first : first + 2 * step]) for first in reversed(range(0, 700, 2 * step))}
    assert tensor_digest((700, 1000), b"".join(parts[first] for first in sorted(parts))) == digest(values)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, np.dtype(np.float32)), (np.dtype(np.float32), BF16)])
def test_the_tensors_gate_gives_both_sides_digests(dtypes: tuple[np.dtype, np.dtype]) -> None:
    source = random_checkpoint(np.dtype(dtypes[0])).tensors
    candidate = {name: ArrayTensor(tensor.load().astype(dtypes[1])) for name, tensor in source.items()}
    candidate["model.norm.weight"].array[3] += dtypes[1].type(1)
    source_digests, candidate_digests = hash_tensors(source), hash_tensors(candidate)
    for tensor in compare_tensors(source, candidate, threads=2):
        assert (tensor.source_digest, tensor.candidate_digest) == (
            source_digests[tensor.name],
            candidate_digests[tensor.name],
        ), tensor.name


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "nf4"])
def test_the_tensors_gate_gives_digests_of_quantized_values(tmp_path: Path, kind: str) -> None:
    source = random_checkpoint(BF16)
    path = write_checkpoint(source, tmp_path / ("out" if kind == "nf4" else "out.gguf"), type=kind)
    with registry.open_checkpoint(path) as candidate:
        comparisons = {tensor.name: tensor for tensor in compare_tensors(source.tensors, candidate.tensors)}
        assert {name: tensor.candidate_digest for name, tensor in comparisons.items()} == hash_tensors(
            candidate.tensors
        )
        assert {name: tensor.source_digest for name, tensor in comparisons.items()} == hash_tensors(source.tensors)


EXACT = [name for name in registry.NAMES if name != "maxtext"]
"""MaxText stores scaled embeddings and queries: other values, which have another digest."""


@pytest.fixture(scope="module")
def fixture_hashes(fixture_dir: Path) -> Hashes:
    with registry.open_checkpoint(fixture_dir) as fixture:
        return hash_checkpoint(fixture, threads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in EXACT), *((name, "f32") for name in ("hf", "gguf", "gemma-pytorch"))]
)
def test_every_format_and_stored_type_has_the_fixtures_digest(
    tmp_path: Path, fixture_dir: Path, fixture_hashes: Hashes, name: str, dtype: str | None
) -> None:
    suffix = suffix_of(name)
    with registry.open_checkpoint(fixture_dir) as fixture:
        path = write_as(name, fixture, tmp_path / f"out{suffix}", dtype=dtype)
        with registry.open_checkpoint(path, config=fixture.config if name == "flax" else None) as candidate:
            digest_of_file = hash_checkpoint(candidate, threads=2)
    assert digest_of_file.each == fixture_hashes.each
    assert (digest_of_file.model, digest_of_file.config) == (fixture_hashes.model, fixture_hashes.config)
    assert digest_of_file.tokenizer in (fixture_hashes.tokenizer, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "gguf", "keras"])
def test_sharding_does_not_matter(tmp_path: Path, fixture_dir: Path, fixture_hashes: Hashes, name: str) -> None:
    split = {"split_max_tensors": 9} if name == "gguf" else {"max_shard_size": 3_000_000}
    with registry.open_checkpoint(fixture_dir) as fixture:
        path = write_as(name, fixture, tmp_path / "out", **split)
    files = [file for file in path.rglob("*") if file.suffix in (".safetensors", ".gguf", ".h5", ".bin")]
    assert len(files) > 2
    with registry.open_checkpoint(path) as candidate:
        assert hash_checkpoint(candidate).model == fixture_hashes.model


ORACLES = {
    "hd": [
        "hf/hd",
        "gemma_pytorch/hd",
        "gemma_pytorch/hd_sharded",
        "gemma_pytorch/hd_bf16",
        "keras/hd",
        "keras/hd_bf16",
        "mlx/hd",
        "flax/orbax-0.12-hd_T",
        "flax/orbax-0.12-hd_N",
        "flax/orbax-0.5-hd_T",
        "flax/orbax-0.5-hd_N",
        "gguf/hd.gguf",
    ],
    "27b": [
        "hf/27b",
        "gemma_pytorch/27b",
        "gemma_pytorch/27b_sharded",
        "gemma_pytorch/27b_bf16",
        "mlx/27b",
        "torchtune/27b",
        "litgpt/27b",
        "keras/sharded",
        "flax/orbax-0.12-27b_N",
        "flax/orbax-0.12-27b_T_bf16",
        "flax/orbax-0.5-27b_N",
        "flax/orbax-0.5-27b_T_bf16",
        "gguf/27b.gguf",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("flavour", list(ORACLES))
def test_peers_files_of_one_model_have_one_digest(oracles: Path, flavour: str) -> None:
    """All but the quantized (gemma_pytorch/*_int8, mlx/hd_q4), whose values are others."""
    folder = oracles / "checkpoints"
    with registry.open_checkpoint(folder / "hf" / flavour) as truth:
        config, expected = truth.config, hash_checkpoint(truth)
    for name in ORACLES[flavour]:
        with registry.open_checkpoint(folder / name, config=_config(name, config)) as peer:
            assert hash_tensors(peer.tensors) == expected.each, name


def _config(name: str, config):
    return config if name.startswith(("flax", "gemma_pytorch", "litgpt", "torchtune")) else None


def test_the_config_counts_as_the_arithmetic_sees_it() -> None:
    def of(**changes: object) -> str:
        return digests.config_digest(replace(SMALL, **changes))

    assert of(use_cache=False, dtype="float16", bos_token_id=None, extra={"a": 1}) == of()
    assert of(rms_norm_eps=float(np.float32(1e-6))) == of(rms_norm_eps=1e-6), "GGUF keeps it in float32"
    assert of(use_bidirectional_attention=False) == of(use_bidirectional_attention=None)
    different = {
        of(),
        of(sliding_window=9),
        of(rms_norm_eps=1e-5),
        of(attn_logit_softcapping=None),
        of(query_pre_attn_scalar=31),
    }
    assert len(different) == 5


def test_the_model_digest_holds_tensors_and_config() -> None:
    one = random_checkpoint(BF16)
    other = Checkpoint(one.path, one.facts, replace(one.config, sliding_window=7), one.tensors)
    first, second = hash_checkpoint(one), hash_checkpoint(other)
    assert first.tensors == second.tensors and first.model != second.model
    lines = "".join(f"{first.each[name]}  {name}\n" for name in sorted(first.each))
    assert hashlib.sha256(lines.encode()).hexdigest() == first.tensors


def test_the_tokenizer_counts_as_what_it_encodes_with(fixture_dir: Path) -> None:
    """The definition from the parsed protocol buffer; a changed text, score or kind changes it, the trainer's remarks
    don't.
    """
    data = (fixture_dir / "tokenizer.model").read_bytes()
    pieces = tokenizer_model.parse(data).pieces

    def plainly(pieces: Sequence[tokenizer_model.Piece]) -> str:
        texts = [piece.text.replace("\u2581", " ").encode() for piece in pieces]
        message = f"gemma2tool tokenizer 1\n{len(pieces)}\n".encode()
        message += b"".join(struct.pack("<I", len(text)) for text in texts) + b"".join(texts)
        message += b"".join(struct.pack("<f", piece.score) for piece in pieces)
        return hashlib.sha256(
            message + bytes(piece.type == kind for kind in (2, 3, 5, 6) for piece in pieces)
        ).hexdigest()

    def digest_of(data: bytes) -> str:
        assets = file_assets({"tokenizer.model": data})
        return digests.tokenizer_digest(Checkpoint(Path("side"), FormatFacts("memory"), SMALL, {}, assets))

    original = digest_of(data)
    assert original == plainly(pieces)
    text = pieces[1500].text.encode()
    renamed = data.replace(b"\n%c%s\x15" % (len(text), text), b"\n%c%s\x15" % (len(text), b"x" * len(text)))
    assert digest_of(renamed) not in (original, None)
    score = struct.pack("<f", pieces[1500].score)
    rescored = data.replace(b"\x15" + score, b"\x15" + struct.pack("<f", pieces[1500].score - 0.5))
    assert digest_of(rescored) not in (original, None)
    assert digest_of(b"no tokenizer") is None


@pytest.mark.slow
def test_the_command(tmp_path: Path, fixture_dir: Path, fixture_hashes: Hashes) -> None:
    result = runner.invoke(app, ["hash", str(fixture_dir), "--tensors", "--quiet"])
    assert result.exit_code == 0, result.output
    assert f"model      {fixture_hashes.model}" in result.stdout.splitlines()
    listed = [line for line in result.stdout.splitlines() if line.endswith(".weight")]
    assert hashlib.sha256("".join(f"{line}\n" for line in listed).encode()).hexdigest() == fixture_hashes.tensors
    content = json.loads(runner.invoke(app, ["hash", str(fixture_dir), "--json", "--quiet"]).stdout)
    assert content["model"] == fixture_hashes.model and content["algorithm"] == "gemma2tool-1" and "each" not in content
    missing = runner.invoke(app, ["hash", str(tmp_path / "nothing")])
    assert missing.exit_code == 3
