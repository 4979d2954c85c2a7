"""``verify --logits``: an engine's logits are compared with the built-in forward pass, and its mistake is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2tool.cli.main import app
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats import registry
from gemma2tool.pipeline.inputs import read_logits
from gemma2tool.verify.engine import LogitsSettings, verify_logits
from tests.support.peers import Peer

torch = pytest.importorskip("torch")
transformers = Peer("transformers")

TOKENS = 80
SETTINGS = LogitsSettings(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fixture_dir: Path) -> Path:
    """The fixture as transformers loads it, and a prompt past its window of 64."""
    place = tmp_path_factory.mktemp("engine")
    app(["convert", str(fixture_dir / "model.ckpt"), str(place / "hf"), "--no-verify", "-q"], standalone_mode=False)
    np.save(place / "ids.npy", np.load(fixture_dir / "heldout.npy")[0, :TOKENS])
    return place


def engine(folder: Path, dtype: torch.dtype = torch.float32, **mistakes: object) -> np.ndarray:
    """transformers' logits with fields of its config changed; float32 (1, T, V)."""
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        folder / "hf", dtype=dtype, attn_implementation="eager", **mistakes
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(np.load(folder / "ids.npy")[None])).logits.float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistakes", "cause"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"attn_logit_softcapping": None}, "config.attention-softcap-missing"),
        ({"sliding_window": 65}, "config.window-off-by-one"),
        ({"query_pre_attn_scalar": 144}, "config.query-scale"),
    ],
    ids=str,
)
def test_an_engines_mistake_is_named_and_its_precision_passes(folder: Path, mistakes: dict, cause: str | None) -> None:
    logits = engine(folder, **mistakes)
    with registry.open_checkpoint(folder / "hf") as checkpoint:
        result = verify_logits(checkpoint, np.load(folder / "ids.npy"), logits, name="engine", settings=SETTINGS)
    assert [cause.id for cause in result.causes] == ([cause] if cause else [])
    assert result.passed is (cause is None)


@pytest.mark.slow
def test_logits_of_the_last_positions_suffice(folder: Path) -> None:
    logits = engine(folder)[0, -3:]
    with registry.open_checkpoint(folder / "hf") as checkpoint:
        result = verify_logits(checkpoint, np.load(folder / "ids.npy"), logits, name="engine", settings=SETTINGS)
        assert result.passed and result.gate("logits").metrics["max_abs_difference"] < 5e-5
        with pytest.raises(UsageError):
            verify_logits(checkpoint, np.load(folder / "ids.npy"), logits[:, 1:], name="engine")
        with pytest.raises(UsageError):
            verify_logits(checkpoint, np.load(folder / "ids.npy")[:2], logits, name="engine")


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_logits_are_reported_for_the_file(folder: Path, value: float) -> None:
    logits = engine(folder)
    logits[0, 3, :5] = value
    with registry.open_checkpoint(folder / "hf") as checkpoint:
        result = verify_logits(checkpoint, np.load(folder / "ids.npy"), logits, name="engine.npy", settings=SETTINGS)
    gate = result.gate("logits")
    assert gate.summary == f"5 of {logits.size} logits of engine.npy are NaN or infinite"
    assert gate.failed and gate.findings[0].message == gate.summary
    assert "no known mistake" not in result.gate("mistakes").summary and result.gate("mistakes").status == "skipped"


@pytest.mark.slow
def test_the_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "logits.npy", engine(folder, final_logit_softcapping=None))
    command = ["verify", str(folder / "hf"), "--logits", str(folder / "logits.npy")]
    assert app([*command, "--tokens", str(folder / "ids.npy"), "-q"], standalone_mode=False) == 1
    assert "[config.final-softcap-missing]" in capfd.readouterr().out
    assert app(command, standalone_mode=False) == 2
    assert app([*command, "--reference", str(folder / "hf")], standalone_mode=False) == 2


@pytest.mark.parametrize("broken", ["empty", "cut", "integers", "objects", "huge", "columns", "text"])
def test_a_malformed_file_of_logits_is_refused(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "logits.npy"
    array = np.zeros((3, 4), np.float32)
    if broken == "integers":
        array = array.astype(np.int32)
    elif broken == "objects":
        array = array.astype(object)
    elif broken == "columns":
        array = np.asfortranarray(array)
    np.save(file, array)
    data = file.read_bytes()
    if broken == "cut":
        data = data[:-1]
    elif broken == "empty":
        data = b""
    elif broken == "text":
        data = b"hello"
    elif broken == "huge":
        data = data.replace(b"(3, 4)", b"(3000000000, 4)", 1).replace(b" " * 9, b"", 1)
    file.write_bytes(data)
    with pytest.raises(InputRefused):
        read_logits(file)
