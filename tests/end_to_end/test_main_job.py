"""The main job, end to end: from an original checkpoint to verified outputs, checked by the programs that they are
for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from tests.support.logits import is_close, mean_kl

pytestmark = pytest.mark.slow

BNB = {
    "bnb-nf4": ("nf4", False),
    "bnb-nf4dq": ("nf4", True),
    "bnb-fp4": ("fp4", False),
    "bnb-fp4dq": ("fp4", True),
    "bnb-int8": ("int8", False),
}


@pytest.fixture(scope="module")
def heldout(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the fixture in a type once; returns the path."""
    folder, paths = tmp_path_factory.mktemp("written"), {}

    def write(name: str, **options) -> Path:
        if name not in paths:
            paths[name] = write_checkpoint(source, folder / name, **options)
        return paths[name]

    return write


# -- round trips -------------------------------------------------------------------------------------------------------


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
        assert is_close(logits(registry.open_checkpoint(path), ids), truth), path.name


def test_a_query_scale_that_gguf_cannot_represent_is_refused(oracles: Path, tmp_path: Path) -> None:
    """27B's query scale with 4 layers: llama.cpp would use another. Written on request, it is read correctly with its
    config.
    """
    folder = oracles / "checkpoints" / "gemma_pytorch" / "27b"
    ids = np.load(oracles / "checkpoints" / "ids.npy")
    checkpoint = registry.open_checkpoint(folder)
    with pytest.raises(InputRefused, match="query_pre_attn_scalar"):
        write_checkpoint(checkpoint, tmp_path / "no.gguf", dtype="f32")
    path = write_checkpoint(checkpoint, tmp_path / "yes.gguf", dtype="f32", allow_mismatch=True)
    truth = np.load(folder / "logits.npy")
    assert is_close(logits(registry.open_checkpoint(path, config=checkpoint.config), ids), truth)
    assert not is_close(logits(registry.open_checkpoint(path), ids), truth)


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


def test_norms_that_gguf_rounds_are_listed_and_pass(oracles: Path, tmp_path: Path) -> None:
    """float32 norms lose low bits in w + 1: listed with their error before writing, reported but not failed after."""
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
    assert not verify(checkpoint, candidate).passed  # without the convention, the same bits are a difference


# -- the outputs in other programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(BNB))
def test_bitsandbytes_folders_equal_those_of_transformers(oracles: Path, tmp_path: Path, folder: str) -> None:
    """The weights file and the config are equal byte for byte, so transformers computes the same logits, bit for
    bit.
    """
    import torch
    from transformers import Gemma2ForCausalLM

    kind, double = BNB[folder]
    saved = oracles / "quantized" / folder
    source = registry.open_checkpoint(oracles / "quantized" / "source")
    written = write_checkpoint(source, tmp_path / "out", type=kind, double_quant=double)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (written / name).read_bytes() == (saved / name).read_bytes(), name
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (1, 48)))
    outputs = []
    for path in (written, saved):
        model, info = Gemma2ForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_outputs_of_the_fixture_run_in_transformers(written, heldout: np.ndarray, kind: str) -> None:
    """Close to the built-in float32 forward pass over the same file; the library computes in bfloat16 or float16."""
    import torch
    from transformers import Gemma2ForCausalLM

    path = written(kind, type=kind)
    model, info = Gemma2ForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = heldout[:2, :160]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.float().numpy()
    assert mean_kl(logits(registry.open_checkpoint(path), ids), expected) < 5e-3


def test_hf_output_of_the_fixture_equals_transformers(written, heldout: np.ndarray) -> None:
    import torch
    from transformers import Gemma2ForCausalLM

    path = written("hf")
    model, info = Gemma2ForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = heldout[:1, :200]
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    assert is_close(logits(registry.open_checkpoint(path), ids), expected)


GGUF_KL = {"f32": 1e-6, "f16": 2e-3, "bf16": 2e-3, "q8_0": 2e-3, "q4_0": 2e-3, "q4_k_m": 2e-3, "q6_k": 2e-3}


@pytest.mark.parametrize("kind", sorted(GGUF_KL))
def test_gguf_outputs_run_in_llama_cpp(written, llama, fixture_dir: Path, kind: str) -> None:
    """The token ids are sentencepiece's, the distribution that of the built-in forward pass over the same file."""
    import sentencepiece

    options = {"dtype": kind} if kind in ("f32", "f16", "bf16") else {"type": kind}
    path = written(f"{kind}.gguf", **options)
    beginning = (fixture_dir / "heldout.txt").read_text()[:600]
    text = beginning + "\n\n\n  \t caf\u00e9 \u4e2d <start_of_turn>user\nhi<end_of_turn>\n"
    ids, expected = llama.logits(path, text)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(fixture_dir / "tokenizer.model"))
    assert ids.tolist() == [2, *tokenizer.encode(text)]
    values = logits(registry.open_checkpoint(path), ids[None])[0]
    assert mean_kl(values, expected) < GGUF_KL[kind]
    if kind == "f32":
        assert np.abs(values - expected).max() < 1e-2


def test_control_tokens_and_template_reach_the_gguf(written) -> None:
    from gemma2tool.containers import gguf

    kv = gguf.read_header(written("f32.gguf", dtype="f32"), GGML_BLOCKS).kv
    types = kv["tokenizer.ggml.token_type"].value
    assert [types[i] for i in (0, 1, 2, 106, 107)] == [3] * 5
    assert kv["tokenizer.ggml.bos_token_id"].value == 2
    assert kv["tokenizer.ggml.eos_token_id"].value == 1
    assert "<start_of_turn>" in kv["tokenizer.chat_template"].value


# -- quality on trained weights ----------------------------------------------------------------------------------------


def test_quality_of_types_is_ordered(source, written, heldout: np.ndarray) -> None:
    """On the trained fixture: more bits, less divergence; and each type within the limit of ``verify``."""
    from gemma2tool.verify.compare.logits import compare_logits

    ids = heldout[:3]
    kl = {}
    for kind in ("q8_0", "q4_0"):
        kl[kind] = compare_logits(
            source, registry.open_checkpoint(written(f"{kind}.gguf", type=kind)), ids
        ).metrics.mean_kl
    for kind in ("nf4", "int8"):
        kl[kind] = compare_logits(source, registry.open_checkpoint(written(kind, type=kind)), ids).metrics.mean_kl
    assert kl["q8_0"] < kl["q4_0"] / 10
    assert kl["int8"] < kl["nf4"] / 3
    assert kl["q8_0"] < 2e-3 and kl["q4_0"] < 0.1 and kl["nf4"] < 0.1 and kl["int8"] < 0.01


def test_a_lone_tokenizer_model_becomes_one_that_transformers_loads(source, fixture_dir: Path, tmp_path: Path) -> None:
    """Google's archives contain only weights and tokenizer.model."""
    import dataclasses

    import sentencepiece
    from transformers import AutoTokenizer

    bare = dataclasses.replace(
        source, assets=file_assets({"tokenizer.model": (fixture_dir / "tokenizer.model").read_bytes()})
    )
    path = write_checkpoint(bare, tmp_path / "out")
    written, original = (AutoTokenizer.from_pretrained(folder) for folder in (path, fixture_dir))
    text = (fixture_dir / "heldout.txt").read_text()[:5000] + "<start_of_turn>user\nhi<end_of_turn>\n"
    assert written(text).input_ids == original(text).input_ids
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(fixture_dir / "tokenizer.model"))
    assert written(text).input_ids == [2, *tokenizer.encode(text)]
    assert written.eos_token_id == 1 and written.pad_token_id == 0 and written.unk_token_id == 3
    special_tokens = [
        [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
        for tokenizer in (written, original)
    ]
    assert special_tokens[0] == special_tokens[1]


def test_what_travels_along(written, fixture_dir: Path) -> None:
    """What travels along is carried byte for byte."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (written("hf") / name).read_bytes() == (fixture_dir / name).read_bytes()
    assert json.loads((written("hf") / "config.json").read_text())["eos_token_id"] == [1, 107]
