"""Pickles: what is not needed for tensors is reported in every protocol, place and disguise; tensors are not."""

from __future__ import annotations

import base64
import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2tool.containers import pickle_program
from gemma2tool.containers.pickle_program import read_program
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.pickles import scan_pickle
from gemma2tool.pipeline.scan.run import ScanRequest, scan


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def findings(data: bytes) -> list[ScanFinding]:
    return list(scan_pickle(data, Place("x.pkl")))


def scanned(path: Path) -> list[str]:
    return [finding.id for finding in scan(ScanRequest(path=path)).findings]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, os.getcwd, pickle.loads, __import__])
def test_a_call_is_found_in_every_protocol(protocol: int, function: Any) -> None:
    reported = findings(pickle.dumps({"weight": Runs(function, "id")}, protocol))
    assert [finding.id for finding in reported] == ["pickle.code"]
    assert f".{function.__name__}('id')" in reported[0].message


HAND_WRITTEN = {
    "INST": b"(S'id'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'id'\no.",
    "REDUCE": b"cos\nsystem\n(S'id'\ntR.",
    "NEWOBJ": b"\x80\2cos\nsystem\n(X\2\0\0\0idt\x81.",
    "names from the memo": b"\x80\4\x8c\2os\x94\x8c\6system\x940h\0h\1\x93\x8c\2id\x85R.",
    "a name that is computed": b"\x80\4\x8c\2os\x94cbuiltins\nstr\n\x8c\6system\x85R\x93.",
    "a name with dots": b"\x80\4\x8c\2os\x8c\x0bpath.isfile\x93.",
    "an extension": b"\x80\2\x82\1.",
    "a second pickle": b"\x80\2N.\x80\2cos\nsystem\n.",
    "damage after the call": b"cos\nsystem\n(S'id'\ntR\xff\xff",
    "not called": b"\x80\2cos\nsystem\n.",
    "popped": b"cos\nsystem\n(S'id'\ntR0N.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_disguises(name: str) -> None:
    assert "danger" in {finding.severity for finding in findings(HAND_WRITTEN[name])}


def test_a_damaged_pickle_without_names_is_odd() -> None:
    assert [finding.id for finding in findings(b"\x80\2]q\0(K\1")] == ["pickle.damaged"]


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_in_a_pickle(protocol: int) -> None:
    """As bytes, which protocols 0 to 2 store as a text, as a text, and one deeper; of any protocol."""
    for inner in (pickle.dumps(Runs(os.system, "id"), number) for number in range(6)):
        for value in (inner, bytearray(inner), inner.decode("latin-1"), pickle.dumps([inner], protocol)):
            reported = findings(pickle.dumps({"blob": value}, protocol))
            assert [finding.id for finding in reported] == ["pickle.nested"]
            assert ".system('id')" in reported[0].message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes, bytes.hex])
def test_an_encoded_pickle_in_a_pickle(encode: Callable[[bytes], bytes | str], protocol: int) -> None:
    for length in (1, 2, 3):  # of what follows, so that every padding occurs
        value = encode(pickle.dumps(Runs(os.system, "i" * length), protocol))
        for stored in (value, value.decode() if isinstance(value, bytes) else value.upper()):
            assert [finding.id for finding in findings(pickle.dumps({"blob": stored}, 4))] == ["pickle.nested"]
        harmless = encode(pickle.dumps([1, OrderedDict(a=2)], protocol))
        assert findings(pickle.dumps([harmless, "gAS=", "80 04", "gAQ" + "x" * 99, "8004" + "00" * 40])) == []


def test_texts_and_harmless_pickles_in_a_pickle_are_not_reported() -> None:
    texts = ["cos\nsystem\n is how it begins.", "\x93.", "import os\nos.system\n", pickle.dumps([1, OrderedDict(a=2)])]
    assert findings(pickle.dumps(texts, 2)) == [] and findings(pickle.dumps(texts, 4)) == []


def test_objects_of_trainers_are_odd() -> None:
    data = b"\x80\2ctransformers.training_args\nTrainingArguments\n)\x81}b."
    assert [(finding.id, finding.severity) for finding in findings(data)] == [("pickle.objects", "odd")]
    assert findings(data.replace(b"TrainingArguments", b"default_logdir"))[0].severity == "danger"


def test_tensors_and_plain_values_are_not_reported(tmp_path: Path) -> None:
    state = OrderedDict(weight=torch.ones(2, 3, dtype=torch.bfloat16), bias=torch.nn.Parameter(torch.zeros(3)))
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
    torch.save({"rng": np.random.RandomState(0).get_state()[1], "step": 7}, tmp_path / "rng.pth")
    values = {"a": [1, 2.5, None, True, (b"x", "y")], "b": {1, 2}, "c": OrderedDict(d=complex(1, 2))}
    for protocol in range(6):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(values, protocol))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}, None], dtype=object))
    np.savez(tmp_path / "arrays.npz", a=np.ones(3), b=np.array(["x"], dtype=object))
    (tmp_path / "not-a-pickle.bin").write_bytes(bytes(range(256)) * 8)
    assert scanned(tmp_path) == ["files.unread"]  # a note for not-a-pickle.bin


def test_archives(tmp_path: Path) -> None:
    hostile = pickle.dumps(Runs(os.system, "id"))
    torch.save({"weight": Runs(os.system, "id")}, tmp_path / "torch.pt")
    np.save(tmp_path / "array.npy", np.array([Runs(os.system, "id")], dtype=object))
    with zipfile.ZipFile(tmp_path / "deflated.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", hostile)
        archive.writestr("a/notes.txt", hostile)
    for name in ("torch.pt", "array.npy", "deflated.bin"):
        assert set(scanned(tmp_path / name)) == {"pickle.code"}, name


@pytest.mark.parametrize("change", ["encrypted", "crc", "name"])
def test_an_archive_that_readers_refuse_is_read_all_the_same(tmp_path: Path, change: str) -> None:
    """torch.load ignores the flags, the checksum and the local name of a member."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Runs(os.system, "id")))
    data = bytearray(stream.getvalue())
    central = data.rindex(b"PK\1\2")
    if change == "encrypted":
        data[6] |= 1
        data[central + 8] |= 1
    elif change == "crc":
        data[central + 16] ^= 1
    else:
        data[30] = ord("b")
    (tmp_path / "x.pt").write_bytes(data)
    other = "archive.unread" if change == "encrypted" else "archive.damaged"
    assert set(scanned(tmp_path / "x.pt")) == {other, "pickle.code"}


def test_members_that_would_be_unpacked_elsewhere(tmp_path: Path) -> None:
    for name in ("../../x", "/etc/x", "a/../../x", "C:\\x", "..\\x"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr(name, b"")
        assert scanned(tmp_path / "x.zip") == ["archive.escape"], name


def test_names_are_those_of_pickletools() -> None:
    """The names of every GLOBAL, and what the machine makes of texts, agree with the library that lists opcodes."""
    data = pickle.dumps([Runs(os.getcwd), OrderedDict(a=1), {"x"}], 2)
    expected = {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
    assert {use.name for use in read_program(data).uses} == expected


def test_a_long_pickle_is_followed_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_program, "MAX_OPCODES", 1000)
    program = read_program(b"\x80\2" + b"N0" * 1000 + b".")
    assert program.too_long and not program.uses
