"""Chat templates that are the same, differ or are lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from tests.support.tokenizers import side


@pytest.mark.parametrize(
    ("before", "after", "status", "severity"),
    [
        ("{{a}}", "{{a}}", "passed", None),
        ("{{a}}", "{{b}}", "failed", "error"),
        ("{{a}}", None, "passed", "warning"),
        (None, "{{a}}", "passed", None),
    ],
)
def test_chat_templates(model: bytes, before: str | None, after: str | None, status: str, severity: str | None) -> None:
    left = side(tokenizer__model=model, **({"tokenizer_config__json": {"chat_template": before}} if before else {}))
    right = side(tokenizer__model=model, **({"chat_template__jinja": after} if after else {}))
    gate = compare_tokenizers(left, right)
    assert gate.status == status
    assert [finding.severity for finding in gate.findings] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("format", "path", "status"),
    [
        ("hf", "out", "failed"),
        ("hf-bin", "out", "failed"),
        ("mlx", "out", "failed"),
        ("gguf", "out.gguf", "failed"),
        ("hf", "model.safetensors", "passed"),
        ("hf-bin", "pytorch_model.bin", "passed"),
        ("gemma-pytorch", "out.ckpt", "passed"),
        ("flax", "out", "passed"),
        ("keras", "out", "passed"),
        ("gemma-cpp", "out.sbs", "passed"),
    ],
)
def test_a_chat_template_is_lost_where_there_is_a_place_for_it(
    model: bytes, format: str, path: str, status: str
) -> None:
    source = side(tokenizer__model=model, tokenizer_config__json={"chat_template": "{{a}}"})
    gate = compare_tokenizers(
        source, dataclasses.replace(side(tokenizer__model=model), facts=registry.FACTS[format], path=Path(path))
    )
    assert gate.status == status and "chat template is not in the candidate" in gate.summary


def test_named_templates_and_damaged_files() -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert side(tokenizer_config__json={"chat_template": named}).tokenizer.chat_template == "d"
    for damaged in ("not json", "[1]"):
        result = compare_tokenizers(side(), side(tokenizer_config__json=damaged))
        assert result.failed and "the candidate's tokenizer cannot be read" in result.summary
