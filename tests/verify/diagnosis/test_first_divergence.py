"""Damage that is not in the catalog: the first layer where the models diverge, and the tensors that remove the
difference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.verify.compare.token_ids import default_ids
from gemma2tool.verify.diagnosis import diagnose
from gemma2tool.verify.diagnosis.first_divergence import ID, find_first_divergence
from gemma2tool.verify.run import verify
from tests.support.checkpoints import SMALL
from tests.support.verification import LAYER, Arrays, arrays, block_quantized, candidate, sensitive_checkpoint

IDS = default_ids(SMALL)


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return sensitive_checkpoint()


def scramble(tensors: Arrays, *names: str) -> Arrays:
    """The same values in random order: not a known mistake."""
    rng = np.random.default_rng(7)
    return tensors | {name: rng.permutation(tensors[name].reshape(-1)).reshape(tensors[name].shape) for name in names}


NAMES = [name for name in sensitive_checkpoint().tensors if LAYER in name or "layers" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_single_tensor_is_found(source: Checkpoint, name: str) -> None:
    cause = find_first_divergence(source, candidate(scramble(arrays(source), name)), IDS)
    assert cause.id == ID and cause.tensors == (name,) and cause.evidence["relative_error"] > 0.01
    where = "layer 1" if LAYER in name else "embeddings" if "embed" in name else "after the last layer"
    assert where in cause.message


@pytest.mark.slow
def test_two_tensors_of_a_layer_are_found_together(source: Checkpoint) -> None:
    names = {LAYER + "mlp.up_proj.weight", LAYER + "self_attn.q_proj.weight"}
    assert set(find_first_divergence(source, candidate(scramble(arrays(source), *names)), IDS).tensors) == names


@pytest.mark.slow
def test_errors_of_earlier_layers_do_not_count(source: Checkpoint) -> None:
    """The first of two faults is reported, and sound layers after it are not."""
    late, early = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (2, 1))
    assert find_first_divergence(source, candidate(scramble(arrays(source), late, early)), IDS).tensors == (early,)
    assert find_first_divergence(source, candidate(scramble(arrays(source), late)), IDS).tensors == (late,)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [127, 8])
def test_among_the_errors_of_quantization(source: Checkpoint, levels: int) -> None:
    name = LAYER + "mlp.up_proj.weight"
    correct = candidate(block_quantized(arrays(source), 32, levels), stored="q8_0")
    assert find_first_divergence(source, correct, IDS) is None
    wrong = candidate(block_quantized(scramble(arrays(source), name), 32, levels), stored="q8_0")
    assert find_first_divergence(source, wrong, IDS).tensors == (name,)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_correct_copies_do_not_diverge(dtype: type) -> None:
    wide = sensitive_checkpoint(np.dtype(np.float32))
    assert (
        find_first_divergence(wide, candidate({name: array.astype(dtype) for name, array in arrays(wide).items()}), IDS)
        is None
    )


@pytest.mark.slow
def test_a_field_of_the_config_is_found(source: Checkpoint) -> None:
    cause = find_first_divergence(source, candidate(arrays(source), final_logit_softcapping=None), IDS)
    assert cause.fields == ("final_logit_softcapping",) and not cause.tensors
    cause = find_first_divergence(source, candidate(arrays(source), hidden_activation="silu"), IDS, exact=True)
    assert cause.fields == ("hidden_activation",) and "layer 0" in cause.message


@pytest.mark.slow
def test_a_verification_reports_it_where_no_known_mistake_fits(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = LAYER + "self_attn.o_proj.weight"
    wrong = candidate(scramble(arrays(source), name))
    assert all(cause.id != ID for cause in verify(source, wrong).causes), "a known mistake"
    monkeypatch.setattr(diagnose, "diagnose", lambda *args, **options: ())
    result = verify(source, wrong)
    assert [cause.tensors for cause in result.causes] == [(name,)]
    assert result.to_json()["causes"][0]["tensors"] == [name]
    assert not verify(source, candidate(arrays(source))).causes


@pytest.mark.slow
def test_values_that_are_not_finite_do_not_stop_the_search(source: Checkpoint) -> None:
    name = LAYER + "mlp.up_proj.weight"
    broken = arrays(source)
    broken[name] = broken[name].copy()
    broken[name][0, 0] = np.nan
    assert find_first_divergence(source, candidate(broken), IDS).tensors == (name,)
    assert find_first_divergence(candidate(broken), source, IDS) is None
