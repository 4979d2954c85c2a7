"""A receipt is beside the output that it describes, and never beside another."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from gemma2tool.errors import UsageError
from gemma2tool.pipeline import receipts
from gemma2tool.pipeline.conversion import save
from gemma2tool.receipt.document import receipt_path
from gemma2tool.storage import syscalls
from gemma2tool.storage.staging.staged_output import Staging
from tests.support.checkpoints import random_checkpoint
from tests.support.commands import run
from tests.support.receipts import BF16, content_of


def test_without_receipt_or_reference_the_error_says_what_to_do(outputs: Path) -> None:
    result = run("verify", outputs / "src")
    assert result.exit_code == 2 and "--reference" in result.stderr and "--against" in result.stderr
    assert run("verify", outputs / "nothing").exit_code == 3
    assert (
        run(
            "verify", outputs / "hf", "--reference", outputs / "src", "--against", outputs / "hf.receipt.json"
        ).exit_code
        == 2
    )
    assert run("verify", outputs / "hf", "--gate", "kl=1").exit_code == 2


@pytest.mark.slow
def test_an_old_receipt_is_removed_with_its_output(outputs: Path) -> None:
    old = content_of(outputs / "bf16.gguf")
    words = ("convert", outputs / "src", outputs / "bf16.gguf", "--dtype", "f16", "--force", "--quiet")
    assert run(*words).exit_code == 0
    assert content_of(outputs / "bf16.gguf")["output"]["hashes"] != old["output"]["hashes"]
    assert run("verify", outputs / "bf16.gguf", "--quiet").exit_code == 0
    for without in ("--no-receipt", "--no-verify"):
        assert run("convert", outputs / "src", outputs / "hf", "--force", "--quiet").exit_code == 0
        assert receipt_path(outputs / "hf").exists()
        assert run("convert", outputs / "src", outputs / "hf", "--force", "--quiet", without).exit_code == 0
        assert not receipt_path(outputs / "hf").exists(), without


def test_saving_from_python_removes_an_old_receipt(outputs: Path) -> None:
    save(random_checkpoint(BF16, seed=1), outputs / "bf16.gguf", force=True)
    assert not receipt_path(outputs / "bf16.gguf").exists()


@pytest.mark.slow
def test_a_failed_verification_leaves_old_output_and_receipt(outputs: Path) -> None:
    before = (outputs / "bf16.gguf").read_bytes(), receipt_path(outputs / "bf16.gguf").read_bytes()
    words = (
        "quantize",
        outputs / "src",
        outputs / "bf16.gguf",
        "--type",
        "q4_0",
        "--gate",
        "kl=0",
        "--gate",
        "rmse=0",
        "--force",
        "--quiet",
    )
    assert run(*words).exit_code == 1
    assert ((outputs / "bf16.gguf").read_bytes(), receipt_path(outputs / "bf16.gguf").read_bytes()) == before


def test_a_commit_that_fails_leaves_both_or_neither(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old output stays if the new one cannot replace it, and keeps its receipt; no temporary files are left."""
    output = outputs / "bf16.gguf"
    before = output.read_bytes(), receipt_path(output).read_bytes()
    seen = []

    def failing(self: Staging) -> None:
        seen.append(receipt_path(output).exists())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Staging, "put_in_place", failing)

    def replace_output() -> None:
        with Staging(output, force=True) as staging, receipts.stage(output, b"{}") as beside:
            staging.write_bytes(output.name, b"new")
            receipts.commit([(staging, beside)])

    with pytest.raises(OSError, match="No space"):
        replace_output()
    assert seen[0] is False, "the old receipt is removed before the old output"
    assert output.read_bytes() == before[0]
    assert receipt_path(output).read_bytes() == before[1]
    assert not [path for path in outputs.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_after_a_kill_a_receipt_describes_the_output_beside_it(tmp_path: Path, old: bool, new: bool) -> None:
    """The process is killed before its n-th rename, exchange or removal, for every n; the next run repairs what it
    left."""

    def receipt_of(data: bytes) -> bytes:
        return b'{"schema": "gemma2tool.receipt", "sha256": "%s"}' % hashlib.sha256(data).hexdigest().encode()

    def replace_with(output: Path, data: bytes, receipt: bool) -> None:
        with ExitStack() as stack:
            staging = stack.enter_context(Staging(output, force=True))
            staging.write_bytes(output.name, data)
            beside = stack.enter_context(receipts.stage(output, receipt_of(data))) if receipt else None
            receipts.commit([(staging, beside)])

    def killed_before(nth: int, output: Path) -> bool:
        child = os.fork()
        if child == 0:
            count = iter(range(1, 1000))

            def counted(function):
                return lambda *args, **kwargs: os._exit(9) if next(count) == nth else function(*args, **kwargs)

            for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (syscalls, "exchange")):
                setattr(module, name, counted(getattr(module, name)))
            replace_with(output, b"new", new)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    states = set()
    for nth in range(1, 100):
        output = tmp_path / f"{nth}.gguf"
        replace_with(output, b"old", old)
        killed = killed_before(nth, output)
        path = receipt_path(output)
        data, receipt = output.read_bytes(), path.read_bytes() if path.exists() else None
        assert receipt in (None, receipt_of(data)), nth
        states.add((data, receipt is not None))
        replace_with(output, b"third", True)
        assert path.read_bytes() == receipt_of(b"third")
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        if not killed:
            break
    assert (data, receipt is not None) == (b"new", new) and nth >= 4
    assert {(b"old", old), (b"new", new)} <= states


@pytest.mark.slow
def test_another_file_with_the_name_of_a_receipt_is_not_replaced(outputs: Path) -> None:
    receipt_path(outputs / "new.gguf").write_text('{"mine": 1}')
    result = run("convert", outputs / "src", outputs / "new.gguf", "--quiet")
    assert result.exit_code == 2 and "is not a receipt" in result.stderr
    assert not (outputs / "new.gguf").exists() and receipt_path(outputs / "new.gguf").read_text() == '{"mine": 1}'
    assert run("convert", outputs / "src", outputs / "new.gguf", "--quiet", "--no-receipt").exit_code == 0
    assert receipt_path(outputs / "new.gguf").read_text() == '{"mine": 1}'


@pytest.mark.slow
def test_a_receipt_without_its_output_is_replaced(outputs: Path) -> None:
    (outputs / "bf16.gguf").unlink()
    assert run("convert", outputs / "src", outputs / "bf16.gguf", "--quiet").exit_code == 0
    assert run("verify", outputs / "bf16.gguf", "--quiet").exit_code == 0


def test_the_current_folder_as_output(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs / "hf")
    assert receipt_path(Path(".")) == outputs / "hf.receipt.json"
    assert run("verify", ".", "--quiet").exit_code == 0
    monkeypatch.chdir(outputs)
    receipt_path(outputs / "new").write_text("not a receipt")
    with pytest.raises(UsageError):
        receipts.check_place(Path("new"))
