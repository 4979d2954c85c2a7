"""The config gate: fields that must be equal, that may differ, and that a format cannot represent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.verify.compare.config import compare_configs
from gemma2tool.verify.compare.consumers import assumptions
from gemma2tool.verify.finding import GateResult

BASE = Gemma2Config()


def compare(**changes: object) -> GateResult:
    return compare_configs(BASE, dataclasses.replace(BASE, **changes))


def test_equal_configs_pass_without_findings() -> None:
    gate = compare()
    assert gate.status == "passed" and not gate.findings


@pytest.mark.parametrize("changes", [
    {"query_pre_attn_scalar": 224}, {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 30.0},
    {"final_logit_softcapping": 50.0}, {"final_logit_softcapping": None}, {"sliding_window": 4095},
    {"rope_theta": 160000.0}, {"rms_norm_eps": 1e-5}, {"hidden_activation": "gelu"}, {"vocab_size": 255999},
    {"layer_types": tuple("full_attention" if i % 2 == 0 else "sliding_attention" for i in range(26))},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"tie_word_embeddings": False}, {"attention_bias": True},
    {"use_bidirectional_attention": True}, {"num_key_value_heads": 8}, {"head_dim": 128}, {"intermediate_size": 9215},
    {"bos_token_id": 1}, {"eos_token_id": 107}, {"max_position_embeddings": 4096},
])  # fmt: skip
def test_a_difference_that_changes_the_model_fails_and_is_named(changes: dict[str, object]) -> None:
    gate = compare(**changes)
    (name,) = changes
    assert gate.status == "failed"
    assert [finding.subject for finding in gate.findings if finding.severity == "error"] == [name]
    assert name in gate.summary


@pytest.mark.parametrize(("changes", "severity"), [
    ({"eos_token_id": (1, 107)}, "warning"), ({"max_position_embeddings": 16384}, "warning"),
    ({"pad_token_id": 1}, "warning"),
    ({"pad_token_id": None}, "note"), ({"dtype": "float32"}, None), ({"initializer_range": 0.01}, "note"),
    ({"use_cache": False}, "note"), ({"attention_dropout": 0.1}, "note"), ({"transformers_version": "5"}, None),
])  # fmt: skip
def test_a_difference_that_does_not_change_the_model_passes(changes: dict[str, object], severity: str | None) -> None:
    gate = compare(**changes)
    assert gate.status == "passed"
    assert [finding.severity for finding in gate.findings] == ([severity] if severity else [])


def test_a_missing_stop_fails_and_an_additional_one_passes() -> None:
    chat = dataclasses.replace(BASE, eos_token_id=(1, 107))
    assert compare_configs(chat, BASE).status == "failed"
    assert compare_configs(BASE, chat).status == "passed"


def test_another_padding_token_fails_for_a_sequence_classifier() -> None:
    kind = {"architectures": ("Gemma2ForSequenceClassification",)}
    source, other = (dataclasses.replace(BASE, pad_token_id=pad, **kind) for pad in (0, 1))
    assert compare_configs(source, other).status == "failed"


def test_a_value_that_a_format_cannot_represent_is_explained() -> None:
    other = dataclasses.replace(BASE, query_pre_attn_scalar=128)
    gate = compare_configs(BASE, other, cannot_represent=registry.FACTS["gguf"].cannot_represent)
    assert "llama.cpp uses head_dim" in gate.summary


@pytest.mark.parametrize(("format", "changes", "fields"), [
    ("hf", {}, []), ("gguf", {}, []), ("gemma-pytorch", {}, []), ("keras", {}, []), ("gemma-cpp", {}, []),
    ("maxtext", {}, []),
    ("mlx", {}, ["sliding_window"]), ("torchtune", {}, ["final_logit_softcapping"]),
    ("gguf", {"query_pre_attn_scalar": 144}, ["query_pre_attn_scalar"]),
    ("keras", {"query_pre_attn_scalar": 144}, ["query_pre_attn_scalar"]),
    ("mlx", {"max_position_embeddings": 4096, "attention_bias": True}, ["attention_bias"]),
    ("keras", {"rope_theta": 160000.0}, ["rope_theta"]), ("gemma-cpp", {"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
])  # fmt: skip
def test_an_assumption_of_the_consumer_is_a_warning(format: str, changes: dict[str, object], fields: list[str]) -> None:
    config = dataclasses.replace(BASE, **changes)
    consumer_assumptions = assumptions(Checkpoint(Path("x"), registry.FACTS[format], config, {}))
    assert [name for name, _ in consumer_assumptions] == fields
    gate = compare_configs(config, config, assumptions=consumer_assumptions)
    assert gate.status == "passed" and [finding.severity for finding in gate.findings] == ["warning"] * len(fields)


def test_rounded_activations_are_reported() -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": ArrayTensor(np.zeros((2, 2), np.float32), stored="w8a8-int8")}
    assert "rounded to int8" in assumptions(Checkpoint(Path("x"), FormatFacts("hf"), BASE, tensors))[0][1]


def test_different_spellings_of_a_value_are_equal() -> None:
    assert compare(rms_norm_eps=9.999999974752427e-07).status == "passed", "GGUF stores it in float32"
    assert compare(rope_scaling={"rope_type": "default"}).status == "passed"
    assert compare(use_bidirectional_attention=False).status == "passed"
    assert compare(eos_token_id=(1,)).findings == ()


def test_differing_layers_are_listed() -> None:
    types = list(BASE.layer_types)
    types[3] = "sliding_attention"
    gate = compare(layer_types=tuple(types))
    assert "layers 3 differ (layer 3: source full_attention, candidate sliding_attention)" in gate.summary


@pytest.mark.parametrize(("name", "value"), [("attn_logit_softcapping", "50.0"), ("final_logit_softcapping", "30.0")])
def test_a_cap_absent_from_the_file_is_a_warning(name: str, value: str) -> None:
    """transformers assumes it; other programs compute without a cap."""
    content = BASE.to_hf()
    without = Gemma2Config.from_hf({key: value for key, value in content.items() if key != name})
    gate = compare_configs(Gemma2Config.from_hf(content), without)
    assert gate.status == "passed" and [(finding.severity, finding.subject) for finding in gate.findings] == [
        ("warning", name)
    ]
    assert f"transformers assumes {value}" in gate.findings[0].message and "1 warning" in gate.summary
    assert not compare_configs(without, without).findings, "absent from the source, too"
