"""The diagnosis: planted faults are detected and named, in memory and in files; correct outputs have no cause;
sentences."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.verify import diagnosis
from gemma2tool.verify.diagnosis.catalog import CATALOG
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.diagnosis.names import describe, name_of, place
from gemma2tool.verify.diagnosis.search import SIGNATURES
from gemma2tool.verify.run import VerifySettings, verify
from tests.support.checkpoints import random_checkpoint, write_checkpoint
from tests.support.paths import TINY as FIXTURE
from tests.support.planted.faults import BF16, FAULTS, Fault, Victim
from tests.support.planted.trials import LEVELS, SMALL, Outcome, pairs, sources, trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def victims() -> dict[str, Victim]:
    return sources(("small-bf16", "small-f32", "deep", "fixture"), FIXTURE)


def first_source(victims: dict[str, Victim], fault: Fault) -> str:
    """The smallest checkpoint in which the fault is a mistake."""
    return next(name for name, source in victims.items() if fault.needs(source))


def summary(outcome: Outcome) -> str:
    return f"{outcome.source} as {outcome.form}: {', '.join(outcome.ids) or 'no cause'}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_detected_and_named(victims: dict[str, Victim], fault: Fault, tmp_path: Path) -> None:
    name = first_source(victims, fault)
    outcome = trial((fault,), victims[name], name, "memory", tmp_path)
    assert outcome.detected, summary(outcome)
    assert outcome.named, summary(outcome)


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if len(fault.forms) > 1][::2], ids=lambda fault: fault.name
)
def test_faults_in_files(victims: dict[str, Victim], fault: Fault, form: str, tmp_path: Path) -> None:
    if form not in fault.forms or not fault.needs(victims["small-f32"]):
        pytest.skip("this form cannot have this fault")
    outcome = trial((fault,), victims["small-f32"], "small-f32", form, tmp_path)
    assert outcome.detected and outcome.named, summary(outcome)


def test_two_faults_at_once(victims: dict[str, Victim], tmp_path: Path) -> None:
    outcomes = [
        trial(pair, victims["small-bf16"], "small-bf16", "memory", tmp_path)
        for pair in pairs(victims["small-bf16"], 24, seed=1)
    ]
    assert all(outcome.detected for outcome in outcomes)
    named = sum(outcome.named for outcome in outcomes)
    missed = [(outcome.faults, outcome.ids) for outcome in outcomes if not outcome.named]
    assert named >= 0.9 * len(outcomes), missed


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)])
@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0", "iq4_nl", "nf4", "int8", "w8a8-int8", "gguf", "hf"])
def test_correct_outputs_have_no_cause(dtype: np.dtype, type: str, tmp_path: Path) -> None:
    source = random_checkpoint(dtype, SMALL)
    gguf = type in ("q8_0", "q4_0", "iq4_nl", "gguf")
    path = tmp_path / ("made.gguf" if gguf else "made")
    options = {"dtype": type} if type == "f16" else {} if type in ("gguf", "hf") else {"type": type}
    write_checkpoint(source, path, **options)
    with registry.open_checkpoint(path) as candidate:
        kept = registry.by_name(candidate.format).expected_after_roundtrip(source, candidate)
        result = verify(source, candidate, VerifySettings(levels=LEVELS, expected=kept))
    assert result.passed and not result.causes, [(cause.id, cause.message) for cause in result.causes]


# -- sentences ---------------------------------------------------------------------------------------------------------


def causes(victims: dict[str, Victim], *names: str) -> tuple[Cause, ...]:
    source = victims["small-bf16"]
    victim = source.copy()
    for fault in FAULTS:
        if fault.name in names:
            fault.plant(victim)
    return verify(source.checkpoint(), victim.checkpoint(), VerifySettings(levels=LEVELS)).causes


def test_one_sentence_for_all_tensors(victims: dict[str, Victim]) -> None:
    (cause,) = causes(victims, "norms_stored_with_one")
    assert cause.message.startswith("all 13 norm weights are larger by ")
    assert "the file stores 1 + w where this format stores w" in cause.message
    assert set(cause.tensors) == set(victims["small-bf16"].norms())
    (cause,) = causes(victims, "only_q_interleaved")
    assert "q_proj of all 3 layers" in cause.message
    (cause,) = causes(victims, "final_norm_stored_with_one")
    assert cause.message.startswith("the final norm is larger by ")
    (cause,) = causes(victims, "one_bit_flipped")
    assert "one bit is flipped at [" in cause.message and cause.tensors == ("model.layers.1.self_attn.v_proj.weight",)


def test_rearranged_values_are_not_damage(victims: dict[str, Victim]) -> None:
    (cause,) = causes(victims, "two_query_heads_exchanged")
    assert cause.message.startswith("in q_proj and o_proj of all 3 layers, heads 0 and 1 are exchanged")
    (cause,) = causes(victims, "query_heads_rolled")
    assert "the heads are rotated: head i holds the source's head (i + 1) % 4" in cause.message
    (cause,) = causes(victims, "two_tokens_exchanged")
    assert cause.message == "in embed_tokens, rows 50 and 90 are exchanged: these tokens have each other's rows"
    (cause,) = causes(victims, "the_same_rows_of_all_layers_overwritten")
    assert (
        "in up_proj of all 3 layers, the same 256 values, from [5, 0] to [8, 63], differ from the source"
        in cause.message
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one_value_is_nan", "in down_proj of layer 1, one value at [17, 33] is NaN"),
        ("one_value_is_infinite", "in embed_tokens, one value at [17, 3] is infinite"),
    ],
)
def test_a_single_broken_value_is_in_the_singular(victims: dict[str, Victim], fault: str, message: str) -> None:
    (cause,) = causes(victims, fault)
    assert cause.message == message


def test_two_mistakes_in_one_tensor_are_both_named(victims: dict[str, Victim]) -> None:
    by_id = {cause.id: cause for cause in causes(victims, "q_and_k_interleaved", "layers_shifted")}
    assert set(by_id) == {"rope.interleaved", "layer.shifted"}
    assert len(by_id["rope.interleaved"].tensors) == 6 and len(by_id["layer.shifted"].tensors) == 33


def test_what_a_format_cannot_represent_is_part_of_the_sentence(victims: dict[str, Victim]) -> None:
    victim = victims["small-f32"].copy()
    victim.configure(query_pre_attn_scalar=48)
    (cause,) = verify(
        victim.checkpoint(), victims["small-f32"].checkpoint("gguf"), VerifySettings(levels=LEVELS)
    ).causes
    assert cause.id == "config.query-scale" and "llama.cpp uses head_dim" in cause.message


def test_unknown_damage_has_no_cause(victims: dict[str, Victim]) -> None:
    """Mixing rows with rows in random order is not in the catalog."""
    source = victims["small-bf16"]
    victim = source.copy()
    order = np.random.default_rng(0).permutation(128)
    victim.everywhere("gate_proj", lambda w: w[order] * np.float32(1.5) + np.float32(0.3) * w)
    result = verify(source.checkpoint(), victim.checkpoint(), VerifySettings(levels=LEVELS))
    assert not result.passed
    assert not result.causes, [(cause.id, cause.message) for cause in result.causes]


# -- the catalog -------------------------------------------------------------------------------------------------------


def test_the_catalog_has_every_id_that_is_used() -> None:
    families = {name.split(".")[0] for name in CATALOG}
    pattern = re.compile(rf'"((?:{"|".join(families)})\.[a-z0-9-]+)"')
    used = {signature.id for signature in SIGNATURES}
    for path in Path(diagnosis.__file__).parent.glob("*.py"):
        if path.name != "catalog.py":
            used |= set(pattern.findall(path.read_text()))
    assert used - set(CATALOG) == {"logits.shape"}, "which is an error"
    assert len(CATALOG) >= 35
    planted = {id for fault in FAULTS for id in fault.ids}
    in_logits = {"tokenizer.bos-doubled", "logits.shifted-by-one", "logits.vocabulary-permuted"}
    of_servers = {id for id in CATALOG if id.startswith("server.")}
    assert planted == set(CATALOG) - in_logits - of_servers - {"arguments.swapped"}, "which is not a mistake of a file"


def test_names_and_places() -> None:
    for name in (
        "model.layers.3.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ):
        assert name_of(*place(name)) == name
    names = [name_of(kind, layer) for kind in ("q_proj", "k_proj") for layer in (0, 1)]
    assert describe(names, SMALL) == "q_proj and k_proj of layers 0 and 1"
    assert describe([*names, "model.norm.weight"], SMALL) == "q_proj and k_proj of layers 0 and 1 and the final norm"


def test_alike_rows_exchanged_are_named() -> None:
    """Rows of tokens that were hardly trained differ little."""
    source = Victim.of(random_checkpoint(np.dtype(np.float32)))
    table = source.arrays["model.embed_tokens.weight"]
    table[90] = table[50] + 0.1 * table[91]
    candidate = source.copy()
    candidate.arrays["model.embed_tokens.weight"][[50, 90]] = table[[90, 50]]
    result = verify(source.checkpoint(), candidate.checkpoint(), VerifySettings(levels=("tensors",)))
    assert [cause.id for cause in result.causes] == ["tensor.rows-exchanged"]
