"""gemma_pytorch checkpoints that gemma2tool writes, against ones that Google's code wrote, and in Google's model
class.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import truth_of, write_as

PEER = os.environ.get("GEMMA2TOOL_GEMMA_PYTORCH")
"""A checkout of google/gemma_pytorch, which no package index has."""


@pytest.mark.parametrize("variant", ["hd", "27b", "hd_bf16", "27b_bf16"])
def test_state_dicts_equal_those_of_googles_code(oracles: Path, tmp_path: Path, variant: str) -> None:
    """The same names in the same order, the same types, the same bits, freqs_cis among them; so the same model to its
    loader.
    """
    import torch

    dtype = "bf16" if variant.endswith("bf16") else None
    source = truth_of(oracles, variant.removesuffix("_bf16"))
    written = torch.load(write_as("gemma-pytorch", source, tmp_path / "model.ckpt", dtype=dtype), weights_only=True)[
        "model_state_dict"
    ]
    folder = oracles / "checkpoints" / "gemma_pytorch" / variant
    reference = torch.load(folder / "model.ckpt", weights_only=True)["model_state_dict"]
    assert list(written) == list(reference)
    for name, tensor in reference.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@pytest.mark.slow
def test_a_ckpt_has_no_tokenizer_and_passes_its_verification(fixture_dir: Path, tmp_path: Path) -> None:
    """The source has one beside its weights; a file of weights alone has no place for it, a folder has."""
    from typer.testing import CliRunner

    from gemma2tool.cli.main import app

    for name, words in (("new.ckpt", "weights alone"), ("folder", "same byte for byte")):
        arguments = ["convert", str(fixture_dir / "model.ckpt"), str(tmp_path / name), "--to", "gemma-pytorch", "-v"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and words in result.output, result.output
    assert (tmp_path / "folder" / "tokenizer.model").is_file()


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="no checkout of gemma_pytorch: set GEMMA2TOOL_GEMMA_PYTORCH")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gemma_pytorch_loads_it_and_computes_the_same(oracles: Path, tmp_path: Path, dtype: str, monkeypatch) -> None:
    import torch

    from gemma2tool.reference.streaming import logits

    monkeypatch.syspath_prepend(PEER)
    for name in [name for name in sys.modules if name.split(".")[0] == "gemma"]:
        monkeypatch.delitem(sys.modules, name)
    from gemma import config as settings
    from gemma.model import GemmaForCausalLM

    kinds = settings.AttentionType
    source = random_checkpoint(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    path = write_as("gemma-pytorch", source, tmp_path / "model.ckpt")
    same = (
        "vocab_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
    )
    model = GemmaForCausalLM(
        settings.GemmaConfig(
            architecture=settings.Architecture.GEMMA_2,
            attn_types=[kinds.LOCAL_SLIDING, kinds.GLOBAL],
            sliding_window_size=SMALL.sliding_window,
            use_pre_ffw_norm=True,
            use_post_ffw_norm=True,
            tokenizer=str(oracles / "checkpoints" / "tokenizer.model"),
            dtype="float32",
            **{name: getattr(SMALL, name) for name in same},
        )
    ).eval()
    model.load_weights(str(path))
    ids = np.random.default_rng(0).integers(3, SMALL.vocab_size, (2, 20))
    length = ids.shape[1]
    far = torch.full((1, 1, length, length), -2.3819763e38)
    mask = torch.triu(far, diagonal=1)
    reference = []
    for position in range(length):
        caches = [
            tuple(torch.zeros(len(ids), length, SMALL.num_key_value_heads, SMALL.head_dim) for _ in "kv")
            for _ in range(SMALL.num_hidden_layers)
        ]
        positions = torch.arange(length)
        _, result = model(
            input_token_ids=torch.from_numpy(ids),
            input_positions=positions,
            kv_write_indices=positions,
            kv_caches=caches,
            mask=mask,
            local_mask=mask + torch.tril(far, diagonal=-SMALL.sliding_window),
            output_positions=torch.tensor([position]),
            temperatures=None,
            top_ps=torch.ones(len(ids)),
            top_ks=torch.ones(len(ids), dtype=torch.int64),
        )
        reference.append(result.numpy())
    actual = logits(registry.open_checkpoint(path), ids)
    assert (np.abs(actual - np.stack(reference, axis=1)) <= 5e-5 + 1e-5 * np.abs(actual)).all(), np.abs(
        actual - np.stack(reference, 1)
    ).max()


def test_a_ckpt_alone_keeps_its_special_ids_in_a_gguf(tmp_path: Path, llama) -> None:
    """Without a vocabulary that has <end_of_turn>, its id is written; llama.cpp loads the file and gets token ids."""
    from dataclasses import replace

    config = replace(SMALL, eos_token_id=(1, 107), bos_token_id=2, pad_token_id=0)
    source = registry.open_checkpoint(
        write_as("gemma-pytorch", random_checkpoint(np.dtype(np.float32), config), tmp_path / "it.ckpt")
    )
    path = write_as("gguf", source, tmp_path / "it.gguf")
    back = registry.open_checkpoint(path)
    assert (back.config.eos_token_id, back.config.bos_token_id, back.config.pad_token_id) == ((1, 107), 2, 0)
    _, result = llama.logits(path, [2, 5, 9, 100])
    assert np.isfinite(result).all() and result.shape[-1] == config.vocab_size
