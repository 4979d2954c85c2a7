"""Sensitivity tables as files: what is written is read again, sums add up, anything else is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.pipeline.sensitivity.predict import Predictor, agreements
from gemma2tool.pipeline.sensitivity.table import (
    Entry,
    SensitivityTable,
    Sum,
    Text,
    merge_tables,
    read_table,
    write_table,
)

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
TABLE = SensitivityTable(
    model="m" * 64,
    rounding="calibration",
    texts=(Text("a.txt", "a" * 64, 1, 4),),
    calibration=(Text("a.txt", "c" * 64, 8, 4),),
    windows=(((2, 3, 4, 5),),),
    entries={
        Q: {"q4_k": Entry(Sum(0.4, 4), Sum(0.6, 4)), "q6_k": Entry(Sum(0.04, 4))},
        K: {"q4_k": Entry(Sum(0.2, 4)), "q6_k": Entry(Sum(0.02, 4))},
    },
    whole={"q4_k": Sum(1.0, 4)},
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_table(TABLE, tmp_path / "t.json", force=False)
    assert read_table(tmp_path / "t.json") == TABLE


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "gemma2tool.sensitivity/2"},
        {"rounding": "guessed"},
        {"tensors": {Q: {"q4_k": {"second_order": [-1.0, 4]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [0.1]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [0.1, 0]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [True, 4]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [1e300, 4]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [10**400, 4]}}}},
        {"tensors": {Q: {"q4_k": {"second_order": [0.1, 10**400]}}}},
        {"tensors": {Q: {"q4_q": {"second_order": [0.1, 4]}}}},
        {"tensors": {Q: {"f16": {"second_order": [0.1, 4]}}}},
        {"tensors": {Q: {}}},
        {"whole": {"q4_k": [0.1, 0]}},
        {"whole": {"q4_q": [0.1, 4]}},
        {"windows": []},
        {"windows": [[]]},
        {"windows": [[[2, 3, 4]]]},
        {"windows": [[[2, 3, 4, 5], [2, 3, 4]]]},
        {"windows": [[[2, 3, 4, 5]], [[2, 3, 4, 5]]]},
        {"texts": [], "windows": []},
        {"tensors": {Q: [1]}},
        {"tensors": {Q: {"q4_k": {}}}},
        {"windows": [[["2"]]]},
        {"texts": [{"name": "a"}]},
        {"complete": 1},
    ],
)
def test_other_documents_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**TABLE.to_json(), **change}))
    with pytest.raises(InputRefused) as refused:
        read_table(tmp_path / "t.json")
    assert refused.value.id == "sensitivity.schema"


def test_files_that_are_not_json_are_refused(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"{", b"[1, 2]", b"null"):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(InputRefused) as refused:
            read_table(tmp_path / "t.json")
        assert refused.value.id == "sensitivity.schema"


def test_sums_of_different_texts_add_up() -> None:
    other = dataclasses.replace(TABLE, texts=(Text("b.txt", "b" * 64, 1, 4),))
    merged = merge_tables([(Path("a"), TABLE), (Path("b"), other)])
    assert merged.entries[Q]["q4_k"] == Entry(Sum(0.8, 8), Sum(1.2, 8))
    assert merged.whole["q4_k"].mean == TABLE.whole["q4_k"].mean
    assert len(merged.texts) == len(merged.windows) == 2 and merged.calibration == TABLE.calibration


def test_what_does_not_add_up_is_refused() -> None:
    nearest = dataclasses.replace(TABLE, rounding="nearest", texts=())
    for other in (TABLE, nearest):
        with pytest.raises(UsageError) as refused:
            merge_tables([(Path("a"), TABLE), (Path("b"), other)])
        assert refused.value.id == "sensitivity.merge"


def test_a_whole_whose_parts_cost_nothing_corrects_nothing() -> None:
    free = {type: Entry(Sum(0.0, 4)) for type in ("q4_k", "q6_k")}
    predictor = Predictor(dataclasses.replace(TABLE, entries={Q: free, K: free}))
    assert predictor.total(0.1) == 0.1 and predictor.total(0.0) == 0.0


def test_predictions_use_measurements_where_there_are_some() -> None:
    predictor = Predictor(TABLE)
    assert predictor.costs[Q]["q4_k"] == pytest.approx(0.15)
    assert predictor.costs[Q]["q6_k"] == pytest.approx(0.01 * 1.5)  # its kind measures 1.5 times the second order
    assert predictor.costs[K]["q4_k"] == pytest.approx(0.05)
    together = 0.25 / (0.15 + 0.05)  # what the whole measures, over the sum
    assert predictor.total(0.01) == pytest.approx(0.01 * together)
    assert predictor.total(predictor.sum_for(0.02)) == pytest.approx(0.02)
    (row,) = agreements(TABLE)
    assert (row.type, row.tensors, row.second_order, row.measured) == ("q4_k", 1, 0.1, 0.15)
