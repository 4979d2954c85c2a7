"""Gemma2Config: every spelling of a config.json, both generations of defaults, contradictions, and nothing lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model.config import SIZES, Gemma2Config, infer_from_shapes
from gemma2tool.model.config_fields import FULL, SLIDING
from gemma2tool.model.tensors import tensor_specs

# The config.json of a public fine-tune of the 2B, as transformers 4.46 spells it.
OLD = {
    "_name_or_path": "some/where",
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1",
    "use_cache": True,
    "vocab_size": 256000,
}


def old(**changes):
    return {key: value for key, value in (OLD | changes).items() if value is not ...}


def canonical_shapes(config):
    return {name: spec.shape for name, spec in tensor_specs(config).items() if spec.required}


def test_old_spelling_is_the_released_2b():
    config = Gemma2Config.from_hf(OLD)
    assert config.size_name == "2b"
    assert config.eos_token_ids == (1, 107)
    assert config.dtype == "bfloat16"
    assert config.layer_types[:3] == (SLIDING, FULL, SLIDING)
    assert config.extra == {"_name_or_path": "some/where", "cache_implementation": "hybrid"}
    assert config.warnings == ()
    written = config.to_hf()
    assert written["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written and "hidden_act" not in written
    assert written["cache_implementation"] == "hybrid"
    assert Gemma2Config.from_hf(written) == config


@pytest.mark.parametrize(
    ("alias", "changes"),
    [
        ("hidden_act alone", {"hidden_activation": ...}),
        ("hidden_activation alone", {"hidden_act": ...}),
        ("hidden_activation null", {"hidden_activation": None}),
        ("window's old name", {"sliding_window": ..., "sliding_window_size": 4096}),
        ("both window names", {"sliding_window_size": 4096}),
        ("rope_parameters", {"rope_theta": ..., "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ("no rotary field", {"rope_theta": ...}),
        ("rope_scaling null", {"rope_scaling": None}),
        ("dtype", {"torch_dtype": ..., "dtype": "bfloat16"}),
        ("both dtypes", {"dtype": "torch.bfloat16"}),
        ("integers for numbers", {"rope_theta": 10000, "attn_logit_softcapping": 50, "query_pre_attn_scalar": 256.0}),
    ],
)
def test_spellings_of_one_model(alias, changes):
    assert Gemma2Config.from_hf(old(**changes)) == Gemma2Config.from_hf(OLD)


def test_rope_scaling_of_either_generation():
    before = Gemma2Config.from_hf(old(rope_scaling={"type": "linear", "factor": 2.0}))
    after = Gemma2Config.from_hf(
        old(rope_theta=..., rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0})
    )
    assert before == after
    assert before.rope_parameters == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("version", "expected"), [("4.42.0", 3072), ("4.46.3", 3072), ("4.47.1", 2304), ("4.57.6", 2304), ("5.23.0", 2304)]
)
def test_missing_sizes_have_the_defaults_of_the_release_that_wrote_the_file(version, expected):
    source = {"model_type": "gemma2", "transformers_version": version}
    config = Gemma2Config.from_hf(source)
    assert config.hidden_size == expected
    assert config.query_pre_attn_scalar == (224 if expected == 3072 else 256)
    assert config.num_hidden_layers == (28 if expected == 3072 else 26)


def test_missing_sizes_without_a_version_are_refused():
    with pytest.raises(InputRefused, match=r"num_key_value_heads missing.*transformers_version"):
        Gemma2Config.from_hf(old(num_key_value_heads=..., transformers_version=...))


def test_missing_attention_softcap_is_assumed_with_a_warning():
    config = Gemma2Config.from_hf(old(attn_logit_softcapping=..., transformers_version="4.42.0"))
    assert config.attn_logit_softcapping == 50.0
    assert any("attn_logit_softcapping is absent" in line for line in config.warnings)
    assert Gemma2Config.from_hf(old(attn_logit_softcapping=None)).attn_logit_softcapping is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, ("num_attention_heads", "num_key_value_heads")),
        ({"layer_types": [SLIDING, FULL]}, ("layer_types", "num_hidden_layers")),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            ("rope_theta", "rope_parameters.rope_theta"),
        ),
        ({"sliding_window": None}, ("sliding_window", "layer_types")),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, ("num_labels", "id2label")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("rope_type", "low_freq_factor")),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, ("rope_type", "type")),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            ("rope_parameters", "rope_scaling"),
        ),
    ],
)
def test_contradictions_name_both_fields(changes, named):
    with pytest.raises(InputRefused) as refused:
        Gemma2Config.from_hf(old(**changes))
    assert refused.value.id == "config.contradiction"
    for name in named:
        assert name in refused.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "256000"),
        ("vocab_size", True),
        ("hidden_size", -1),
        ("num_hidden_layers", 10**12),
        ("head_dim", 15),
        ("head_dim", None),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("query_pre_attn_scalar", float("inf")),
        ("final_logit_softcapping", 0),
        ("attn_logit_softcapping", -50.0),
        ("sliding_window", 0),
        ("hidden_activation", "swiglu"),
        ("layer_types", ["sliding_attention"] * 25 + ["chunked_attention"]),
        ("layer_types", "sliding_attention"),
        ("eos_token_id", [1, "107"]),
        ("eos_token_id", []),
        ("eos_token_id", list(range(65))),
        ("pad_token_id", 0.5),
        ("attention_dropout", 1.5),
        ("tie_word_embeddings", "yes"),
        ("use_bidirectional_attention", 1),
        ("problem_type", "ranking"),
        ("num_labels", 0),
        ("id2label", ["a", "b"]),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("rope_parameters", {"rope_type": "spiral"}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("rope_theta", 0),
        ("model_type", "gemma3"),
        ("torch_dtype", 16),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    changes = {field: value}
    if field == "hidden_activation":
        changes["hidden_act"] = ...
    if field == "rope_parameters":
        changes["rope_theta"] = ...
    with pytest.raises(InputRefused) as refused:
        Gemma2Config.from_hf(old(**changes))
    assert {"rope_parameters": "rope", "rope_scaling": "factor"}.get(field, field).removeprefix(
        "torch_"
    ) in refused.value.message


@pytest.mark.parametrize(
    ("changes", "field", "value", "words"),
    [
        ({"hidden_act": "silu"}, "hidden_activation", "gelu_pytorch_tanh", "hidden_act 'silu' is ignored"),
        ({"hidden_act": "gelu", "hidden_activation": ...}, "hidden_activation", "gelu_pytorch_tanh", "(the default)"),
        ({"sliding_window_size": 2048}, "sliding_window", 4096, "sliding_window_size 2048 is ignored"),
        ({"dtype": "float32"}, "dtype", "float32", "torch_dtype is 'bfloat16' but dtype is 'float32'"),
        (
            {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}},
            "label2id",
            {"a": 0, "b": 1},
            "label2id is not the inverse",
        ),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0, "b": 1}}, "label2id", {"a": 0}, "label2id is not the inverse"),
        ({"id2label": {"0": "a"}, "label2id": {"a": "0"}}, "label2id", {"a": 0}, ""),
    ],
)
def test_leftovers_are_ignored_as_in_transformers(changes, field, value, words):
    config = Gemma2Config.from_hf(old(**changes))
    assert getattr(config, field) == value
    assert any(words in note for note in config.notes) if words else not config.notes
    assert Gemma2Config.from_hf(config.to_hf()) == config


def test_is_causal_false_is_bidirectional_attention():
    config = Gemma2Config.from_hf(old(is_causal=False))
    assert config.use_bidirectional_attention and config.to_hf()["is_causal"] is False
    assert Gemma2Config.from_hf(config.to_hf()) == config
    null = Gemma2Config.from_hf(old(is_causal=None))
    assert null.use_bidirectional_attention and any("is_causal is null" in line for line in null.warnings)
    causal = Gemma2Config.from_hf(old(is_causal=True))
    assert not causal.use_bidirectional_attention and causal.to_hf()["is_causal"] is True
    with pytest.raises(InputRefused, match="is_causal is true but use_bidirectional_attention is true"):
        Gemma2Config.from_hf(old(is_causal=True, use_bidirectional_attention=True))
    with pytest.raises(InputRefused, match="is_causal is 0"):
        Gemma2Config.from_hf(old(is_causal=0))


def test_an_empty_list_of_layer_types_is_refused_and_null_is_absent():
    with pytest.raises(InputRefused, match="layer_types has 0 entries but num_hidden_layers is 26"):
        Gemma2Config.from_hf(old(layer_types=[]))
    assert Gemma2Config.from_hf(old(layer_types=None, attention_dropout=None)) == Gemma2Config.from_hf(OLD)


def test_a_list_is_not_a_config():
    with pytest.raises(InputRefused, match="JSON object"):
        Gemma2Config.from_hf([OLD])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("9b", {"query_pre_attn_scalar": 224}, "before 2024-07-12"),
        ("27b", {"query_pre_attn_scalar": 128}, "head_dim"),
        ("27b", {"rope_theta": 160000.0}, "rope_theta is 160000.0; the released 27b has 10000.0"),
        ("2b", {"sliding_window": 32768}, "sliding_window"),
        ("2b", {"eos_token_id": (1, 300000)}, "300000 is outside"),
        ("2b", {"eos_token_id": (1, 300000, 300001)}, "300000, 300001 are outside"),
        ("2b", {"num_attention_heads": 10, "num_key_value_heads": 5}, "query_pre_attn_scalar|not a multiple"),
    ],
)
def test_suspicious_values_are_warnings(name, changes, words):
    config = dataclasses.replace(SIZES[name], **changes)
    assert any(word in line for line in config.warnings for word in words.split("|"))


def test_released_sizes():
    parameters = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}
    tensors = {"2b": 288, "9b": 464, "27b": 508}
    for name, config in SIZES.items():
        shapes = canonical_shapes(config)
        total = sum(math.prod(shape) for shape in shapes.values())
        assert (total, len(shapes)) == (parameters[name], tensors[name])
        assert config.size_name == name and config.warnings == ()
        assert infer_from_shapes(shapes) == config
    assert SIZES["27b"].query_scale == 1 / 12
    assert SIZES["2b"].layer_window(0) == 4096 and SIZES["2b"].layer_window(1) is None


def test_shapes_of_a_released_width_are_enough():
    shapes = canonical_shapes(dataclasses.replace(SIZES["27b"], num_hidden_layers=5, layer_types=(), vocab_size=256002))
    config = infer_from_shapes(shapes)
    assert (config.num_hidden_layers, config.vocab_size, config.query_pre_attn_scalar) == (5, 256002, 144)
    assert len(config.layer_types) == 5
    assert any("that of the released 27b is assumed" in line for line in config.warnings)


def test_shapes_of_a_classifier():
    shapes = canonical_shapes(SIZES["2b"]) | {"score.weight": (3, 2304)}
    assert infer_from_shapes(shapes).architectures == ("Gemma2ForSequenceClassification",)
    assert infer_from_shapes(shapes | {"score.bias": (3,)}).architectures == ("Gemma2ForTokenClassification",)
    assert infer_from_shapes(shapes).num_labels == 3


def test_other_widths_need_a_config():
    shapes = canonical_shapes(dataclasses.replace(SIZES["2b"], hidden_size=256))
    with pytest.raises(UsageError, match="head_dim") as needed:
        infer_from_shapes(shapes)
    assert "--config" in needed.value.hint
    with pytest.raises(UsageError, match=r"/models/odd: no config"):
        infer_from_shapes(shapes, Path("/models/odd"))
    with pytest.raises(InputRefused, match=r"model\.embed_tokens\.weight"):
        infer_from_shapes({})


@pytest.mark.oracle
def test_configs_of_peers_round_trip(oracles):
    seen = 0
    for path in sorted(oracles.glob("**/config.json")):
        source = json.loads(path.read_text())
        if source.get("model_type") != "gemma2":
            continue
        seen += 1
        config = Gemma2Config.from_hf(copy.deepcopy(source))
        written = json.loads(json.dumps(config.to_hf()))
        assert Gemma2Config.from_hf(written) == config
        if source.get("transformers_version", "").startswith("5."):
            assert written == source, path
        assert config.extra.items() <= written.items()
    assert seen > 10


sizes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(1, 400_000),
        "hidden_size": st.integers(1, 64).map(lambda n: 8 * n),
        "intermediate_size": st.integers(1, 5000),
        "num_hidden_layers": st.integers(1, 60),
        "num_attention_heads": st.sampled_from([2, 4, 8]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "head_dim": st.integers(1, 128).map(lambda n: 2 * n),
        "query_pre_attn_scalar": st.integers(1, 300),
        "sliding_window": st.integers(1, 10_000),
        "attn_logit_softcapping": st.none() | st.floats(1, 100),
        "final_logit_softcapping": st.none() | st.floats(1, 100),
        "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        "tie_word_embeddings": st.booleans(),
        "use_bidirectional_attention": st.sampled_from([None, False, True]),
    }
)


@pytest.mark.peer
@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(fields=sizes, extra=st.dictionaries(st.text(min_size=1).map("x_".__add__), st.integers(), max_size=3))
def test_agrees_with_transformers_both_ways(fields, extra):
    """gemma2tool writes back unchanged what transformers writes; transformers reads the same config from what
    gemma2tool writes."""
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers.Gemma2Config(**fields).to_json_string(use_diff=True)) | extra
    assert json.loads(json.dumps(Gemma2Config.from_hf(written).to_hf())) == written
    back = transformers.Gemma2Config(**Gemma2Config(**fields).to_hf())
    for name in fields:
        assert getattr(back, name) == getattr(transformers.Gemma2Config(**fields), name)


def test_a_list_of_many_ids_is_refused_in_one_short_line():
    with pytest.raises(InputRefused) as caught:
        Gemma2Config(eos_token_id=list(range(100_000)))
    assert (
        caught.value.id == "config.value" and "at most 64" in caught.value.message and len(caught.value.message) < 300
    )
