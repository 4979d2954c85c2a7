"""Which framework wrote an adapter, and its reader."""

from __future__ import annotations

from pathlib import Path

from gemma2tool.containers.gguf import MAGIC
from gemma2tool.errors import InputRefused
from gemma2tool.formats.adapters import gguf, gm, keras, litgpt, mlx, torchtune
from gemma2tool.formats.adapters.adapter import MERGE_ELSEWHERE, Adapter, refused
from gemma2tool.formats.adapters.peft import reader as peft
from gemma2tool.formats.adapters.peft.config import CONFIG
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.storage.reading import starts_with

_SHOWN = 5


def read_adapter(path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter at ``path`` for ``checkpoint``; files that stay open are closed with the checkpoint.

    Raises ``InputRefused`` (``lora.*``) for what is not an adapter, and for one that cannot be merged.
    """
    if path.is_dir():
        return _read_folder(path, checkpoint)
    if not path.is_file():
        raise InputRefused("lora.missing", f"{path}: no such folder", hint=f"pass the folder that contains {CONFIG}")
    if path.name.endswith(keras.SUFFIX):
        return keras.read(path, checkpoint)
    if path.name.endswith(litgpt.SUFFIX):
        return litgpt.read(path, checkpoint)
    if path.name in (*peft.WEIGHTS, mlx.WEIGHTS, CONFIG):
        return _read_folder(path.parent, checkpoint)
    if path.suffix == ".pt":
        return torchtune.read(path, checkpoint)
    if starts_with(path, MAGIC):
        return gguf.read(path, checkpoint)
    raise refused(
        "kind", path, "is not an adapter in a supported format", hint=f"pass the folder that contains {CONFIG}"
    )


def _read_folder(folder: Path, checkpoint: Checkpoint) -> Adapter:
    if not (folder / CONFIG).is_file() and (folder / litgpt.WEIGHTS).is_file():
        return litgpt.read(folder / litgpt.WEIGHTS, checkpoint)
    native = torchtune.find(folder)
    has_peft = any((folder / name).is_file() for name in peft.WEIGHTS)
    if native is not None and not has_peft:
        return torchtune.read(native, checkpoint)
    if not (folder / CONFIG).is_file():
        if (tree := gm.find(folder)) is not None:
            return gm.read(tree, checkpoint)
        _refuse_without_config(folder)
    if (folder / mlx.WEIGHTS).is_file():
        if has_peft:
            raise refused(
                "kind", folder / CONFIG, f"there are adapters of peft and of MLX ({mlx.WEIGHTS}) in one folder",
                hint=f"move the one that {CONFIG} does not describe",
            )  # fmt: skip
        return mlx.read(folder, checkpoint)
    return peft.read(folder, checkpoint)


def _refuse_without_config(folder: Path) -> None:
    """Raises ``InputRefused`` that names what is in the folder instead of an adapter."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        shown = ", ".join(inside[:_SHOWN]) + (f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else "")
        raise InputRefused(
            "lora.missing", f"{folder}: contains no {CONFIG}; adapters are in its folders {shown}",
            hint=f"pass one of them: --lora {folder / inside[-1]}",
        )  # fmt: skip
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith((keras.SUFFIX, ".npz")))
    if files:
        raise InputRefused(
            "lora.missing", f"{folder}: contains no {CONFIG}, but {files[0]}",
            hint=f"give the file: --lora {folder / files[0]}" if files[0].endswith(keras.SUFFIX) else MERGE_ELSEWHERE,
        )  # fmt: skip
    raise InputRefused(
        "lora.missing", f"{folder}: contains no {CONFIG}", hint=f"pass the folder that contains {CONFIG}"
    )
