"""Opens the model in an Orbax checkpoint, with the config and the small files of the folders around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2tool.containers import strict_json
from gemma2tool.errors import InputRefused
from gemma2tool.formats import assets
from gemma2tool.formats.orbax import folders
from gemma2tool.formats.orbax.state import Keys, model_arrays, refuse_unmerged, split_keys
from gemma2tool.formats.orbax.zarr_arrays import StoredArray, list_arrays
from gemma2tool.model.checkpoint import ASSET_NAMES, Assets
from gemma2tool.model.config import Gemma2Config
from gemma2tool.storage.paths import confined_path

CONFIG = "config.json"


@dataclass(frozen=True)
class SavedModel:
    """The parameters of a model by their keys, joined by slashes; its ``config.json``, if there is one; the files that
    both are in; and its small files.
    """

    arrays: Mapping[str, StoredArray]
    config: Gemma2Config | None
    files: tuple[Path, ...]
    assets: Assets


def read_model(path: Path, embedding: Keys) -> SavedModel:
    """The only model at ``path``, found by the keys of its ``embedding``. Raises ``InputRefused`` for none, and for
    several.
    """
    tree = folders.only_model(path, embedding)
    listing = list_arrays(tree)
    refuse_unmerged(listing.files, str(tree))
    names = model_arrays(listing.files, embedding, str(tree))
    if not names:
        raise InputRefused(
            "orbax.missing",
            f"{tree}: holds no parameters of a Gemma 2, only {_described(listing.files)}",
            hint="pass a checkpoint that contains the whole model",
        )
    arrays = listing.read(names)
    config_path = find_config(path, tree)
    config = None if config_path is None else assets.read_config(config_path)
    files = tuple(file for file in tree.rglob("*") if file.is_file())
    return SavedModel(
        {"/".join(keys): arrays[name] for name, keys in names.items()},
        config,
        files if config_path is None else (*files, config_path),
        _small_files(path, tree),
    )


def lacks_config(path: Path, embedding: Keys) -> bool:
    """Whether the model at ``path`` has no config.json."""
    models = folders.models(path, embedding) or folders.trees(path)
    return len(models) != 1 or find_config(path, models[0]) is None


def find_config(path: Path, tree: Path) -> Path | None:
    """The nearest config.json that describes a model: trainers write files of this name about themselves."""
    for folder in folders.surroundings(path, tree):
        if (folder / CONFIG).is_file():
            config_path = confined_path(folder, CONFIG)
            content = strict_json.load(config_path, what=CONFIG, max_bytes=assets.MAX_CONFIG_BYTES)
            if not isinstance(content, dict) or not {"model_type", "hidden_size"}.isdisjoint(content):
                return config_path
    return None


def _small_files(path: Path, tree: Path) -> Assets:
    places = folders.surroundings(path, tree)
    home = next((place for place in places if any((place / name).is_file() for name in ASSET_NAMES)), path)
    return assets.folder_assets(home)


def _described(names: Iterable[str]) -> str:
    """What a tree holds, by the first key of its arrays."""
    first = sorted({split_keys(name)[0] for name in names if split_keys(name)})
    return ", ".join(first[:8] + ["..."] * (len(first) > 8)) or "no arrays"
