"""The diagnosis: planted faults are caught and named, in memory and in files; honest copies raise nothing; sentences read well."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.verify import diagnosis
from gemma2tool.verify.diagnosis.catalogue import CATALOGUE
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import described, name_of, place
from gemma2tool.verify.diagnosis.search import SIGNATURES
from gemma2tool.verify.run import verify
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.paths import TINY as FIXTURE
from tests.support.planted.faults import BF16, FAULTS, Victim
from tests.support.planted.trials import LEVELS, SMALL, Outcome, pairs, sources, trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> dict[str, Victim]:
    return sources(("small-bf16", "small-f32", "deep", "fixture"), FIXTURE)


def first_source(made: dict[str, Victim], fault) -> str:
    """The smallest checkpoint in which the fault is one."""
    return next(name for name, source in made.items() if fault.needs(source))


def told(outcome: Outcome) -> str:
    return f"{outcome.source} as {outcome.form}: {', '.join(outcome.ids) or 'no cause'}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_caught_and_named(made: dict[str, Victim], fault, tmp_path: Path) -> None:
    name = first_source(made, fault)
    outcome = trial((fault,), made[name], name, "memory", tmp_path)
    assert outcome.detected, told(outcome)
    assert outcome.named, told(outcome)


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("fault", [each for each in FAULTS if len(each.forms) > 1][::2], ids=lambda fault: fault.name)
def test_faults_in_files(made: dict[str, Victim], fault, form: str, tmp_path: Path) -> None:
    if form not in fault.forms or not fault.needs(made["small-f32"]):
        pytest.skip("this form cannot have this fault")
    outcome = trial((fault,), made["small-f32"], "small-f32", form, tmp_path)
    assert outcome.detected and outcome.named, told(outcome)


def test_two_faults_at_once(made: dict[str, Victim], tmp_path: Path) -> None:
    outcomes = [
        trial(both, made["small-bf16"], "small-bf16", "memory", tmp_path)
        for both in pairs(made["small-bf16"], 24, seed=1)
    ]
    assert all(each.detected for each in outcomes)
    named = sum(each.named for each in outcomes)
    missed = [(each.faults, each.ids) for each in outcomes if not each.named]
    assert named >= 0.9 * len(outcomes), missed


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)])
@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0", "iq4_nl", "nf4", "int8", "w8a8-int8", "gguf", "hf"])
def test_honest_files_have_no_cause(dtype: np.dtype, type: str, tmp_path: Path) -> None:
    truth = random_checkpoint(dtype, SMALL)
    gguf = type in ("q8_0", "q4_0", "iq4_nl", "gguf")
    path = tmp_path / ("made.gguf" if gguf else "made")
    options = {"dtype": type} if type == "f16" else {} if type in ("gguf", "hf") else {"type": type}
    write_checkpoint(truth, path, **options)
    with registry.open_checkpoint(path) as candidate:
        kept = registry.by_name(candidate.format).expected_after_roundtrip(truth, candidate)
        result = verify(truth, candidate, levels=LEVELS, expected=kept)
    assert result.passed and not result.causes, [(each.id, each.message) for each in result.causes]


# -- what it says --------------------------------------------------------------------------------------------------------


def causes(made: dict[str, Victim], *names: str) -> tuple[Cause, ...]:
    source = made["small-bf16"]
    victim = source.copy()
    for fault in FAULTS:
        if fault.name in names:
            fault.plant(victim)
    return verify(source.checkpoint(), victim.checkpoint(), levels=LEVELS).causes


def test_one_sentence_for_all_tensors(made: dict[str, Victim]) -> None:
    (cause,) = causes(made, "norms_stored_with_one")
    assert cause.message.startswith("all 13 norm weights are larger by ")
    assert "the file stores 1 + w where this format stores w" in cause.message
    assert set(cause.tensors) == set(made["small-bf16"].norms())
    (cause,) = causes(made, "only_q_interleaved")
    assert "q_proj of all 3 layers" in cause.message
    (cause,) = causes(made, "final_norm_stored_with_one")
    assert cause.message.startswith("the final norm is larger by ")
    (cause,) = causes(made, "one_bit_flipped")
    assert "one bit is flipped at [" in cause.message and cause.tensors == ("model.layers.1.self_attn.v_proj.weight",)


def test_what_is_in_another_place_is_no_damage(made: dict[str, Victim]) -> None:
    (cause,) = causes(made, "two_query_heads_exchanged")
    assert cause.message.startswith("in q_proj and o_proj of all 3 layers heads 0 and 1 are in each other's place")
    (cause,) = causes(made, "query_heads_rolled")
    assert "heads are shifted in a circle: head i holds the source's head (i + 1) % 4" in cause.message
    (cause,) = causes(made, "two_tokens_exchanged")
    assert cause.message == "in embed_tokens rows 50 and 90 are in each other's place: these tokens mean each other"
    (cause,) = causes(made, "the_same_rows_of_all_layers_overwritten")
    assert (
        "in up_proj of all 3 layers the same 256 values, from [5, 0] to [8, 63], are not the source's" in cause.message
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("one_value_is_nan", "in down_proj of layer 1 one value at [17, 33] is NaN"),
        ("one_value_is_infinite", "in embed_tokens one value at [17, 3] is infinite"),
    ],
)
def test_one_broken_number_is_said_in_the_singular(made: dict[str, Victim], fault: str, said: str) -> None:
    (cause,) = causes(made, fault)
    assert cause.message == said


def test_two_mistakes_in_one_tensor_are_both_named(made: dict[str, Victim]) -> None:
    found = {cause.id: cause for cause in causes(made, "q_and_k_interleaved", "layers_shifted")}
    assert set(found) == {"rope.interleaved", "layer.shifted"}
    assert len(found["rope.interleaved"].tensors) == 6 and len(found["layer.shifted"].tensors) == 33


def test_what_a_format_cannot_say_is_part_of_the_sentence(made: dict[str, Victim]) -> None:
    victim = made["small-f32"].copy()
    victim.configure(query_pre_attn_scalar=48)
    (cause,) = verify(victim.checkpoint(), made["small-f32"].checkpoint("gguf"), levels=LEVELS).causes
    assert cause.id == "config.query-scale" and "llama.cpp uses head_dim" in cause.message


def test_unknown_damage_has_no_invented_name(made: dict[str, Victim]) -> None:
    """Rows in random order are nothing that the catalogue knows."""
    source = made["small-bf16"]
    victim = source.copy()
    order = np.random.default_rng(0).permutation(128)
    victim.everywhere("gate_proj", lambda w: w[order] * np.float32(1.5) + np.float32(0.3) * w)
    found = verify(source.checkpoint(), victim.checkpoint(), levels=LEVELS)
    assert not found.passed
    assert not found.causes, [(each.id, each.message) for each in found.causes]


# -- the catalogue -------------------------------------------------------------------------------------------------------


def test_the_catalogue_has_every_name_that_is_given() -> None:
    families = {name.split(".")[0] for name in CATALOGUE}
    pattern = re.compile(rf'"((?:{"|".join(families)})\.[a-z0-9-]+)"')
    given = {each.id for each in SIGNATURES}
    for path in Path(diagnosis.__file__).parent.glob("*.py"):
        if path.name != "catalogue.py":
            given |= set(pattern.findall(path.read_text()))
    assert given - set(CATALOGUE) == {"logits.shape"}, "that one is an error's"
    assert len(CATALOGUE) >= 35
    planted = {id for fault in FAULTS for id in fault.ids}
    assert planted == set(CATALOGUE) - {
        "tokenizer.bos-doubled",
        "logits.shifted-by-one",
        "logits.vocabulary-permuted",
    }, "those show in logits alone"


def test_names_and_places() -> None:
    for name in (
        "model.layers.3.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ):
        assert name_of(*place(name)) == name
    names = [name_of(kind, layer) for kind in ("q_proj", "k_proj") for layer in (0, 1)]
    assert described(names, SMALL) == "q_proj and k_proj of layers 0 and 1"
    assert described([*names, "model.norm.weight"], SMALL) == "q_proj and k_proj of layers 0 and 1 and the final norm"
