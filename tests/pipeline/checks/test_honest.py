"""Honest files raise no doubt, whatever wrote them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool import api
from gemma2tool.errors import ToolError
from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.checks.finding import CheckResult
from gemma2tool.pipeline.conversion import save
from tests.support import false_alarms
from tests.support.checkpoints import first_layers, random_checkpoint
from tests.support.formats import suffix_of
from tests.support.options import write_options
from tests.support.oracles import oracles_or_skip
from tests.support.paths import TINY


def checked(source: Checkpoint, to: str, folder: Path, **options: object) -> CheckResult:
    """The result for ``source`` written in the format ``to``."""
    path = folder / f"out{suffix_of(to)}"
    save(source, path, write_options(**options), to=to, threads=2)
    config = source.config if registry.by_name(to).lacks_config(path) else None
    return api.check(path, config=config)


def findings(result: CheckResult) -> list[tuple[str, str]]:
    return [(finding.id, finding.message) for finding in result.findings if finding.severity != "note"]


@pytest.mark.slow
def test_the_fixture_has_nothing_to_remark() -> None:
    result = api.check(TINY / "model.ckpt")
    assert result.sane and result.findings == () and result.format == "gemma-pytorch"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "f32"}, {"type": "q4_0"}, {"type": "q2_k"}], ids=str)
def test_gguf(tmp_path: Path, options: dict[str, object]) -> None:
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        result = checked(source, "gguf", tmp_path, **options)
    assert result.findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("type", ["nf4", "w4a16", "int8"])
def test_quantized_folders(tmp_path: Path, type: str) -> None:
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        assert checked(source, "hf", tmp_path, type=type).findings == ()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_random_weights(dtype: str) -> None:
    checkpoint = random_checkpoint(false_alarms.DTYPES[dtype], seed=1)
    assert findings(api.check(checkpoint)) == []


def test_norms_with_means_far_from_zero() -> None:
    """Norms of trained models have means from below 0 to above 10; those of one place may all be large."""
    checkpoint = random_checkpoint(np.dtype(np.float32), seed=2)
    for name, tensor in checkpoint.tensors.items():
        if "post_" in name or name == "model.norm.weight":
            tensor.array += 12.0 if name == "model.norm.weight" else 1.0  # type: ignore[attr-defined]
    assert findings(api.check(checkpoint)) == []


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fixture", "as drawn", "Student's t"])
def test_every_format_and_type(tmp_path: Path, weights: str) -> None:
    if weights == "fixture":
        source = first_layers(registry.open_checkpoint(TINY / "model.ckpt"), 2)
    else:
        source = false_alarms.source(weights, "bf16")
    targets = [*false_alarms.targets(), *((name, {}) for name in registry.NAMES if name not in ("gguf", "hf"))]
    if weights != "as drawn":  # of which all are there
        targets = targets[::4]
    count, alarms = 0, []
    for number, (to, options) in enumerate(targets):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            result = checked(source, to, folder, **options)
        except ToolError as refused:
            assert refused.id == "imatrix.needed", (to, options)
            continue
        count += 1
        alarms += [(to, options, finding) for finding in findings(result)]
    assert alarms == [] and count > (40 if weights == "as drawn" else 10)


@pytest.mark.slow
@pytest.mark.oracle
def test_files_of_other_programs() -> None:
    oracles = oracles_or_skip()
    config = registry.open_checkpoint(oracles / "checkpoints" / "hf" / "27b").config
    folders = [oracles / "checkpoints" / name for name in ("hf", "keras", "mlx", "gemma_pytorch")]
    paths = [
        *(oracles / "quantized").iterdir(),
        *(oracles / "gguf").glob("tiny_*"),
        *(oracles / "checkpoints" / "gguf").glob("*.gguf"),
        *(path for folder in folders for path in folder.iterdir()),
    ]
    bare = [
        *((oracles / "checkpoints" / name / "27b") for name in ("litgpt", "torchtune")),
        *((oracles / "checkpoints" / "flax").glob("orbax-*-27b_*/ckpt")),
    ]
    assert len(paths) > 30 and len(bare) > 4
    results = [api.check(path) for path in paths] + [api.check(path, config=config) for path in bare]
    assert [(result.path, finding) for result in results for finding in findings(result)] == []


def test_an_untied_copy_of_the_embedding_is_a_note() -> None:
    """mergekit PR 406: it computes what a tied model does."""
    tied = random_checkpoint(np.dtype(np.float32), seed=1)
    tensors = tied.tensors | {"lm_head.weight": tied.tensors["model.embed_tokens.weight"]}
    untied = replace(tied, tensors=tensors, config=replace(tied.config, tie_word_embeddings=False))
    result = api.check(untied)
    assert findings(result) == []
    assert "tensor.head-copied" in [finding.id for finding in result.findings]
