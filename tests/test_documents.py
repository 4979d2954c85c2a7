"""Documents: every command line in them is one that gemma2tool accepts. The guide's are also run (test_guide.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from gemma2tool.cli.main import app
from gemma2tool.verify.compare.metrics import LogitMetrics
from gemma2tool.verify.gates import GATES
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.paths import ROOT
from tests.support.verification import arrays, block_quantized, candidate, sensitive_checkpoint

PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAM = get_command(app)
METRICS = LogitMetrics(
    positions=2,
    max_abs_difference=0.0,
    max_at=(0, 0),
    mean_abs_difference=0.0,
    beyond_limit=0,
    logits=2,
    kl=np.zeros(2),
    reverse_kl=np.zeros(2),
    same_top=np.ones(2, bool),
    source_top=np.zeros(2, np.int64),
    candidate_top=np.zeros(2, np.int64),
    top_gap=np.zeros(2),
    log_p=np.full((2, 2), -1.0),
)


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of every ``gemma2tool ...`` line in a code block; those with an ellipsis stand for others."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(?:[\w./]*/)?gemma2tool (.*)", line)
            if match is None or "..." in re.sub(r'"[^"]*"', "", match[1]):
                continue
            words = shlex.split(match[1], comments=True)
            yield words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", "&")), len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_is_accepted(page: Path) -> None:
    context = PROGRAM.context_class(PROGRAM, info_name="gemma2tool")
    for words in command_lines(page):
        if words[0].startswith("-"):
            continue
        try:
            name, command, arguments = PROGRAM.resolve_command(context, list(words))
            command.make_context(name, arguments, parent=context)
        except Exception as error:
            raise AssertionError(f"{page.name}: gemma2tool {shlex.join(words)}: {error}") from error


@pytest.mark.slow
def test_every_number_of_a_verification_has_a_meaning_in_the_documents() -> None:
    """And its page names none that there is not."""
    page = (ROOT / "docs" / "verification.md").read_text("utf-8").partition("## Numbers by name")[2]
    rows = re.findall(r"^\| ([\w, ]+) \| (`.*?) \|", page.partition("\nLimits of")[0], re.M)
    documented: dict[str, set[str]] = {}
    for gates, names in rows:
        for gate in gates.split(", "):
            documented.setdefault(gate, set()).update(re.findall(r"`(\w+)`", names))

    source = sensitive_checkpoint()
    copy = candidate(block_quantized(arrays(source), 32, 127), stored="q8_0")
    result = verify(source, copy, VerifySettings(ids=np.arange(16 * 32).reshape(16, 32) % 100))
    measured = {name: set(result.metrics(name)) for name in ("distribution", "logits", "probe")}
    measured["tensors"] = set(next(iter(result.metrics("tensors")["tensors"].values())))
    measured["tensors"] |= set(next(iter(result.metrics("tensors")["by_type"].values()))) - {"tensors", "values"}
    sometimes = {
        "distribution": {"kl_p99_9", "kl_interval", "noise_envelope", *LogitMetrics.prediction(METRICS)},
        "probe": {"sliding_window_reduced"},
        "tensors": {"differing", "bad_blocks", "nonfinite", "source_nonfinite"},
    }
    for gate, names in measured.items():
        assert names <= documented[gate], gate
        assert documented[gate] <= names | sometimes.get(gate, set()), gate


def test_limits_in_the_documents_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "verification.md").read_text("utf-8").partition("| kind | KL")[2]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ?([\d.]*)[ %]*\|$", page, re.M)
    assert len(rows) > 8
    for kinds, kl, top1 in rows:
        for kind in kinds.split(", "):
            assert GATES[kind].kl == float(kl), kind
            assert GATES[kind].top1 == (pytest.approx(float(top1) / 100) if top1 else None), kind


def test_the_image_is_built_from_files_that_there_are() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    names = [name for line in copied for name in line.split()]
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(names) == sorted(kept) and all((ROOT / name).exists() for name in names)
