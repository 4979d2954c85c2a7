"""What two runs must share for one to continue the other: every setting counts, and nothing else."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2tool.formats import registry
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.model import devices
from gemma2tool.model.lazy import BFLOAT16
from gemma2tool.pipeline.calibration.output import calibrated
from gemma2tool.pipeline.calibration.session import CalibrationSettings
from gemma2tool.pipeline.fingerprint import _feed, fingerprint
from gemma2tool.pipeline.plan import Plan, make_plan
from gemma2tool.quantizers.gguf_encoders import Blocks
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    config = replace(SMALL, num_hidden_layers=1, layer_types=())
    path = write_checkpoint(random_checkpoint(np.dtype(BFLOAT16), config), tmp_path_factory.mktemp("s") / "src")
    source = registry.open_checkpoint(path)
    return make_plan(source, path.parent / "out.gguf", to=None, options=WriteOptions(type="q4_0", name="out.gguf"))


def differences(plan: Plan, other: Plan, **options: object) -> set[str]:
    before, after = fingerprint(plan, {}), fingerprint(other, options)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_same_plan(plan: Plan) -> None:
    assert differences(plan, replace(plan, destination=Path("elsewhere"))) == set()
    assert differences(plan, plan, allow_nonfinite=False) == set()


def test_options_by_their_names(plan: Plan) -> None:
    assert differences(plan, plan, allow_nonfinite=True) == {"allow-nonfinite"}
    for scale in ("1", "0.5"):
        adapted = replace(plan, options=replace(plan.options, adapters=(Adapter(Path("adapter"), float(scale)),)))
        assert differences(plan, adapted) == {"lora"}
        assert fingerprint(adapted, {})["lora"] == f"adapter={scale}"


def test_what_is_laid_out(plan: Plan) -> None:
    output, item = plan.output, plan.output.tensors[0]
    weighed = [
        replace(tensor, encoder=Blocks(tensor.encoder.type, np.ones(tensor.source.shape[-1], np.float32)))
        if isinstance(tensor.encoder, Blocks)
        else tensor
        for tensor in output.tensors
    ]
    other = [replace(item, encoder=replace(item.encoder)), *output.tensors[1:]]
    assert differences(plan, replace(plan, output=replace(output, tensors=other))) == set()
    moved = {suffix: replace(place, offset=place.offset + 1) for suffix, place in item.parts.items()}
    for changed in (
        replace(output, tensors=weighed),
        replace(output, tensors=[replace(item, parts=moved), *output.tensors[1:]]),
        replace(output, tensors=[replace(item, name="other"), *output.tensors[1:]]),
        replace(output, assets={"tokenizer.model": b"x"}),
        replace(output, files=[replace(output.files[0], size=1)]),
        replace(output, files=[replace(output.files[0], fixed=[(0, b"other")])]),
    ):
        assert differences(plan, replace(plan, output=changed)) == {"plan"}


def test_the_files_of_the_source(plan: Plan) -> None:
    path = plan.source.path / "model.safetensors"
    before, times = fingerprint(plan, {}), path.stat()
    for change in ("time", "bytes"):
        data = path.read_bytes()
        if change == "bytes":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + (change == "time")))
        after = fingerprint(plan, {})
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert {name for name in before if before[name] != after[name]} == {"source model.safetensors"}
    assert fingerprint(plan, {}) == before


class TestCalibrated:
    IDS = np.arange(64).reshape(2, 32)

    def plan(self, plan: Plan, ids: np.ndarray = IDS, **settings: object) -> Plan:
        output, session = calibrated(plan.output, plan.source, CalibrationSettings(ids, **settings), threads=1)
        return replace(plan, output=output, session=session)

    def test_the_same_calibration(self, plan: Plan) -> None:
        assert differences(self.plan(plan), self.plan(plan, self.IDS.copy())) == set()

    def test_others(self, plan: Plan) -> None:
        for other in (self.plan(plan, self.IDS + 1), self.plan(plan, damping=0.5), self.plan(plan, act_order=True)):
            assert differences(self.plan(plan), other) == {"calibration-run"}
        assert "calibration-run" in differences(plan, self.plan(plan))


@dataclass(frozen=True)
class One:
    a: object


@dataclass(frozen=True)
class Two:
    a: object


def test_different_settings_have_different_fingerprints() -> None:
    values = [
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        "abc",
        b"abc",
        [],
        "",
        b"",
        [[]],
        [[], []],
        1,
        1.0,
        True,
        "1",
        None,
        "None",
        np.float32(1),
        np.zeros(3, np.float32),
        np.zeros(3, np.int32),
        np.zeros((1, 3), np.float32),
        One(1),
        Two(1),
        One("1"),
        {"a": 1},
        {"a": 2},
        {"b": 1},
        np.dtype(np.float32),
        Path("a"),
        One(np.ones(3)),
        One(np.zeros(3)),
    ]
    digests = set()
    for value in values:
        digest = hashlib.sha256()
        _feed(digest, value)
        digests.add(digest.hexdigest())
    assert len(digests) == len(values)
    with pytest.raises(TypeError):
        _feed(hashlib.sha256(), object())
    with pytest.raises(TypeError):
        _feed(hashlib.sha256(), One(lambda: 1))

    def test_another_device(self, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        calibrated = self.plan(plan)
        before = fingerprint(calibrated, {})
        monkeypatch.setattr(devices, "check_device", lambda name: name)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        with devices.use_device("cuda"):
            after = fingerprint(calibrated, {})
        assert {name for name in before if before[name] != after[name]} == {"calibration-run"}
