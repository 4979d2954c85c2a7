"""Training states, saved by Orbax as MaxText, Kauldron, tunix and plain Flax do: their parameters are read, the
optimizer, the step and random states are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.formats import registry
from gemma2tool.model.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import assert_same_tensors, refused
from tests.support.orbax import Tree, boxed, flax_tree, maxtext_tree, training_state
from tests.support.peers import Peer

pytestmark = [pytest.mark.slow, pytest.mark.peer]

ocp = Peer("orbax.checkpoint")
pytest.importorskip("zstandard", reason="the flax extra is not installed")

CONFIG = replace(SMALL, num_hidden_layers=4, layer_types=())


@pytest.fixture(scope="module")
def flax(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Tree]:
    """A model, and its parameters as google-deepmind/gemma nests them."""
    source = random_checkpoint(np.dtype(np.float32), CONFIG)
    return source, flax_tree(source, tmp_path_factory.mktemp("flax") / "written")


@pytest.fixture(scope="module")
def maxtext(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Tree]:
    """What a model is read as after MaxText's rounding, and MaxText's parameters."""
    folder = tmp_path_factory.mktemp("maxtext") / "written"
    tree = maxtext_tree(random_checkpoint(np.dtype(np.float32), CONFIG), folder)
    return registry.open_checkpoint(folder), tree


def _save(folder: Path, state: object) -> Path:
    ocp.PyTreeCheckpointer().save(folder.absolute(), state)
    return folder


def _save_steps(folder: Path, *steps: tuple[int, Tree], **options: object) -> Path:
    """Several steps of a CheckpointManager, each with its items."""
    settings = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    with ocp.CheckpointManager(folder.absolute(), options=settings) as manager:
        for step, items in steps:
            saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            manager.save(step, args=ocp.args.Composite(**saves))
    return folder


def _save_as_maxtext(folder: Path, state: object) -> Path:
    """As MaxText's ``create_orbax_checkpoint_manager`` and ``save_checkpoint`` do, at step 0."""
    import jax

    handlers = {"items": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)}
    settings = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    names = ("items",)
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2 << 30), state)
    save = ocp.args.PyTreeSave(item=state, save_args=args, ocdbt_target_data_file_size=2 << 30)
    with ocp.CheckpointManager(
        folder.absolute(), item_names=names, item_handlers=handlers, options=settings
    ) as manager:
        manager.save(0, args=ocp.args.Composite(items=save))
    return folder


def _assert_reads(name: str, expected: Checkpoint, folder: Path) -> None:
    assert registry.detect(folder).name == name
    assert_same_tensors(expected, registry.open_checkpoint(folder, config=CONFIG))


def test_train_state_of_flax_with_adamw(tmp_path: Path, flax: tuple[Checkpoint, Tree]) -> None:
    import optax
    from flax.training.train_state import TrainState

    source, params = flax
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-3))
    _assert_reads("flax", source, _save(tmp_path / "state", state))


def test_run_of_kauldron(tmp_path: Path, flax: tuple[Checkpoint, Tree]) -> None:
    """Its steps have a prefix, and its state an empty collection."""
    source, params = flax
    run = tmp_path / "run"
    states = [(step, {"default": training_state(params, step) | {"collections": {}}}) for step in (500, 1000)]
    _save_steps(run / "checkpoints", *states, step_prefix="ckpt")
    (run / "config.json").write_text('{"__qualname__": "kauldron.kd:train.Trainer", "seed": 42}')
    with refused("2 checkpoints: checkpoints/ckpt_500, checkpoints/ckpt_1000") as caught:
        registry.open_checkpoint(run, config=CONFIG)
    assert caught.value.id == "orbax.steps" and str(run / "checkpoints/ckpt_1000") in caught.value.hint
    _assert_reads("flax", source, run / "checkpoints" / "ckpt_1000")
    assert registry.by_name("flax").lacks_config(run / "checkpoints" / "ckpt_1000")


def test_items_of_their_own(tmp_path: Path, flax: tuple[Checkpoint, Tree]) -> None:
    source, params = flax
    moments = {"0": {"mu": params, "nu": params}}
    folder = _save_steps(tmp_path / "steps", (5, {"params": params, "opt_state": moments}))
    _assert_reads("flax", source, folder)
    with refused("holds no parameters of a Gemma 2, only 0"):
        registry.open_checkpoint(folder / "5" / "opt_state", config=CONFIG)


def test_state_with_two_models(tmp_path: Path, flax: tuple[Checkpoint, Tree]) -> None:
    """As google-deepmind/gemma's DPO trains them: a policy and its frozen anchor."""
    _, params = flax
    folder = _save(tmp_path / "dpo", {"params": {"policy": params, "anchor": params}, "step": np.int32(1)})
    with refused("holds 2 models: params.anchor, params.policy") as caught:
        registry.open_checkpoint(folder, config=CONFIG)
    assert caught.value.id == "orbax.models"


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda params: {"params": {"params": params}, "step": 0, "opt_state": {}},
        lambda params: training_state({"params": params}, 3) | {"nnx_aux": {"model": {"rngs": np.zeros(2, np.uint32)}}},
        lambda params: {"params": params},
    ],
    ids=["converter", "pretraining", "parameters"],
)
def test_states_of_maxtext(tmp_path: Path, maxtext: tuple[Checkpoint, Tree], wrapped: Callable[[Tree], object]) -> None:
    expected, params = maxtext
    _assert_reads("maxtext", expected, _save_as_maxtext(tmp_path / "checkpoints", wrapped(params)))


def test_pairs_of_maxtext_that_are_not_stacked(tmp_path: Path, maxtext: tuple[Checkpoint, Tree]) -> None:
    import jax

    expected, params = maxtext
    decoder = {"decoder_norm": params["decoder"]["decoder_norm"]}
    for index in range(2):
        stacked = params["decoder"]["layers"]
        decoder[f"layers_{index}"] = jax.tree.map(lambda array, index=index: array.take(index, axis=1), stacked)
    state = training_state({"params": params | {"decoder": decoder}}, 3)
    _assert_reads("maxtext", expected, _save_as_maxtext(tmp_path / "checkpoints", state))


def test_states_of_maxtext_in_flax_nnx(tmp_path: Path, maxtext: tuple[Checkpoint, Tree]) -> None:
    """After its post-training: tunix saves the model alone, or below "base", and boxes each variable."""
    expected, params = maxtext
    random = {"dropout": {"rngs": {"count": np.zeros((), np.uint32), "key": np.zeros(2, np.uint32)}}}
    model = boxed(params | {"decoder": params["decoder"] | random})
    optimizer = {"opt_state": {"0": {"mu": model, "nu": model}}, "step": {"value": np.uint32(7)}}
    folder = _save_steps(tmp_path / "sft", (100, {"model_params": model, "optimizer_state": optimizer}))
    _assert_reads("maxtext", expected, folder)
    _assert_reads("maxtext", expected, _save(tmp_path / "rl", {"base": model}))


def test_converter_of_maxtext(oracles: Path) -> None:
    """What ``convert_gemma2_chkpt.py`` wrote of the fixture: the fixture's values, rounded as MaxText rounds them."""
    from tests.support.paths import TINY

    folder = oracles / "frameworks" / "maxtext_converter"
    source = registry.open_checkpoint(TINY)
    for path in (folder, folder / "0", folder / "0" / "items"):
        checkpoint = registry.open_checkpoint(path)
        assert checkpoint.format == "maxtext" and checkpoint.config == source.config
    expected = source.tensors | registry.by_name("maxtext").expected_after_roundtrip(source, checkpoint)
    assert_same_tensors(replace(source, tensors=expected), checkpoint)
