"""What doctor says of a machine."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.pipeline import doctor
from tests.support.commands import run


def facts(path: Path | str = ".") -> dict[str, doctor.Fact]:
    return {fact.name: fact for fact in api.doctor(path).facts}


def test_this_machine_is_well(tmp_path: Path) -> None:
    result = run("doctor", tmp_path, "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 0 and content["ok"]
    values = {fact["name"]: fact["value"] for fact in content["facts"]}
    assert values["torch"] == importlib.metadata.version("torch") and str(tmp_path.resolve()) in values["free disk"]
    assert re.match(r"avx512|avx2|baseline|neon", values["kernels"]) and values["extra keras"] == "installed"


def test_what_is_missing_or_old_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_declared", lambda: ["gguf>=999", "nothing-of-the-kind>=1", "h5py>=3; extra == 'keras'"]
    )
    named = facts()
    assert named["gguf"].status == "error" and named["gguf"].remedy == "pip install 'gguf>=999'"
    assert named["nothing-of-the-kind"].value == "missing"
    assert run("doctor").exit_code == 4


def test_versions_known_to_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.17.1" if name == "keras-hub" else real(name))
    assert facts()["keras-hub"].status == "warning"


def test_a_folder_that_is_not_there() -> None:
    assert facts("/nowhere/at/all")["free disk"].status == "warning"
