"""Paths that no format reads: the message says what is there and what to do."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import InputRefused
from gemma2tool.formats import registry
from gemma2tool.pipeline.opening import open_source
from tests.containers.test_file_kind import PAGE, POINTER
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import write_as

torch = pytest.importorskip("torch")


def _archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("model.ckpt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))


def _kaggle(folder: Path) -> None:
    _archive(folder / "gemma-2-2b-it.tar.gz")


def _pointers(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "weights-1.pt").write_bytes(POINTER)
    (folder / "weights-2.pt").write_bytes(POINTER)


def _fsdp(folder: Path) -> None:
    shards = folder / "pytorch_model_fsdp_0"
    shards.mkdir()
    for rank in range(2):
        (shards / f"__{rank}_0.distcp").write_bytes(b"\x80\x02x")
    (shards / ".metadata").write_bytes(b"\x80\x02x")


def _deepspeed(folder: Path) -> None:
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "global_step10").mkdir()
    (folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")


def _several(folder: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.zeros(2)}, folder / name)


def _other_model(folder: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2), "decoder.weight": torch.zeros(2)}, folder / "model.pt")


def _run(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("{}")
    for step in (500, 1000):
        (folder / f"checkpoint-{step}").mkdir()
        write_as("hf", random_checkpoint(np.dtype(np.float32)), folder / f"checkpoint-{step}" / "x")
        (folder / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x")


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "Kaggle's archive": (_kaggle, "file.archive", "an archive: gemma-2-2b-it.tar.gz"),
    "pointers": (_pointers, "file.lfs-pointer", "a Git LFS pointer to a file of 5,228,717,512 bytes"),
    "FSDP's shards": (_fsdp, "input.distributed", "a sharded checkpoint of torch.distributed"),
    "DeepSpeed's run": (_deepspeed, "input.distributed", "a checkpoint of DeepSpeed"),
    "several files": (_several, "input.several", "2 files of weights.*: a.pth, b.pth"),
    "another model": (_other_model, "input.unknown", "2 tensors \\(encoder.weight, decoder.weight\\)"),
    "a run": (_run, "input.run", "checkpoint-1000"),
    "nothing": (lambda folder: None, "input.unknown", "it is empty"),
    "notes": (lambda folder: (folder / "notes.md").write_text("x") and None, "input.unknown", "it holds notes.md"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, name: str) -> None:
    make, id, text = FOLDERS[name]
    make(tmp_path)
    with pytest.raises(InputRefused, match=text) as refusal:
        registry.detect(tmp_path)
    assert refusal.value.id == id and refusal.value.hint


FILES = {
    "model.gguf": (POINTER, "file.lfs-pointer"),
    "2b.sbs": (PAGE, "file.web-page"),
    "model.weights.h5": (PAGE, "file.web-page"),
    "model.pth": (b"\x80\x02}.", "torch.legacy"),
    "other.safetensors": (POINTER, "file.lfs-pointer"),
    "model.ckpt": (POINTER, "file.lfs-pointer"),
    "noise.bin": (b"\x93\xc8\xfa" * 99, "input.unknown"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    data, id = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputRefused) as refusal:
        registry.open_checkpoint(tmp_path / name, config=SMALL)
    assert refusal.value.id == id, refusal.value.message
    assert name in refusal.value.message


def test_a_kaggle_archive_as_a_file(tmp_path: Path) -> None:
    _archive(tmp_path / "model.tar.gz")
    with pytest.raises(InputRefused, match="is a gzip archive") as refusal:
        registry.open_checkpoint(tmp_path / "model.tar.gz")
    assert "unpack it" in refusal.value.hint


SAFETENSORS = (20).to_bytes(8, "little") + b'{"__metadata__": {}}'
TAR = b"model".ljust(257, b"\0") + b"ustar\x0000" + bytes(248)
MISNAMED = {
    "model.gguf": (SAFETENSORS, "a safetensors file"),
    "model.pth": (SAFETENSORS, "a safetensors file"),
    "model.keras": (SAFETENSORS, "a safetensors file"),
    "model.zip": (SAFETENSORS, "a safetensors file"),
    "model.tar": (SAFETENSORS + bytes(512), "a safetensors file"),
    "gemma.keras": (TAR, "a tar archive"),
    "gemma.tar": (b"\x1f\x8b\x08" + bytes(range(1, 255)) * 4, "a gzip archive"),
    "gemma.tar.gz": (b"PK\x03\x04" + bytes(600), "a zip archive"),
}


@pytest.mark.parametrize("in_a_folder", [False, True])
@pytest.mark.parametrize("name", MISNAMED)
def test_a_file_under_another_kinds_name_is_named_by_its_content(tmp_path: Path, name: str, in_a_folder: bool) -> None:
    data, text = MISNAMED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputRefused) as refusal:
        open_source(tmp_path if in_a_folder else tmp_path / name)
    assert refusal.value.id in ("file.other-container", "file.archive"), refusal.value.message
    assert f"{name}: is {text}" in refusal.value.message or (
        in_a_folder and f"archive: {name}" in refusal.value.message
    )


def test_a_whole_module_is_refused_with_its_reason(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(InputRefused) as refusal:
        registry.open_checkpoint(tmp_path / "whole.pt")
    assert refusal.value.id == "pickle.global" and "state dict" in refusal.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_without_a_config_is_a_pointer(tmp_path: Path, name: str) -> None:
    """What is asked for next must help: a config would not."""
    path = tmp_path / name
    path.write_bytes(POINTER)
    with pytest.raises(InputRefused) as caught:
        registry.open_checkpoint(path)
    assert caught.value.id == "file.lfs-pointer"
