"""Classification heads: formats that can hold them keep them; the others refuse them by name before anything is
written.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gemma2tool.cli.main import app
from gemma2tool.formats import registry
from tests.support.formats import assert_same_tensors, refused, suffix_of, write_as

pytestmark = pytest.mark.slow

KINDS = {"Gemma2ForSequenceClassification": 3, "Gemma2ForTokenClassification": 5}
HOLDERS = ("hf", "hf-bin", "mlx", "gemma-pytorch")
OTHERS = [name for name in registry.NAMES if name not in HOLDERS]


@pytest.fixture(scope="module", params=list(KINDS))
def classifier(request, tmp_path_factory) -> Path:
    """A random classifier as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=64,
        sliding_window=8,
        initializer_range=0.2,
        num_labels=KINDS[request.param],
    )
    folder = tmp_path_factory.mktemp("classifier") / request.param
    model = getattr(transformers, request.param)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("score"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def _logits(folder: Path) -> np.ndarray:
    """What transformers computes of a folder, which must hold each of its parameters and no other."""
    import torch
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 160, (2, 20)))
    with torch.no_grad():
        return model.eval()(ids).logits.numpy()


def _as_bin(folder: Path, to: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    to.mkdir()
    torch.save(load_file(folder / "model.safetensors"), to / "pytorch_model.bin")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_heads_pass_through(classifier: Path, tmp_path: Path, container: str, name: str) -> None:
    """There and back to Hugging Face by the commands; transformers computes the same classes to the last bit."""
    source = classifier if container == "safetensors" else _as_bin(classifier, tmp_path / "bin")
    middle, back = tmp_path / f"out{suffix_of(name)}", tmp_path / "back"
    for arguments in ([source, middle, "--to", name], [middle, back]):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--quiet"])
        assert result.exit_code == 0, result.output
    original = registry.open_checkpoint(classifier)
    assert "score.weight" in original.tensors
    assert_same_tensors(original, registry.open_checkpoint(middle))
    logits, expected = _logits(back), _logits(classifier)
    assert logits.shape[-1] == KINDS[classifier.name] and logits.tobytes() == expected.tobytes()


def test_a_head_is_never_quantized(classifier: Path, tmp_path: Path) -> None:
    source = registry.open_checkpoint(classifier)
    for kind in ("nf4", "int8"):
        output = registry.open_checkpoint(write_as("hf", source, tmp_path / kind, type=kind))
        for name in (name for name in source.tensors if name.startswith("score")):
            assert output.tensors[name].load().tobytes() == source.tensors[name].load().tobytes()


def test_a_head_named_classifier_passes_too(classifier: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = {
        name.replace("score.", "classifier."): array
        for name, array in load_file(classifier / "model.safetensors").items()
    }
    folder = tmp_path / "renamed"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((classifier / "config.json").read_bytes())
    source = registry.open_checkpoint(folder)
    assert "classifier.weight" in source.tensors
    for name in HOLDERS:
        path = write_as(name, source, tmp_path / f"{name}-out{suffix_of(name)}")
        assert_same_tensors(source, registry.open_checkpoint(path))
    with refused("classifier.weight"):
        write_as("gguf", source, tmp_path / "out.gguf")


def test_a_warning_says_what_the_consumers_loader_does_with_a_head(classifier: Path, tmp_path: Path) -> None:
    """mlx-lm refuses an unknown tensor unless it loads with strict=False; gemma_pytorch always does."""
    from gemma2tool.formats.base import WriteOptions

    source = registry.open_checkpoint(classifier)
    for name, words in (("mlx", "strict=False"), ("gemma-pytorch", "ignores score.weight")):
        assert any(words in line for line in registry.by_name(name).layout(source, WriteOptions(name="x")).warnings)
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    folder = write_as("mlx", source, tmp_path / "mlx")
    with pytest.raises(ValueError, match="score.weight"):
        mlx_lm.utils.load_model(folder)
    mlx_lm.utils.load_model(folder, strict=False)


@pytest.mark.parametrize("name", OTHERS)
def test_formats_without_a_place_refuse_before_they_write(classifier: Path, tmp_path: Path, name: str) -> None:
    destination = tmp_path / f"out{suffix_of(name)}"
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["convert", str(classifier), str(destination), "--to", name, *more])
        assert result.exit_code == 3 and "score." in result.output, result.output
        assert not list(tmp_path.iterdir())
