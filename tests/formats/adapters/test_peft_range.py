"""Every tuner and every option of the installed peft: merged as trained, or refused by name; never silently off."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.formats.adapters.merging import merge
from tests.support.checkpoints import random_checkpoint
from tests.support.formats import refused, write_as
from tests.support.peers import Peer
from tests.support.peft_peer import LINEAR, Trained, assert_merged, train

peft = Peer("peft")
pytestmark = [pytest.mark.peer, pytest.mark.slow]

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_as("hf", random_checkpoint(np.dtype(np.float32)), tmp_path_factory.mktemp("base") / "hf")


def test_every_tuner_but_lora_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    others = {tuner.value for tuner in peft.PeftType} - {"LORA", "TRAINABLE_TOKENS"}
    assert len(others) > 20
    for tuner in others:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": tuner}))
        with refused(f"peft_type is '{tuner}'"):
            merge(registry.open_checkpoint(base), tmp_path)


def _lora(**options: object) -> object:
    return peft.LoraConfig(**{**PLAIN, **options})


def _merged_or_refused(base: Path, tmp_path: Path, trained: Trained, option: str) -> bool:
    """Whether the adapter was merged; if not, it must have been refused by the option's name."""
    try:
        assert_merged(base, trained, tmp_path)
    except InputRefused as error:
        assert option in error.message
        return False
    return True


TIED = "ensure_weight_tying"
MERGED: dict[str, list[dict[str, object]]] = {
    "task_type": [{"task_type": None}],
    "peft_type": [{}],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "X", "parent_library": "y", "unsloth_fixed": True}}],
    "peft_version": [{"peft_version": "0.1"}],
    "base_model_name_or_path": [{"base_model_name_or_path": "elsewhere"}],
    "revision": [{"revision": "main"}],
    "r": [{"r": 7}],
    "target_modules": [
        {"target_modules": "all-linear"},
        {"target_modules": [*LINEAR, "c_attn", "wte"]},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|v|up)_proj"},
        {"target_modules": r".*\.(?!.*gate).*(?:q_proj|up_proj)$"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
    ],
    "exclude_modules": [{"exclude_modules": ["gate_proj"]}, {"exclude_modules": r".*\.(gate|up)_proj"}],
    "lora_alpha": [{"lora_alpha": 16.5}, {"lora_alpha": 1}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "use_rslora": [{"use_rslora": True}],
    "modules_to_save": [
        {"modules_to_save": ["input_layernorm", "norm"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    "layers_to_transform": [{"layers_to_transform": [0, 2]}, {"layers_to_transform": 1}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "rank_pattern": [
        {"rank_pattern": {"q_proj": 2, "layers.0.mlp.gate_proj": 8}},
        {"rank_pattern": {r".*\.layers\.(?:0|1)\.self_attn\.q_proj": 2, "^model.layers.2.mlp.up_proj": 3}},
    ],
    "alpha_pattern": [{"alpha_pattern": {"layers.1.self_attn.q_proj": 30, r"(?:gate|up)_proj": 3}, "use_rslora": True}],
    "use_dora": [{"use_dora": True}, {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}],
    "trainable_token_indices": [
        {"trainable_token_indices": [5, 6, 150]},
        {"trainable_token_indices": {"embed_tokens": [5, 9]}, TIED: True},
        {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    ],
    TIED: [
        {"target_modules": ["q_proj", "embed_tokens"], TIED: True},
        {"target_modules": ["q_proj", "lm_head"], TIED: True},
        {"modules_to_save": ["embed_tokens"], TIED: True},
        {"modules_to_save": ["lm_head"], TIED: True},
    ],
    "velora_config": [{"velora_config": {"num_groups": 4}}],
    "qalora_group_size": [{"qalora_group_size": 8}],
    "megatron_core": [{"megatron_core": "elsewhere"}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "eva_config": [{"eva_config": {"rho": 1.0}}],
    "corda_config": [{"corda_config": {"verbose": True}}],
    "lora_ga_config": [{"lora_ga_config": {"stable_gamma": 8}}],
    "inference_mode": [{}],
    "runtime_config": [{}],
    "monteclora_config": [{"monteclora_config": {"num_samples": 2, "buffer_size": 4}}],
}
"""Fields of LoraConfig -> settings of adapters that are merged."""

REFUSED: dict[str, dict[str, object]] = {
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["q_proj.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "use_qalora": {"use_qalora": True},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}},
    "arrow_config": {"arrow_config": {"top_k": 1}},
    "kasa_config": {"kasa_config": {"beta": 0.1}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "megatron_config": {"megatron_config": {"tensor_model_parallel_size": 1}},
}
"""Fields of LoraConfig -> settings of adapters that are refused by the field's name."""


def test_every_field_of_the_installed_peft_has_a_case() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == {*MERGED, *REFUSED, "init_lora_weights"}


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        pytest.param(field, settings, id=f"{field}-{number}")
        for field, cases in MERGED.items()
        for number, settings in enumerate(cases)
    ],
)
def test_an_option_that_is_merged(base: Path, tmp_path: Path, field: str, settings: dict) -> None:
    assert_merged(base, train(base, tmp_path / "adapter", _lora(**settings)), tmp_path)


@pytest.mark.parametrize("field", REFUSED)
def test_an_option_that_is_refused_by_name(base: Path, tmp_path: Path, field: str) -> None:
    """The options that peft applies to a Gemma 2 here are trained; the others are only in the config."""
    folder = tmp_path / "adapter"
    _lora(**REFUSED[field]).save_pretrained(folder)
    with refused(f"uses {field}"):
        merge(registry.open_checkpoint(base), folder)


NAMED = ["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica"]
INITIALIZATIONS = [True, False, *NAMED, "pissa_niter_4", "lora_ga"]


def test_every_initialization_of_the_installed_peft_has_a_case() -> None:
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = {value for part in typing.get_args(hint) for value in typing.get_args(part)}
    assert named == {*NAMED, "pissa_niter_[number of iters]"}


@pytest.mark.parametrize("value", INITIALIZATIONS)
def test_every_initialization(base: Path, tmp_path: Path, value: object) -> None:
    """peft 1626, 1828, 1929: an adapter that starts from a part of the base's weights is not a plain difference."""
    needs_data = ("corda", "lora_ga", "loftq", "eva")
    options = {"loftq_config": {"loftq_bits": 4}} if value == "loftq" else {}
    if value not in needs_data:
        trained = train(base, tmp_path / "adapter", _lora(init_lora_weights=value, **options))
        merged = _merged_or_refused(base, tmp_path, trained, f"init_lora_weights is {value!r}")
        assert merged == (value != "pissa_niter_4")
        return
    _lora(init_lora_weights=value, **options).save_pretrained(tmp_path / "adapter")
    with refused("contains none of" if value == "eva" else f"init_lora_weights is {value!r}"):
        merge(registry.open_checkpoint(base), tmp_path / "adapter")


@pytest.mark.parametrize("value", ["pissa", "olora"])
@pytest.mark.parametrize("more", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_an_initialization_with_other_options(base: Path, tmp_path: Path, value: str, more: dict) -> None:
    assert_merged(base, train(base, tmp_path / "adapter", _lora(init_lora_weights=value, **more)), tmp_path)


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_an_initialization_that_peft_converted(base: Path, tmp_path: Path, value: str) -> None:
    """save_pretrained(path_initial_model_for_weight_conversion=...) makes a plain adapter of twice the rank."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.Gemma2ForCausalLM.from_pretrained(base, dtype=torch.float32), _lora(init_lora_weights=value)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = value
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model.eval()(input_ids=torch.tensor([[2, 17, 99, 4, 158, 31, 5, 6, 120, 77]])).logits.numpy()
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_merged(base, Trained(tmp_path / "adapter", logits, np.zeros_like(logits)), tmp_path)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_option_without_a_value_is_accepted(base: Path, tmp_path: Path, value: object) -> None:
    trained = train(base, tmp_path / "adapter", _lora())
    _edit(trained.folder, new_option=value)
    assert_merged(base, trained, tmp_path)


@pytest.mark.parametrize("value", [True, 1e-6, "x", [0], {"a": None}])
def test_an_unknown_option_with_a_value_is_refused(base: Path, tmp_path: Path, value: object) -> None:
    """A later peft's option may change what the adapter computes."""
    _lora().save_pretrained(tmp_path)
    _edit(tmp_path, new_option=value)
    with refused("sets 'new_option' to .*, an option that is not known"):
        merge(registry.open_checkpoint(base), tmp_path)


def test_trained_tokens_without_lora(base: Path, tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(token_indices=[3, 80, 159], target_modules=["embed_tokens"])
    assert_merged(base, train(base, tmp_path / "adapter", config), tmp_path)


def _edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
