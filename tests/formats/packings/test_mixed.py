"""Several types of compressed-tensors in one folder: written from patterns, read by the library's rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.packings.compressed_groups import Groups
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.pipeline.budget.targets import target_for
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.commands import run
from tests.support.formats import write_as
from tests.support.options import write_options

CONFIG = replace(SMALL, hidden_size=128, intermediate_size=256, num_hidden_layers=2, layer_types=SMALL.layer_types[:2])
TYPES = (("self_attn", "w8a16"), (r"layers\.1\.mlp\.down_proj", "fp8-dynamic"))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def written(folder: Path, type: str, *module_types: tuple[str, str]) -> Path:
    return write_as("hf", random_checkpoint(BFLOAT16, CONFIG), folder, type=type, module_types=module_types)


@pytest.mark.slow
def test_every_weight_is_what_its_type_makes_of_it_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "mixed", "w4a16", *TYPES)
    groups = config_of(folder)["config_groups"].values()
    assert config_of(folder)["format"] == "mixed-precision"
    assert [group["format"] for group in groups] == ["pack-quantized", "pack-quantized", "float-quantized"]
    targets = [target for group in groups for target in group["targets"]]
    assert "Linear" not in targets and "model.layers.1.mlp.down_proj" in targets
    assert r"re:.*\.self_attn\.q_proj$" in targets
    alone = {}
    for name in ("w4a16", "w8a16", "fp8-dynamic"):
        alone[name] = registry.open_checkpoint(written(tmp_path / name, name))
    with registry.open_checkpoint(folder) as mixed:
        for name, tensor in mixed.tensors.items():
            is_down = name == "model.layers.1.mlp.down_proj.weight"
            expected = "w8a16" if "self_attn" in name else "fp8-dynamic" if is_down else "w4a16"
            assert np.array_equal(tensor.load(), alone[expected].tensors[name].load()), name
            assert not name.endswith("proj.weight") or tensor.stored == expected


def test_float8_activations(tmp_path: Path) -> None:
    """w4afp8 has w4a16's weights, and says how activations are quantized."""
    folder = written(tmp_path / "a", "w4afp8")
    [group] = config_of(folder)["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["format"] == "pack-quantized"
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["dynamic"]) == (8, "float", "token", True)
    other = registry.open_checkpoint(written(tmp_path / "b", "w4a16"))
    with registry.open_checkpoint(folder) as checkpoint:
        assert all(np.array_equal(t.load(), other.tensors[n].load()) for n, t in checkpoint.tensors.items())


def test_what_engines_fuse() -> None:
    options = write_options(type="w4a16", module_types=(("k_proj", "w8a16"),))
    output = registry.by_name("hf").layout(random_checkpoint(BFLOAT16, CONFIG), options)
    [remark] = [warning for warning in output.warnings if "vLLM" in warning]
    assert "self_attn.q_proj: w4a16" in remark and "self_attn.k_proj: w8a16" in remark and "(and 1 more)" in remark


def test_types_of_another_library(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--module-type mlp=nf4: not a type of w4a16's"):
        written(tmp_path / "a", "w4a16", ("mlp", "nf4"))
    with pytest.raises(UsageError, match="matches no weight"):
        written(tmp_path / "a", "w4a16", ("experts", "w8a16"))


@pytest.mark.slow
@pytest.mark.peer
def test_transformers_computes_what_the_dequantized_weights_do(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder = written(tmp_path / "mixed", "w4a16", ("self_attn", "w8a16"), (r"layers\.1\.mlp\.down_proj", "w8a16"))
    with registry.open_checkpoint(folder) as checkpoint:
        plain = write_as("hf", checkpoint, tmp_path / "plain", dtype="bf16")
    logits = []
    for path in (folder, plain):
        model = transformers.Gemma2ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[2, 17, 99, 4, 158, 31, 5, 6]])).logits)
    assert torch.equal(*logits)


def test_a_budgets_choice() -> None:
    """q, k and v alike, gate and up alike, and several types in one folder."""
    source = random_checkpoint(BFLOAT16, CONFIG)
    target = target_for("hf", source, write_options())
    target.check(("w4a16", "w8a16", "fp8-dynamic"))
    with pytest.raises(UsageError, match="nf4 and w4a16 cannot be mixed in one folder"):
        target.check(("nf4", "w4a16"))
    names = [name for name in source.tensors if name.endswith("_proj.weight")]
    units = target.units(names)
    assert max(map(len, units)) == 3 and sorted(map(len, units)) == [1, 1, 1, 1, 2, 2, 3, 3]
    types = {name: "w8a16" if "v_proj" in name else "w4a16" for name in names}
    options = target.options(types)
    assert options.type == "w4a16" and {type for _, type in options.packing.module_types} == {"w8a16"}
    output = registry.by_name("hf").layout(source, options)
    encoders = {item.name: item.encoder.name for item in output.tensors if item.name in types}
    assert encoders == types
    assert target.file_bytes(types) == output.nbytes


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    source = write_as("hf", random_checkpoint(BFLOAT16, CONFIG), tmp_path / "source")
    words = ["quantize", source, tmp_path / "out", "--type", "w4afp8", "--module-type", "self_attn=w8a16", "--json"]
    result = run(*words, "--gate", "kl=20", "--gate", "top1=0")
    assert result.exit_code == 0, result.output
    assert run("quantize", source, tmp_path / "x", "--type", "gptq-4", "--module-type", "mlp=gptq-8").exit_code == 2


# -- reading ----------------------------------------------------------------------------------------------------------

W4, W8 = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}


def groups(**targets: list[str]) -> dict:
    weights = {"w8": W8, "w4": W4}
    return {"config_groups": {name: {"targets": names, "weights": weights[name]} for name, names in targets.items()}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [
        {"w8": ["re:.*self_attn.*"], "w4": ["Linear"]},
        {"w8": ["Linear"], "w4": ["model.layers.0.mlp.up_proj"]},
        {"w8": ["re:.*mlp.*"], "w4": ["model.layers.0.mlp.up_proj", "Linear"]},
        {"w8": [r"re:.*\.(q|k|v)_proj$", "re:.*b"], "w4": ["re:.*", "re:model.*"]},
        {"w8": ["re:.*up_proj"], "w4": ["re:.*mlp", "Linear"]},
        {"w8": ["re:up_proj", "re:layers"], "w4": ["Linear"]},
    ],
)
def test_the_librarys_order_of_targets(targets: dict[str, list[str]]) -> None:
    matching = pytest.importorskip("compressed_tensors.utils.match")
    torch = pytest.importorskip("torch")
    linear, read = torch.nn.Linear(2, 2, bias=False), Groups(groups(**targets))
    of_target = {name: W8 if kind == "w8" else W4 for kind, names in targets.items() for name in names}
    for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{module}"
        assert read.weights_of(name) == of_target[matching.match_targets(name, linear, list(of_target))[0]], name


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ({"w8": ["re:.*mlp.*"], "w4": ["re:.*q_proj"]}, "is a target of none"),
        ({"w8": ["re:(a+)+$"], "w4": ["Linear"]}, "could match forever"),
        ({"w8": ["re:.*.*.*.*x"], "w4": ["Linear"]}, "could match forever"),
        ({"w8": ["re:("], "w4": ["Linear"]}, "is not a regular expression"),
        ({"w8": ["Linear"], "w4": ["Linear"]}, "have the target 'Linear'"),
    ],
)
def test_groups_that_are_refused(targets: dict[str, list[str]], match: str) -> None:
    with pytest.raises(InputRefused, match=match):
        Groups(groups(**targets)).weights_of("model.layers.0.self_attn.o_proj")


def test_configs_without_weights() -> None:
    for content in ({}, {"config_groups": {}}, {"config_groups": {"a": {"weights": None}}}, {"config_groups": [1]}):
        with pytest.raises(InputRefused, match="no weights entry"):
            Groups(content)
