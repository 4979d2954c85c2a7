"""What is written for MaxText and Flax, restored by the calls of Orbax that the frameworks make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import write_as
from tests.support.orbax import Tree, stored_arrays, tree_of
from tests.support.peers import Peer

pytestmark = [pytest.mark.slow, pytest.mark.peer]

ocp = Peer("orbax.checkpoint")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """A folder of MaxText's, and its tree read by tensorstore."""
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=4, layer_types=()))
    folder = write_as("maxtext", source, tmp_path_factory.mktemp("maxtext") / "run").absolute()
    return folder, tree_of(stored_arrays(folder / "0" / "items"))


def _abstract(tree: Tree) -> Tree:
    import jax

    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def _assert_same(expected: Tree, actual: Tree) -> None:
    import jax

    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves_with_path(actual), strict=True)
    for (path, values), (other, restored) in pairs:
        assert path == other and values.tobytes() == np.asarray(restored).tobytes(), path


def _handler() -> object:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)


def test_parameters_alone(written: tuple[Path, Tree]) -> None:
    """MaxText's ``load_params_from_path``."""
    folder, tree = written
    target = _abstract(tree["params"])
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    restored = ocp.Checkpointer(_handler()).restore(
        folder / "0" / "items", item={"params": target}, transforms={}, restore_args={"params": arguments}
    )
    _assert_same(tree, restored)


def test_parameters_by_their_metadata(written: tuple[Path, Tree]) -> None:
    """MaxText's ``to_huggingface.py``: the tree comes from the checkpoint."""
    import jax

    folder, tree = written
    checkpointer = ocp.Checkpointer(_handler())
    target = {"params": checkpointer.metadata(folder / "0" / "items").item_metadata.tree["params"]}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype), target)
    restored = checkpointer.restore(
        folder / "0" / "items",
        args=ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True),
    )
    _assert_same(tree, restored)


def test_step_of_a_run(written: tuple[Path, Tree]) -> None:
    """MaxText's ``load_state_if_possible``: a manager of the run's steps restores the latest."""
    import jax

    folder, tree = written
    target = _abstract(tree)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), target)
    options = ocp.CheckpointManagerOptions(read_only=True)
    names, handlers = ("items",), {"items": _handler()}
    with ocp.CheckpointManager(folder, item_names=names, item_handlers=handlers, options=options) as manager:
        assert manager.latest_step() == 0 and list(manager.all_steps()) == [0]
        restore = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        restored = manager.restore(0, args=ocp.args.Composite(items=restore))
    _assert_same(tree, restored["items"])


def test_the_newer_interface(written: tuple[Path, Tree]) -> None:
    """``orbax.checkpoint.v1``, to which MaxText moves (maxtext 5131)."""
    v1 = getattr(ocp, "v1", None) or pytest.skip("this Orbax has no newer interface")
    folder, tree = written
    _assert_same(tree, v1.load_pytree(folder / "0" / "items"))
    with v1.training.Checkpointer(folder) as checkpointer:
        assert checkpointer.latest.step == 0
        _assert_same(tree, checkpointer.load_checkpointables(0)["items"])
