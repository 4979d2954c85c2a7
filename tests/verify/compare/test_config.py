"""Config fields: what must be equal, what may differ, what a format cannot say."""

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


def test_equal_configs_pass_without_a_word() -> None:
    found = compare()
    assert found.status == "passed" and not found.findings


@pytest.mark.parametrize("changes", [
    {"query_pre_attn_scalar": 224}, {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 30.0},
    {"final_logit_softcapping": 50.0}, {"final_logit_softcapping": None}, {"sliding_window": 4095},
    {"rope_theta": 160000.0}, {"rms_norm_eps": 1e-5}, {"hidden_activation": "gelu"}, {"vocab_size": 255999},
    {"layer_types": tuple("full_attention" if i % 2 == 0 else "sliding_attention" for i in range(26))},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"tie_word_embeddings": False}, {"attention_bias": True},
    {"use_bidirectional_attention": True}, {"num_key_value_heads": 8}, {"head_dim": 128}, {"intermediate_size": 9215},
    {"bos_token_id": 1}, {"eos_token_id": 107}, {"max_position_embeddings": 4096},
])  # fmt: skip
def test_what_changes_the_model_fails_and_is_named(changes: dict[str, object]) -> None:
    found = compare(**changes)
    (name,) = changes
    assert found.status == "failed"
    assert [finding.subject for finding in found.findings if finding.severity == "error"] == [name]
    assert name in found.summary


@pytest.mark.parametrize(("changes", "severity"), [
    ({"eos_token_id": (1, 107)}, "warning"), ({"max_position_embeddings": 16384}, "warning"), ({"pad_token_id": 1}, "warning"),
    ({"pad_token_id": None}, "note"), ({"dtype": "float32"}, None), ({"initializer_range": 0.01}, "note"),
    ({"use_cache": False}, "note"), ({"attention_dropout": 0.1}, "note"), ({"transformers_version": "5"}, None),
])  # fmt: skip
def test_what_does_not_change_it_passes(changes: dict[str, object], severity: str | None) -> None:
    found = compare(**changes)
    assert found.status == "passed"
    assert [finding.severity for finding in found.findings] == ([severity] if severity else [])


def test_a_stop_that_is_lost_fails_and_one_more_does_not() -> None:
    chat = dataclasses.replace(BASE, eos_token_id=(1, 107))
    assert compare_configs(chat, BASE).status == "failed"
    assert compare_configs(BASE, chat).status == "passed"


def test_padding_decides_for_a_sequence_classifier() -> None:
    kind = {"architectures": ("Gemma2ForSequenceClassification",)}
    source, other = (dataclasses.replace(BASE, pad_token_id=pad, **kind) for pad in (0, 1))
    assert compare_configs(source, other).status == "failed"


def test_what_a_format_cannot_say_is_explained() -> None:
    other = dataclasses.replace(BASE, query_pre_attn_scalar=128)
    found = compare_configs(BASE, other, cannot_represent=registry.FACTS["gguf"].cannot_represent)
    assert "llama.cpp uses head_dim" in found.summary


@pytest.mark.parametrize(("format", "changes", "fields"), [
    ("hf", {}, []), ("gguf", {}, []), ("gemma-pytorch", {}, []), ("keras", {}, []), ("gemma-cpp", {}, []), ("maxtext", {}, []),
    ("mlx", {}, ["sliding_window"]), ("torchtune", {}, ["final_logit_softcapping"]),
    ("gguf", {"query_pre_attn_scalar": 144}, ["query_pre_attn_scalar"]), ("keras", {"query_pre_attn_scalar": 144}, ["query_pre_attn_scalar"]),
    ("mlx", {"max_position_embeddings": 4096, "attention_bias": True}, ["attention_bias"]),
    ("keras", {"rope_theta": 160000.0}, ["rope_theta"]), ("gemma-cpp", {"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
])  # fmt: skip
def test_what_the_consumer_computes_otherwise_is_a_warning(
    format: str, changes: dict[str, object], fields: list[str]
) -> None:
    config = dataclasses.replace(BASE, **changes)
    assumed = assumptions(Checkpoint(Path("x"), registry.FACTS[format], config, {}))
    assert [name for name, _ in assumed] == fields
    found = compare_configs(config, config, assumptions=assumed)
    assert found.status == "passed" and [each.severity for each in found.findings] == ["warning"] * len(fields)


def test_activations_that_are_rounded_when_run_are_told() -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": ArrayTensor(np.zeros((2, 2), np.float32), stored="w8a8-int8")}
    assert "rounded to int8" in assumptions(Checkpoint(Path("x"), FormatFacts("hf"), BASE, tensors))[0][1]


def test_spellings_of_the_same_are_the_same() -> None:
    assert compare(rms_norm_eps=9.999999974752427e-07).status == "passed", "GGUF keeps it in float32"
    assert compare(rope_scaling={"rope_type": "default"}).status == "passed"
    assert compare(use_bidirectional_attention=False).status == "passed"
    assert compare(eos_token_id=(1,)).findings == ()


def test_layers_that_differ_are_listed() -> None:
    types = list(BASE.layer_types)
    types[3] = "sliding_attention"
    found = compare(layer_types=tuple(types))
    assert "layers 3 differ (layer 3: source full_attention, candidate sliding_attention)" in found.summary


@pytest.mark.parametrize(("name", "value"), [("attn_logit_softcapping", "50.0"), ("final_logit_softcapping", "30.0")])
def test_a_cap_that_a_file_leaves_out_is_a_warning(name: str, value: str) -> None:
    """transformers assumes it; other programs compute without a cap."""
    said = BASE.to_hf()
    silent = Gemma2Config.from_hf({key: each for key, each in said.items() if key != name})
    found = compare_configs(Gemma2Config.from_hf(said), silent)
    assert found.status == "passed" and [(each.severity, each.subject) for each in found.findings] == [
        ("warning", name)
    ]
    assert f"transformers assumes {value}" in found.findings[0].message and "1 warning" in found.summary
    assert not compare_configs(silent, silent).findings, "its source leaves it out too"
