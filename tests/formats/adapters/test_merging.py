"""LoRA adapters merged while rows are read, compared with peft's own merge_and_unload."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merged import MergedTensor
from gemma2tool.formats.adapters.merging import merge
from gemma2tool.formats.adapters.peft.names import PREFIX
from gemma2tool.model.lazy import FLOAT_DTYPES, ArrayTensor
from gemma2tool.pipeline.conversion import shared
from gemma2tool.verify.compare.tensors import compare_tensors
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_ranges_agree, assert_same_tensors, refused, write_as

OUT = {"gguf": "out.gguf", "gemma-pytorch": "out.ckpt", "gemma-cpp": "out.sbs"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_as("hf", random_checkpoint(np.dtype(np.float32)), tmp_path_factory.mktemp("base") / "hf")


def _adapter(
    base: Path, folder: Path, kind: str = "CausalLM", **settings: object
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter that peft saved, all of its parts random, and the weights that peft makes of it."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import transformers

    torch.manual_seed(1)
    model = getattr(transformers, f"Gemma2For{kind}").from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.normal_(0, 0.2)
                    if "magnitude" in name:
                        parameter.abs_().add_(0.5)
        model.save_pretrained(folder)
        merged = model.merge_and_unload()
    return folder, {name: tensor.float().numpy() for name, tensor in merged.state_dict().items()}


def _assert_merged(base: Path, adapter: Path, truth: dict[str, np.ndarray], scale: float = 1.0) -> None:
    source = registry.open_checkpoint(base)
    merged = merge(source, adapter, scale)
    changed = 0
    for name, tensor in merged.tensors.items():
        values = tensor.load().astype(np.float32)
        assert np.abs(values - truth[name]).max() <= 2e-6 * max(np.abs(truth[name]).max(), 1), name
        changed += name not in source.tensors or not np.array_equal(values, source.tensors[name].load())
    assert changed
    assert_ranges_agree(merged)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 6, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
        {"r": 4, "lora_alpha": 4, "target_modules": ["gate_proj", "o_proj"], "use_dora": True},
        {"r": 4, "lora_alpha": 4, "target_modules": ["gate_proj"], "fan_in_fan_out": True},
        {"r": 4, "lora_alpha": 4, "target_modules": r".*layers\.[02]\.mlp\.up_proj"},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {r"layers\.[12]\.mlp\.down_proj": 3, "v_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "^model.layers.1.self_attn.v_proj": 9},
        },
    ],
    ids=[
        "plain",
        "rslora",
        "patterns",
        "dora",
        "fan-in-fan-out",
        "regex",
        "modules-to-save",
        "all-together",
    ],
)
def test_equals_peft(base: Path, tmp_path: Path, settings: dict) -> None:
    adapter, truth = _adapter(base, tmp_path / "adapter", **settings)
    _assert_merged(base, adapter, truth)


@pytest.mark.slow
def test_a_classification_head_comes_with_the_adapter(base: Path, tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "task_type": "SEQ_CLS"}
    adapter, truth = _adapter(base, tmp_path / "adapter", kind="SequenceClassification", **settings)
    _assert_merged(base, adapter, truth)
    merged = merge(registry.open_checkpoint(base), adapter)
    assert merged.config.architectures == ("Gemma2ForSequenceClassification",)
    back = registry.open_checkpoint(write_as("hf", merged, tmp_path / "out"))
    assert_same_tensors(merged, back)


@pytest.mark.slow
def test_a_token_classification_head_with_its_bias(base: Path, tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "task_type": "TOKEN_CLS"}
    adapter, truth = _adapter(base, tmp_path / "adapter", kind="TokenClassification", **settings)
    _assert_merged(base, adapter, truth)
    merged = merge(registry.open_checkpoint(base), adapter)
    assert merged.config.architectures == ("Gemma2ForTokenClassification",) and "score.bias" in merged.tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens: uses use_dora for an embedding"),
    ],
    ids=["dora-embedding"],
)
def test_adapters_of_peft_that_cannot_be_merged(base: Path, tmp_path: Path, settings: dict, match: str) -> None:
    adapter, _ = _adapter(base, tmp_path / "adapter", r=2, lora_alpha=2, **settings)
    with refused(match):
        merge(registry.open_checkpoint(base), adapter)


@pytest.mark.slow
def test_an_adapter_in_a_bin_file(base: Path, tmp_path: Path) -> None:
    """peft saved adapters like this by default until 2023."""
    import torch
    from safetensors.torch import load_file

    adapter, truth = _adapter(base, tmp_path / "adapter", r=2, lora_alpha=2, target_modules=ATTENTION)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    _assert_merged(base, adapter, truth)


def _handmade(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> Path:
    """An adapter written without peft."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file({PREFIX + name: array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


Q = "model.layers.0.self_attn.q_proj"
A, B = (np.random.default_rng(n).standard_normal(s).astype(np.float32) for n, s in enumerate([(2, 64), (128, 2)]))
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


def test_formula_scale_and_several_adapters(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    adapter = _handmade(tmp_path / "a", PAIR)
    merged = merge(merge(source, adapter, 0.25), adapter, -0.5)
    weight = source.tensors[f"{Q}.weight"].load().astype(np.float64)
    exact = weight + (0.25 - 0.5) * 2 * (B.astype(np.float64) @ A)
    values = merged.tensors[f"{Q}.weight"].load()
    assert values.dtype == np.float32  # rounded by float32's own sums only: the output rounds once
    assert (np.abs(values - exact) <= 1e-5).all()
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert merged.tensors[untouched] is source.tensors[untouched]


def test_rows_do_not_depend_on_the_requested_range(tmp_path: Path) -> None:
    config = replace(SMALL, hidden_size=200, intermediate_size=333)
    source = random_checkpoint(np.dtype(np.float32), config)
    name = "model.layers.0.mlp.gate_proj"
    rng = np.random.default_rng(3)
    parts = {
        f"{name}.lora_A.weight": rng.standard_normal((16, 200)),
        f"{name}.lora_B.weight": rng.standard_normal((333, 16)),
    }
    adapter = _handmade(
        tmp_path / "a",
        {key: value.astype(np.float32) for key, value in parts.items()},
        r=16,
        target_modules=["gate_proj"],
    )
    tensor = merge(source, adapter).tensors[f"{name}.weight"]
    whole = tensor.load()
    for step in (1, 7, 64, 100):
        rows = [tensor.load_rows(first, min(first + step, 333)) for first in range(0, 333, step)]
        assert np.concatenate(rows).tobytes() == whole.tobytes()


def test_a_head_of_its_own_unties_the_model(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    head = np.ones((SMALL.vocab_size, SMALL.hidden_size), np.float32)
    adapter = _handmade(tmp_path / "a", {"lm_head.weight": head}, target_modules=[], modules_to_save=["lm_head"])
    merged = merge(source, adapter)
    assert not merged.config.tie_word_embeddings and np.array_equal(merged.tensors["lm_head.weight"].load(), head)
    assert any("no longer tied" in line for line in merged.warnings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "settings", "match"),
    [
        ({"x.lora_A.weight": A, "x.lora_B.weight": B}, {"target_modules": ["x"]}, "'x' is not a weight of this model"),
        (PAIR, {"target_modules": ["foo"]}, "which adapter_config.json does not target"),
        ({f"{Q}.lora_A.weight": A}, {}, "lora_A or lora_B is missing"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:64]}, {}, r"is for \(64, 64\), the model has \(128, 64\)"),
        (PAIR, {"r": 4}, "the rank is 4"),
        (PAIR, {"peft_type": "IA3"}, "not LoRA"),
        (PAIR, {"use_dora": True}, "use_dora is True"),
        (PAIR, {"lora_bias": True}, "uses lora_bias"),
        (PAIR, {"lora_alpha": "many"}, "lora_alpha is 'many'"),
        (PAIR, {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        (
            PAIR,
            {"alpha_pattern": {"q_proj": 10**400}},
            "lora_alpha is 1000",
        ),
        (PAIR, {"r": 10**400}, "r is 1000"),
        (PAIR, {"lora_alpha": 1e39}, "lora_alpha is 1e"),
        (
            PAIR,
            {"lora_alpha": 3e38, "use_rslora": "yes"},
            "use_rslora is 'yes'",
        ),
        (PAIR, {"target_modules": 5}, "target_modules is 5"),
        (PAIR, {"target_modules": [5]}, "target_modules is "),
        (PAIR, {"modules_to_save": {"a": 1}}, "modules_to_save is "),
        (PAIR, {"layers_to_transform": [[1]]}, "layers_to_transform is "),
        (
            PAIR,
            {"layers_to_transform": [True]},
            "layers_to_transform is ",
        ),
        (PAIR, {"layers_pattern": 1.5}, "layers_pattern is "),
        (
            PAIR,
            {"target_modules": r".*k_proj"},
            "which adapter_config.json does not target",
        ),
        (
            PAIR,
            {"target_modules": r"(?:.*)k_proj"},
            "which adapter_config.json does not target",
        ),
        (PAIR, {"target_modules": "("}, "which is not a regular expression"),
        (
            PAIR,
            {"target_modules": "(?"},
            "which is not a regular expression",
        ),
        ({"model.norm.bias": A[0]}, {"target_modules": []}, "'model.norm.bias' is not a weight"),
        ({"model.norm.weight": A[0, :5]}, {"target_modules": []}, "the adapter has"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict, settings: dict, match: str) -> None:
    adapter = _handmade(
        tmp_path / "a", {key: np.ascontiguousarray(value) for key, value in tensors.items()}, **settings
    )
    with refused(match):
        merge(random_checkpoint(np.dtype(np.float32)), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*(.*)*x", "(a|.|b)*(.*)*(.*)*" * 9 + "(?=x)x"])
def test_a_pattern_that_could_match_forever(tmp_path: Path, pattern: str) -> None:
    adapter = _handmade(tmp_path / "a", PAIR, target_modules=pattern)
    before = time.perf_counter()
    with refused("does not target|might not end"):
        merge(random_checkpoint(np.dtype(np.float32)), adapter)
    assert time.perf_counter() - before < 15


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(?:.*)q_proj", r"^(?!.*mlp).*(?:q_proj|v_proj)$", "ALL-LINEAR"])
def test_a_pattern_that_names_the_weights(tmp_path: Path, pattern: str) -> None:
    adapter = _handmade(tmp_path / "a", PAIR, target_modules=pattern)
    assert isinstance(merge(random_checkpoint(np.dtype(np.float32)), adapter).tensors[f"{Q}.weight"], MergedTensor)


def test_an_adapter_changes_a_gguf_made_from_a_gguf(tmp_path: Path) -> None:
    """Such a conversion copies stored tensors if it can; it must not copy those that an adapter changed."""
    first = write_as("gguf", random_checkpoint(np.dtype(np.float32)), tmp_path / "first.gguf")
    adapter = _handmade(tmp_path / "a", PAIR)
    merged = merge(registry.open_checkpoint(first), adapter)
    back = registry.open_checkpoint(write_as("gguf", merged, tmp_path / "second.gguf"))
    name = f"{Q}.weight"
    assert np.array_equal(back.tensors[name].load(), merged.tensors[name].load())
    assert not np.array_equal(back.tensors[name].load(), registry.open_checkpoint(first).tensors[name].load())


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["hf", "gguf", "gemma-pytorch", "litgpt", "keras", "flax", "torchtune"])
@pytest.mark.parametrize("dtype", [None, "f32", "f16"])
def test_merged_weights_are_rounded_once_to_the_stored_dtype(
    tmp_path: Path, format_name: str, dtype: str | None
) -> None:
    """By default to the base's dtype, here bfloat16; with f32 nothing is rounded. The verification reports a cast."""
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    adapter = _handmade(tmp_path / "a", PAIR)
    merged = merge(source, adapter)
    back = registry.open_checkpoint(write_as(format_name, merged, tmp_path / OUT.get(format_name, "out"), dtype=dtype))
    expected = merged.tensors[f"{Q}.weight"].load().astype(FLOAT_DTYPES[dtype or "bf16"])
    stored = back.tensors[f"{Q}.weight"].load()
    assert stored.dtype == expected.dtype and np.array_equal(stored, expected)
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert back.tensors[untouched].dtype == expected.dtype
    compared = {comparison.name: comparison for comparison in compare_tensors(merged.tensors, back.tensors)}
    assert compared[f"{Q}.weight"].ok
    assert compared[f"{Q}.weight"].rule == ("exact" if dtype == "f32" else "cast")


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["q8_0", "gptq-8", "sfp"])
@pytest.mark.parametrize("in_one_pass", [False, True])
def test_quantizers_get_unrounded_values(tmp_path: Path, type_name: str, in_one_pass: bool) -> None:
    """The codes are those of a float32 source with the same values."""
    adapter = _handmade(tmp_path / "a", PAIR)
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16))
    wide = replace(
        source, tensors={name: ArrayTensor(tensor.load().astype(np.float32)) for name, tensor in source.tensors.items()}
    )
    format_name = {"q8_0": "gguf", "gptq-8": "hf", "sfp": "gemma-cpp"}[type_name]
    outputs = []
    for number, checkpoint in enumerate((source, wide)):
        merged = merge(checkpoint, adapter)
        merged = shared(merged) if in_one_pass else merged
        groups = {"group_size": 32} if type_name == "gptq-8" else {}
        out = write_as(format_name, merged, tmp_path / f"{number}{OUT.get(format_name, '')}", type=type_name, **groups)
        outputs.append(registry.open_checkpoint(out).tensors[f"{Q}.weight"].load())
    assert np.array_equal(*outputs)


@pytest.mark.slow
def test_command_line(base: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gemma2tool.cli.main import app
    from gemma2tool.cli.options import parse_lora
    from gemma2tool.errors import UsageError
    from gemma2tool.formats.options import Adapter

    adapter = _handmade(tmp_path / "a", PAIR)
    arguments = [
        "convert",
        str(base),
        str(tmp_path / "out"),
        "--lora",
        str(adapter),
        "--lora",
        f"{adapter}=-0.5",
        "--quiet",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    source = registry.open_checkpoint(base)
    expected = merge(merge(source, adapter), adapter, -0.5)
    assert_same_tensors(expected, registry.open_checkpoint(tmp_path / "out"))
    assert parse_lora("x/y=0.5") == Adapter(Path("x/y"), 0.5) and parse_lora("x") == Adapter(Path("x"), 1.0)
    with pytest.raises(UsageError, match="is not a number"):
        parse_lora("x=y")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dtype", "f32"]])
def test_the_command_verifies_weights_merged_into_a_bfloat16_base(tmp_path: Path, options: list[str]) -> None:
    from typer.testing import CliRunner

    from gemma2tool.cli.main import app

    narrow = write_as("hf", random_checkpoint(np.dtype(ml_dtypes.bfloat16)), tmp_path / "base")
    adapter = _handmade(tmp_path / "a", PAIR)
    result = CliRunner().invoke(
        app, ["convert", str(narrow), str(tmp_path / "out"), "--lora", str(adapter), "--json", *options]
    )
    assert result.exit_code == 0, result.output
    verification = json.loads(result.stdout)["verification"]
    assert verification["passed"] and verification["kind"] == ("lossless" if options else "bf16")
    stored = registry.open_checkpoint(tmp_path / "out").tensors[f"{Q}.weight"].load()
    merged = merge(registry.open_checkpoint(narrow), adapter).tensors[f"{Q}.weight"].load()
    assert np.array_equal(stored, merged.astype(stored.dtype)) and np.array_equal(stored, merged) == bool(options)


def test_missing_files(tmp_path: Path) -> None:
    source = random_checkpoint(np.dtype(np.float32))
    with refused("no such folder"):
        merge(source, tmp_path / "absent")
    adapter = _handmade(tmp_path / "a", PAIR)
    (adapter / "adapter_model.safetensors").unlink()
    with refused("contains none of"):
        merge(source, adapter)
