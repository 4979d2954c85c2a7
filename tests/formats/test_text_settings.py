"""Settings of small files that change texts or forbid tokens are named where they are carried and where they are lost,
with what transformers and the tokenizers library do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma2tool.formats import registry
from gemma2tool.formats.base import Output
from gemma2tool.formats.text_settings import CUTS, FORBIDS, SILENCES, SPLITS, settings_remarks, text_settings
from gemma2tool.pipeline.conversion import save
from gemma2tool.verify.compare.tokenizer import compare_tokenizers
from tests.support.options import write_options
from tests.support.paths import TINY
from tests.support.tokenizers import side, trained

SPLIT = {"split_special_tokens": True}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 32},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
TEXT = "<start_of_turn>user\nHello world, hello again<end_of_turn>"


def remarks(to: str, **files: object) -> list[str]:
    """Those on a folder's settings in an output that carries the files."""
    checkpoint = side(**files)
    return list(
        settings_remarks(text_settings(checkpoint), Output(to, False, [], [], dict.fromkeys(checkpoint.assets, b"")))
    )


def kinds(**files: object) -> list[str]:
    return [setting.kind for setting in text_settings(side(**files))]


def test_special_tokens_that_are_cut_are_named_for_every_target() -> None:
    (carried,) = remarks("hf", tokenizer_config__json=SPLIT)
    (lost,) = remarks("gguf", tokenizer_config__json=SPLIT)
    assert "split_special_tokens is true" in carried and lost == f"{carried}; what runs gguf does not"
    assert kinds(tokenizer_config__json={"split_special_tokens": False}) == []


def test_limits_of_the_tokenizer_are_named_where_they_are_carried() -> None:
    limited = {"truncation": TRUNCATION, "padding": PADDING}
    assert [text.split(":")[1] for text in remarks("mlx", tokenizer__json=limited)] == [
        " truncation to 4 tokens",
        " padding to 32 tokens",
    ]
    assert remarks("gguf", tokenizer__json=limited) == []
    assert kinds(tokenizer__json={"truncation": None, "padding": None, "model": {}}) == []


def test_forbidden_tokens_are_named_where_they_are_lost() -> None:
    generation = {"suppress_tokens": [5, 6], "bad_words_ids": [[7]], "begin_suppress_tokens": [], "temperature": 0.5}
    assert remarks("hf", generation_config__json=generation) == []
    assert remarks("gguf", generation_config__json=generation) == [
        "generation_config.json: suppress_tokens [5, 6]: transformers never generates these tokens; what runs gguf does"
        " not",
        "generation_config.json: bad_words_ids [[7]]: transformers never generates this sequence; what runs gguf does"
        " not",
    ]
    assert remarks("mlx", generation_config__json=generation), "mlx-lm has the file and does not read it"


def test_a_model_whose_stops_are_forbidden_is_another_kind() -> None:
    stops = {"eos_token_id": [1, 107]}
    assert kinds(generation_config__json=stops | {"suppress_tokens": [1]}) == [FORBIDS]
    assert kinds(generation_config__json=stops | {"suppress_tokens": [107, 1]}) == [SILENCES]


def test_files_that_are_damaged_say_nothing() -> None:
    assert kinds(tokenizer_config__json="{", generation_config__json="[1]", tokenizer__json='{"truncation": {') == []


def test_verify_compares_them() -> None:
    model = trained()
    plain = side(tokenizer__model=model, tokenizer_config__json={})
    split = side(tokenizer__model=model, tokenizer_config__json=SPLIT)
    gate = compare_tokenizers(plain, split)
    assert gate.status == "failed" and "split_special_tokens is true in the candidate" in gate.summary
    gate = compare_tokenizers(split, plain)
    assert gate.status == "passed" and "split_special_tokens is true in the source" in gate.summary


@pytest.mark.slow
@pytest.mark.peer
def test_transformers_and_tokenizers_do_what_is_said(tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    torch = pytest.importorskip("torch")
    with registry.open_checkpoint(TINY / "model.ckpt") as source:
        save(source, tmp_path / "plain", write_options(), to="hf", threads=2)
    files = {"tokenizer_config.json": SPLIT, "tokenizer.json": {"truncation": TRUNCATION, "padding": PADDING}}
    ids, alone = {}, {}
    for name in ("plain", *files):
        folder = tmp_path / name
        if name in files:
            shutil.copytree(tmp_path / "plain", folder)
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | files[name]))
        ids[name] = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        alone[name] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert {106, 107} <= set(ids["plain"]) and not {106, 107} & set(ids["tokenizer_config.json"])
    assert ids["tokenizer.json"] == ids["plain"] == alone["plain"] and len(alone["tokenizer.json"]) == 32
    assert alone["tokenizer.json"][4:] == [0] * 28
    assert [setting.kind for setting in text_settings(side(tokenizer_config__json=SPLIT))] == [SPLITS]
    assert kinds(tokenizer__json=files["tokenizer.json"]) == [CUTS, CUTS]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    prompt = transformers.BatchEncoding({"input_ids": torch.tensor([ids["plain"]])})
    free = model.generate(**prompt, do_sample=False, max_new_tokens=4)[0, len(ids["plain"]) :].tolist()
    model.generation_config.suppress_tokens = [free[0]]
    bound = model.generate(**prompt, do_sample=False, max_new_tokens=4)[0, len(ids["plain"]) :].tolist()
    assert free[0] not in bound
