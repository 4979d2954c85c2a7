"""What training code leaves around a model's tensors, in every format of torch and safetensors files: dicts around the
state dict, prefixes, and segments in the names.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2tool.formats import registry
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, suffix_of, write_as

torch = pytest.importorskip("torch")

State = Mapping[str, Any]

FORMATS = {
    "hf": "model.safetensors",
    "mlx": "model.safetensors",
    "hf-bin": "pytorch_model.bin",
    "litgpt": "lit_model.pth",
    "torchtune": "tune_state_dict.pt",
    "torchtune-0.6": "tune_state_dict-0.6.pt",
    "gemma-pytorch": "model.ckpt",
}
SOURCE = random_checkpoint(np.dtype(np.float32))


def _prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def _fsdp(state: State) -> State:
    """FSDP wraps the model and each of its layers."""
    return {"_fsdp_wrapped_module." + _after_layer(name, "_fsdp_wrapped_module."): t for name, t in state.items()}


def _checkpointed(state: State) -> State:
    """Activation checkpointing wraps each layer."""
    return {_after_layer(name, "_checkpoint_wrapped_module."): tensor for name, tensor in state.items()}


def _after_layer(name: str, segment: str) -> str:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return name
    return ".".join(parts[: number + 1]) + "." + segment + ".".join(parts[number + 1 :])


RENAMED: dict[str, Callable[[State], State]] = {
    "torch.compile": _prefixed("_orig_mod."),
    "DataParallel": _prefixed("module."),
    "compiled DataParallel": _prefixed("module._orig_mod."),
    "Lightning": _prefixed("model."),
    "a language model inside another": _prefixed("language_model."),
    "trl's value head": _prefixed("pretrained_model."),
    "a value head around peft (LlamaFactory 3400)": _prefixed("pretrained_model.base_model.model."),
    "FSDP": _fsdp,
    "activation checkpointing": _checkpointed,
}
NESTED: dict[str, Callable[[State], Any]] = {
    "litgpt's and many trainers'": lambda state: {"model": state, "optimizer": {"state": {0: {"step": 3}}}, "step": 1},
    "Lightning": lambda state: {"state_dict": _prefixed("model.")(state), "epoch": 1, "pytorch-lightning_version": "2"},
    "gemma_pytorch's": lambda state: {"model_state_dict": state, "epoch": 3, "loss": torch.tensor(1.0)},
    "DeepSpeed's": lambda state: {"module": state, "ds_version": "0.15", "param_shapes": None},
    "a dict in a dict": lambda state: {"checkpoint": {"model": _prefixed("module.")(state)}},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in each format, as a folder."""
    place = tmp_path_factory.mktemp("written")
    folders = {}
    for name, file in FORMATS.items():
        folders[name] = place / name
        if suffix_of(name):
            folders[name].mkdir()
            write_as(name, SOURCE, folders[name] / file)
            shutil.copy(folders["hf"] / "config.json", folders[name])
        else:
            write_as(name, SOURCE, folders[name])
    return folders


def _changed(folder: Path, out: Path, file: str, change: Callable[[State], Any]) -> Path:
    """A copy of ``folder`` whose state dict is changed."""
    shutil.copytree(folder, out)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)  # mlx-lm's, of the names before the change
    if file.endswith(".safetensors"):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(out / file, "pt") as opened:
            metadata = opened.metadata()
        save_file(dict(change(load_file(out / file))), out / file, metadata=metadata)
    else:
        tree = torch.load(out / file, weights_only=True)
        torch.save(change(tree.get("model_state_dict", tree)), out / file)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", RENAMED)
@pytest.mark.parametrize("name", FORMATS)
def test_wrapped_names_are_read_and_named(written, tmp_path: Path, name: str, wrapper: str) -> None:
    folder = _changed(written[name], tmp_path / "out", FORMATS[name], RENAMED[wrapper])
    assert registry.detect(folder).name == name
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)
        remarks = [text for text in checkpoint.warnings if "have the names of a wrapper" in text]
    assert len(remarks) == 1, remarks


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", NESTED)
@pytest.mark.parametrize("name", [name for name, file in FORMATS.items() if not file.endswith(".safetensors")])
def test_a_state_dict_in_other_dicts_is_read(written, tmp_path: Path, name: str, wrapper: str) -> None:
    folder = _changed(written[name], tmp_path / "out", FORMATS[name], NESTED[wrapper])
    for place in (folder, folder / FORMATS[name]):
        assert registry.detect(place).name == name
        with registry.open_checkpoint(place) as checkpoint:
            assert_same_tensors(SOURCE, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "consolidated.00.pth", "last.ckpt", "model.pt"])
def test_hugging_faces_names_are_read_from_a_torch_file_of_any_name(written, tmp_path: Path, file: str) -> None:
    """Beside it what trainers save: optimizer, scheduler, random states."""
    folder = tmp_path / "out"
    shutil.copytree(written["hf-bin"], folder)
    (folder / "pytorch_model.bin").rename(folder / file)
    for beside in ("optimizer.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"state": {}}, folder / beside)
    for place in (folder, folder / file):
        assert registry.detect(place).name == "hf-bin"
        with registry.open_checkpoint(place) as checkpoint:
            assert_same_tensors(SOURCE, checkpoint)
            assert not checkpoint.warnings


@pytest.mark.slow
def test_one_of_several_models_is_named(written, tmp_path: Path) -> None:
    """Where the loaders of the field would take one, that one, and the other is named; otherwise neither."""

    def averaged(state: State) -> State:
        return {"ema_state_dict": {name: t * 2 for name, t in state.items()}, "state_dict": state}

    folder = _changed(written["hf-bin"], tmp_path / "averaged", "pytorch_model.bin", averaged)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)
        assert any("'state_dict' is read, 'ema_state_dict' not" in text for text in checkpoint.warnings)
    folder = _changed(
        written["hf-bin"], tmp_path / "two", "pytorch_model.bin", lambda state: {"teacher": state, "student": state}
    )
    with refused("several models, under 'teacher', 'student'"):
        registry.open_checkpoint(folder)
    folder = _changed(
        written["hf"],
        tmp_path / "prefixes",
        "model.safetensors",
        lambda state: {f"{who}.{name}": t.clone() for name, t in state.items() for who in ("policy", "reference")},
    )
    with refused("several models, with the prefixes 'policy.model.', 'reference.model.'"):
        registry.open_checkpoint(folder)


@pytest.mark.parametrize("name", ["hf", "hf-bin"])
def test_an_adapter_that_is_not_merged_is_refused_by_name(written, tmp_path: Path, name: str) -> None:
    """FSDP saves a model that peft wraps with its adapter in it, whose scale is not in the file."""

    def adapted(state: State) -> State:
        q = "model.layers.0.self_attn.q_proj."
        wrapped = {n.replace("q_proj.weight", "q_proj.base_layer.weight"): t for n, t in state.items()}
        wrapped |= {q + "lora_A.default.weight": torch.zeros(4, 64), q + "lora_B.default.weight": torch.zeros(128, 4)}
        return _prefixed("base_model.model.")(wrapped)

    folder = _changed(written[name], tmp_path / "out", FORMATS[name], adapted)
    with refused("2 of its tensors are an adapter that is not merged"):
        registry.open_checkpoint(folder)


def test_names_of_peft_without_an_adapter_are_read(written, tmp_path: Path) -> None:
    def unloaded(state: State) -> State:
        return _prefixed("base_model.model.")(
            {n.replace("q_proj.weight", "q_proj.base_layer.weight"): t for n, t in state.items()}
        )

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", unloaded)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_a_head_beside_a_base_class_keeps_its_name(written, tmp_path: Path, prefix: str) -> None:
    """A classifier of one's own around ``Gemma2Model``: the model has no "model.", the head never had."""

    def classifier(state: State) -> State:
        base = {prefix + name.removeprefix("model."): tensor for name, tensor in state.items()}
        return {**base, prefix + "score.weight": torch.zeros(2, 64)}

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", classifier)
    with registry.open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors["score.weight"].shape == (2, 64)
        assert checkpoint.tensors.keys() - SOURCE.tensors.keys() == {"score.weight"}


def test_names_that_become_the_same_are_refused(written, tmp_path: Path) -> None:
    def twice(state: State) -> State:
        return {**state, "model.norm._orig_mod.weight": state["model.norm.weight"].clone()}

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", twice)
    with refused("is the second model.norm.weight"):
        registry.open_checkpoint(folder)


def test_a_value_head_is_left_out_and_named(written, tmp_path: Path) -> None:
    """trl saves a model with a value head; transformers ignores it."""

    def with_head(state: State) -> State:
        return {**state, "v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)}

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", with_head)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)
        assert any("value head" in text and "left out" in text for text in checkpoint.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_matrices_stored_by_columns_are_read(written, tmp_path: Path, name: str) -> None:
    """torch.save keeps the strides of a transposed matrix, and torch loads it; safetensors refuses to save one."""
    if FORMATS[name].endswith(".safetensors"):
        pytest.skip("safetensors has no strides")

    def by_columns(state: State) -> State:
        return {n: t.t().contiguous().t() if t.dim() == 2 and n != "freqs_cis" else t for n, t in state.items()}

    folder = _changed(written[name], tmp_path / "out", FORMATS[name], by_columns)
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)
        assert_ranges_agree(checkpoint)


def test_other_strides_are_refused(written, tmp_path: Path) -> None:
    def every_other(state: State) -> State:
        return {n: t.repeat_interleave(2, 1)[:, ::2] if n.endswith("q_proj.weight") else t for n, t in state.items()}

    folder = _changed(written["hf-bin"], tmp_path / "out", "pytorch_model.bin", every_other)
    with refused("neither by rows nor by columns"):
        registry.open_checkpoint(folder)


def test_a_head_that_shares_the_embeddings_storage_is_dropped(written, tmp_path: Path) -> None:
    """Trainers save Gemma 2 with torch where safetensors refuses the tied head (transformers 33807)."""
    folder = _changed(
        written["hf-bin"],
        tmp_path / "out",
        "pytorch_model.bin",
        lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"]},
    )
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)


def test_the_shards_that_fsdp_flattens_are_named(written, tmp_path: Path) -> None:
    """The embedding as one long row, everything else empty (axolotl 1947)."""

    def flattened(state: State) -> State:
        embedding = "model.embed_tokens.weight"
        return {n: t.reshape(-1) if n == embedding else torch.zeros(0) for n, t in state.items()}

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", flattened)
    with refused("tensors are empty, such as .* of shape \\(0,\\)") as refusal:
        registry.open_checkpoint(folder)
    assert "FULL_STATE_DICT" in refusal.value.hint


def test_the_tokenizer_in_a_file_of_comfyui_is_read(written, tmp_path: Path, fixture_dir: Path) -> None:
    """Its text encoders hold tokenizer.model as a tensor of bytes (ComfyUI-GGUF 358)."""
    data = (fixture_dir / "tokenizer.model").read_bytes()

    def with_tokenizer(state: State) -> State:
        return {**state, "spiece_model": torch.frombuffer(bytearray(data), dtype=torch.uint8)}

    folder = _changed(written["hf"], tmp_path / "out", "model.safetensors", with_tokenizer)
    (folder / "model.safetensors").rename(folder / "gemma_2_2b_fp16.safetensors")
    with registry.open_checkpoint(folder) as checkpoint:
        assert_same_tensors(SOURCE, checkpoint)
        assert checkpoint.assets["tokenizer.model"] == data
        assert len(checkpoint.tokenizer.vocabulary) > 1000
    (folder / "tokenizer.model").write_bytes(b"of the folder")
    with registry.open_checkpoint(folder) as checkpoint:
        assert checkpoint.assets["tokenizer.model"] == b"of the folder"


@pytest.mark.parametrize("name", FORMATS)
def test_placeholders_of_zero3_are_named(written, tmp_path: Path, name: str) -> None:
    """DeepSpeed ZeRO-3 saves parameters that it has not gathered with the shape (0,)."""

    def empty(state: State) -> State:
        return {n: torch.zeros(0, dtype=t.dtype) if "mlp" in n and t.dim() == 2 else t for n, t in state.items()}

    folder = _changed(written[name], tmp_path / "out", FORMATS[name], empty)
    with refused("tensors are empty, such as .* of shape \\(0,\\)"):
        registry.open_checkpoint(folder)


def test_the_parameters_of_fsdp_flattened_are_listed(written, tmp_path: Path) -> None:
    def flat(state: State) -> State:
        return {"_flat_param": torch.zeros(10)}

    folder = _changed(written["hf-bin"], tmp_path / "out", "pytorch_model.bin", flat)
    with refused("missing, _flat_param is there"):
        registry.open_checkpoint(folder)
