"""Planted mistakes are found without the source, and named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.containers import gguf
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import TINY
from tests.support.planted.faults import FAULTS, Victim
from tests.support.planted.trials import planted, sources
from tests.support.sanity import NAMED


@pytest.fixture(scope="module")
def fixture() -> Victim:
    return sources(["fixture"], TINY / "model.ckpt")["fixture"]


def ids(checkpoint: Checkpoint | Path) -> list[str]:
    return [finding.id for finding in api.check(checkpoint).findings if finding.severity != "note"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_is_named(fixture: Victim, name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    pair = planted((fault,), fixture)
    assert pair is not None
    assert NAMED[name] in [finding.id for finding in api.check(pair[1].checkpoint("hf")).findings]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "id"), [(1, "norm.plus-one"), (2, "norm.plus-one"), (-1, "norm.minus-one")])
def test_a_one_too_much_in_a_gguf_is_proven_by_exact_values(
    fixture: Victim, tmp_path: Path, one: float, id: str
) -> None:
    """Also in one norm alone, which no statistic shows."""
    victim = fixture.copy()
    name = "model.layers.3.post_attention_layernorm.weight"
    victim.arrays[name] = victim.arrays[name].astype(np.float32) + np.float32(one)
    path = write_checkpoint(victim.checkpoint(), tmp_path / "x.gguf")
    result = api.check(path)
    assert [(finding.id, finding.severity, finding.where) for finding in result.findings] == [
        (id, "error", "post_attention_layernorm of layer 3")
    ]


@pytest.mark.slow
def test_feed_forward_norms_exchanged_as_in_torchtune(fixture: Victim) -> None:
    victim = fixture.copy()
    for layer in victim.layers:
        pre, post = (victim.name(f"{kind}_feedforward_layernorm", layer) for kind in ("pre", "post"))
        victim.arrays[pre], victim.arrays[post] = victim.arrays[post], victim.arrays[pre]
    (finding,) = api.check(victim.checkpoint("hf")).findings
    assert finding.id == "norm.exchanged" and "torchtune 0.5 and 0.6" in finding.message


@pytest.mark.slow
def test_exchanged_norms_are_seen_through_a_quantization(fixture: Victim, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.name == "attention_norms_swapped")
    pair = planted((fault,), fixture)
    assert pair is not None
    path = write_checkpoint(pair[1].checkpoint(), tmp_path / "x.gguf", type="q4_0")
    assert ids(path) == ["norm.exchanged"]


@pytest.mark.slow
def test_zero_and_constant_matrices(fixture: Victim) -> None:
    victim = fixture.copy()
    victim.arrays[victim.name("o_proj", 2)][:] = 0
    victim.arrays[victim.name("up_proj", 1)][:] = 0.25
    assert sorted(ids(victim.checkpoint("hf"))) == ["tensor.constant", "tensor.zero"]


@pytest.mark.slow
def test_a_flipped_bit_of_the_exponent(fixture: Victim) -> None:
    victim = fixture.copy()
    victim.arrays[victim.name("q_proj", 2)][5, 6] = 1e30
    (finding,) = api.check(victim.checkpoint("hf")).findings
    assert finding.id == "tensor.outlier" and finding.where == "self_attn.q_proj of layer 2"


@pytest.mark.slow
def test_equal_rows_and_repeated_layers(fixture: Victim) -> None:
    victim = fixture.copy()
    array = victim.arrays[victim.name("down_proj", 0)]
    array[10:20] = array[30]
    for name in list(victim.arrays):
        if ".layers.4." in name:
            victim.arrays[name] = victim.arrays[name.replace(".layers.4.", ".layers.3.")].copy()
    result = api.check(victim.checkpoint("hf"))
    assert [finding.id for finding in result.findings] == ["tensor.duplicate-rows", "tensor.equal-layers"]
    assert "10 of 256 rows" in result.findings[0].message and "layers 4" not in result.findings[0].message


@pytest.mark.slow
def test_lost_scales_of_a_gguf(fixture: Victim, tmp_path: Path) -> None:
    path = write_checkpoint(fixture.checkpoint(), tmp_path / "x.gguf", type="q8_0")
    with registry.open_checkpoint(path) as checkpoint:
        tensor = checkpoint.metadata["gguf"].tensors["blk.1.ffn_down.weight"]
        offset = tensor.offset + 34 * 100
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = bytes(2)
    path.write_bytes(data)
    (finding,) = api.check(path).findings
    assert finding.id == "quantization.zero-blocks" and finding.where == "mlp.down_proj of layer 1"
    assert finding.message.startswith("1 of ")


@pytest.mark.slow
def test_untrained_norms_are_a_note(fixture: Victim) -> None:
    victim = fixture.copy()
    for name in victim.norms():
        victim.arrays[name] = np.zeros_like(victim.arrays[name])
    result = api.check(victim.checkpoint("hf"))
    assert result.sane and [finding.id for finding in result.findings] == ["norm.untrained"]


def test_a_departure_from_a_release(fixture: Victim) -> None:
    from gemma2tool.model.config import SIZES
    from gemma2tool.pipeline.checks.provenance import check_config

    config = dataclasses.replace(SIZES["9b"], query_pre_attn_scalar=224, sliding_window=8192)
    checkpoint = dataclasses.replace(fixture.checkpoint("hf"), config=config)
    findings = [(finding.id, finding.message.split(" ")[0]) for finding in check_config(checkpoint)]
    assert ("config.departure", "query_pre_attn_scalar") in findings and (
        "config.unusual",
        "sliding_window",
    ) in findings


@pytest.mark.slow
def test_turn_marks_that_were_never_trained(fixture: Victim) -> None:
    """Added tokens get one and the same mean row when an embedding is resized."""
    victim = fixture.copy()
    embedding = victim.arrays[victim.name("embed")]
    embedding[106] = embedding[107] = embedding.astype(np.float32).mean(axis=0).astype(embedding.dtype)
    assert ids(victim.checkpoint("hf")) == ["tokenizer.untrained"]


def gguf_without(path: Path, *keys: str) -> None:
    """Remove keys from a GGUF."""
    header = gguf.read_header(path, GGML_BLOCKS)
    data = path.read_bytes()[header.data_start :]
    tensors = [(tensor.name, tensor.dims, tensor.type_id, tensor.nbytes) for tensor in header.tensors.values()]
    kv = [(key, value) for key, value in header.kv.items() if key not in keys]
    path.write_bytes(gguf.encode_header(kv, tensors)[0] + data)


@pytest.mark.slow
def test_a_gguf_of_the_first_converters(fixture: Victim, tmp_path: Path) -> None:
    path = write_checkpoint(fixture.checkpoint("hf"), tmp_path / "x.gguf")
    gguf_without(path, "tokenizer.ggml.add_space_prefix", "gemma2.attn_logit_softcapping")
    findings = [(finding.id, finding.severity) for finding in api.check(path).findings]
    assert findings == [("tokenizer.space-prefix", "doubt"), ("provenance.llama-cpp-early", "note")]


@pytest.mark.slow
def test_a_file_type_that_the_tensors_do_not_have(fixture: Victim, tmp_path: Path) -> None:
    path = write_checkpoint(fixture.checkpoint("hf"), tmp_path / "x.gguf", type="q8_0")
    data = path.read_bytes()
    key = b"general.file_type" + (4).to_bytes(4, "little")
    path.write_bytes(data.replace(key + (7).to_bytes(4, "little"), key + (10).to_bytes(4, "little")))
    (finding,) = api.check(path).findings
    assert finding.id == "quantization.file-type" and finding.message == "it is 10, q2_k; the tensors are q8_0"
