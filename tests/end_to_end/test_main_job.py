"""The main job, end to end: an original checkpoint in, verified conversions and quantizations out, judged by other
people's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from gemma2tool.reference.streaming import logits
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.assets import file_assets
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

BNB = {
    "bnb-nf4": ("nf4", False),
    "bnb-nf4dq": ("nf4", True),
    "bnb-fp4": ("fp4", False),
    "bnb-fp4dq": ("fp4", True),
    "bnb-int8": ("int8", False),
}


def near(found: np.ndarray, truth: np.ndarray) -> bool:
    """Within 5e-5 plus 1e-5 of the value, everywhere."""
    return bool((np.abs(found - truth) <= 5e-5 + 1e-5 * np.abs(truth)).all())


def softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def mean_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    p, q = softmax(p_logits), softmax(q_logits)
    return float((p * (np.log(p + 1e-300) - np.log(q + 1e-300))).sum(axis=-1).mean())


@pytest.fixture(scope="module")
def source(fixture_dir: Path):
    with registry.open_checkpoint(fixture_dir / "model.ckpt") as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def heldout(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Write the fixture in a type once; returns the path."""
    folder, paths = tmp_path_factory.mktemp("made"), {}

    def make(name: str, **options) -> Path:
        if name not in paths:
            paths[name] = write_checkpoint(source, folder / name, **options)
        return paths[name]

    return make


# -- the way round -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["hd", "hd_bf16", "hd_sharded", "hd_int8"])
def test_logits_survive_every_format(oracles: Path, tmp_path: Path, variant: str) -> None:
    """gemma_pytorch -> Hugging Face -> GGUF f32 -> read back: the stored logits at every stage."""
    folder = oracles / "checkpoints" / "gemma_pytorch"
    ids = np.load(oracles / "checkpoints" / "ids.npy")
    truth = np.load(folder / variant.removesuffix("_bf16") / "logits.npy")
    first = write_checkpoint(registry.open_checkpoint(folder / variant), tmp_path / "hf")
    second = write_checkpoint(registry.open_checkpoint(first), tmp_path / "f32.gguf", dtype="f32")
    third = write_checkpoint(registry.open_checkpoint(second), tmp_path / "back.ckpt")
    for path in (first, second, third):
        assert near(logits(registry.open_checkpoint(path), ids), truth), path.name


def test_a_scale_that_gguf_cannot_say_is_refused_first(oracles: Path, tmp_path: Path) -> None:
    """27B's query scale with 4 layers: llama.cpp would use another. Written on request, it is right with its config."""
    folder = oracles / "checkpoints" / "gemma_pytorch" / "27b"
    ids = np.load(oracles / "checkpoints" / "ids.npy")
    checkpoint = registry.open_checkpoint(folder)
    with pytest.raises(InputRefused, match="query_pre_attn_scalar"):
        write_checkpoint(checkpoint, tmp_path / "no.gguf", dtype="f32")
    path = write_checkpoint(checkpoint, tmp_path / "yes.gguf", dtype="f32", allow_mismatch=True)
    truth = np.load(folder / "logits.npy")
    assert near(logits(registry.open_checkpoint(path, config=checkpoint.config), ids), truth)
    assert not near(logits(registry.open_checkpoint(path), ids), truth)


@pytest.mark.parametrize("steps", [["a.ckpt"], ["hf", "a.ckpt"], ["a.gguf"], ["hf", "f32.gguf", "b.ckpt"]])
def test_lossless_paths_return_every_bit(source, tmp_path: Path, steps: list[str]) -> None:
    here = source
    for step in steps:
        options = {"dtype": "f32"} if step.startswith("f32") else {}
        here = registry.open_checkpoint(write_checkpoint(here, tmp_path / step, **options))
    if steps[-2:-1] == ["f32.gguf"]:  # bfloat16 values, widened
        assert all(
            np.array_equal(here.tensors[n].load(), t.load().astype(np.float32)) for n, t in source.tensors.items()
        )
    else:
        back = registry.open_checkpoint(write_checkpoint(here, tmp_path / "last"))
        for name, tensor in source.tensors.items():
            assert back.tensors[name].load().tobytes() == tensor.load().tobytes(), name


def test_norms_that_gguf_must_round_are_named_and_no_fault(oracles: Path, tmp_path: Path) -> None:
    """float32 norms lose low bits in w + 1: named with the size of the loss before writing, reported and not failed
    after.
    """
    from tests.support.checkpoints import random_checkpoint

    checkpoint = random_checkpoint(np.dtype(np.float32))
    from gemma2tool.formats.base import WriteOptions

    output = registry.by_name("gguf").layout(checkpoint, WriteOptions(name="x.gguf"))
    named = dict(output.losses)
    assert set(named) == {name for name in checkpoint.tensors if name.endswith("norm.weight")}
    assert all(0 < loss <= 2**-23 for loss in named.values())
    candidate = registry.open_checkpoint(write_checkpoint(checkpoint, tmp_path / "x.gguf"))
    result = verify(
        checkpoint,
        candidate,
        VerifySettings(expected=registry.by_name("gguf").expected_after_roundtrip(checkpoint, candidate)),
    )
    assert result.passed
    assert not verify(checkpoint, candidate).passed  # without knowing of the convention, the same bits are a difference


# -- what other programs say of the outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(BNB))
def test_bitsandbytes_folders_are_what_transformers_saves(oracles: Path, tmp_path: Path, folder: str) -> None:
    """The whole weights file and the config, byte for byte; so the logits in transformers are the library's own, bit
    for bit.
    """
    import torch
    from transformers import Gemma2ForCausalLM

    kind, double = BNB[folder]
    theirs = oracles / "quantized" / folder
    source = registry.open_checkpoint(oracles / "quantized" / "source")
    ours = write_checkpoint(source, tmp_path / "out", type=kind, double_quant=double)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (1, 48)))
    found = []
    for path in (ours, theirs):
        model, info = Gemma2ForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            found.append(model(ids).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_outputs_of_the_fixture_run_in_transformers(made, heldout: np.ndarray, kind: str) -> None:
    """Close to our float32 forward pass over the same file's dequantized weights (the library computes in bfloat16 or
    float16).
    """
    import torch
    from transformers import Gemma2ForCausalLM

    path = made(kind, type=kind)
    model, info = Gemma2ForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = heldout[:2, :160]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.float().numpy()
    assert mean_kl(logits(registry.open_checkpoint(path), ids), theirs) < 5e-3


def test_hf_output_of_the_fixture_equals_transformers(made, heldout: np.ndarray) -> None:
    import torch
    from transformers import Gemma2ForCausalLM

    path = made("hf")
    model, info = Gemma2ForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = heldout[:1, :200]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    assert near(logits(registry.open_checkpoint(path), ids), theirs)


GGUF_KL = {"f32": 1e-6, "f16": 2e-3, "bf16": 2e-3, "q8_0": 2e-3, "q4_0": 2e-3, "q4_k_m": 2e-3, "q6_k": 2e-3}


@pytest.mark.parametrize("kind", sorted(GGUF_KL))
def test_gguf_outputs_run_in_llama_cpp(made, llama, fixture_dir: Path, kind: str) -> None:
    """The same token ids as sentencepiece, and the distribution of our forward pass over the same file's dequantized
    weights.
    """
    import sentencepiece

    options = {"dtype": kind} if kind in ("f32", "f16", "bf16") else {"type": kind}
    path = made(f"{kind}.gguf", **options)
    text = (fixture_dir / "heldout.txt").read_text()[
        :600
    ] + "\n\n\n  \t caf\u00e9 \u4e2d <start_of_turn>user\nhi<end_of_turn>\n"
    ids, theirs = llama.logits(path, text)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(fixture_dir / "tokenizer.model"))
    assert ids.tolist() == [2, *tokenizer.encode(text)]
    ours = logits(registry.open_checkpoint(path), ids[None])[0]
    assert mean_kl(ours, theirs) < GGUF_KL[kind]
    if kind == "f32":
        assert np.abs(ours - theirs).max() < 1e-2


def test_control_tokens_and_template_reach_the_gguf(made) -> None:
    from gemma2tool.containers import gguf

    kv = gguf.read_header(made("f32.gguf", dtype="f32"), GGML_BLOCKS).kv
    types = kv["tokenizer.ggml.token_type"].value
    assert [types[i] for i in (0, 1, 2, 106, 107)] == [3] * 5
    assert kv["tokenizer.ggml.bos_token_id"].value == 2
    assert kv["tokenizer.ggml.eos_token_id"].value == 1
    assert "<start_of_turn>" in kv["tokenizer.chat_template"].value


# -- quality on trained weights ----------------------------------------------------------------------------------------


def test_quality_of_types_is_ordered(source, made, heldout: np.ndarray) -> None:
    """On the trained fixture: more bits, less divergence; and each type within the gate that ``verify`` holds it to."""
    from gemma2tool.verify.compare.logits import compare_logits

    ids = heldout[:8]
    kl = {}
    for kind in ("q8_0", "q4_0"):
        kl[kind] = compare_logits(
            source, registry.open_checkpoint(made(f"{kind}.gguf", type=kind)), ids
        ).metrics.mean_kl
    for kind in ("nf4", "int8"):
        kl[kind] = compare_logits(source, registry.open_checkpoint(made(kind, type=kind)), ids).metrics.mean_kl
    assert kl["q8_0"] < kl["q4_0"] / 10
    assert kl["int8"] < kl["nf4"] / 3
    assert kl["q8_0"] < 2e-3 and kl["q4_0"] < 0.1 and kl["nf4"] < 0.1 and kl["int8"] < 0.01


def test_a_lone_tokenizer_model_becomes_one_that_transformers_loads(source, fixture_dir: Path, tmp_path: Path) -> None:
    """Google's archives hold weights and tokenizer.model alone."""
    import dataclasses

    import sentencepiece
    from transformers import AutoTokenizer

    bare = dataclasses.replace(
        source, assets=file_assets({"tokenizer.model": (fixture_dir / "tokenizer.model").read_bytes()})
    )
    path = write_checkpoint(bare, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (path, fixture_dir))
    text = (fixture_dir / "heldout.txt").read_text()[:5000] + "<start_of_turn>user\nhi<end_of_turn>\n"
    assert ours(text).input_ids == theirs(text).input_ids
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(fixture_dir / "tokenizer.model"))
    assert ours(text).input_ids == [2, *tokenizer.encode(text)]
    assert ours.eos_token_id == 1 and ours.pad_token_id == 0 and ours.unk_token_id == 3
    special = [token for token in theirs.added_tokens_decoder if theirs.added_tokens_decoder[token].special]
    assert [token for token in ours.added_tokens_decoder if ours.added_tokens_decoder[token].special] == special


def test_what_travels_along(made, fixture_dir: Path) -> None:
    """What travels along is carried byte for byte."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (made("hf") / name).read_bytes() == (fixture_dir / name).read_bytes()
    assert json.loads((made("hf") / "config.json").read_text())["eos_token_id"] == [1, 107]
