"""Repositories of the hub, on a server that speaks its protocol: what is read, what is refused, what is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError
from gemma2tool.sources.locate import locate
from gemma2tool.storage.reading import open_for_reading
from tests.support.commands import run
from tests.support.paths import TINY
from tests.support.servers import COMMIT, Hub, contents, serving

pytest.importorskip("httpx2")
hub_constants = pytest.importorskip("huggingface_hub.constants")

NAME = "org/tiny"


def point_to(server: Hub) -> None:
    """What HF_ENDPOINT does for a new process."""
    hub_constants.ENDPOINT = server.url
    hub_constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[Hub]:
    server = Hub(contents(model), name=NAME)
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(hub_constants, name, getattr(hub_constants, name))
    point_to(server)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(hub_constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


def refused(source: str) -> ToolError:
    with pytest.raises(ToolError) as caught:
        api.inspect(source)
    assert caught.value.message.startswith(source), caught.value.message
    assert ".gemma2tool-source" not in caught.value.message + caught.value.hint
    return caught.value


@pytest.mark.slow
def test_a_model_is_converted_as_from_its_folder(hub: Hub, tmp_path: Path) -> None:
    """Byte for byte, by its name alone; every byte of the weights is fetched once, and none is kept."""
    hub.close()
    with serving(Hub(contents(TINY), name="org/tiny-gemma2")) as big:
        point_to(big)
        result = run("convert", "org/tiny-gemma2", "remote.gguf", "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    assert run("convert", TINY, "local.gguf", "--no-verify", "--quiet").exit_code == 0
    assert Path("remote.gguf").read_bytes() == Path("local.gguf").read_bytes()
    size = (TINY / "model.ckpt").stat().st_size
    assert 0.95 * size < big.store.sent < 1.1 * size
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_receipt_and_verification(hub: Hub) -> None:
    assert run("quantize", f"hf://{NAME}@v1", "q.gguf", "--type", "q8_0", "--quiet").exit_code == 0
    receipt = json.loads(Path("q.gguf.receipt.json").read_text())
    assert receipt["source"]["name"] == "tiny"
    assert receipt["source"]["address"] == f"hf://{NAME}@{COMMIT}"
    verified = run("verify", "q.gguf", "--reference", f"hf://{NAME}", "--quiet", "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["source"]["path"] == f"hf://{NAME}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", [f"hf://{NAME}", f"hf://{NAME}@main", f"hf://{NAME}@{COMMIT}/model.safetensors", f"hf:/{NAME}", NAME]
)
def test_ways_to_write_it(hub: Hub, source: str) -> None:
    result = run("inspect", source, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "hf"
    assert json.loads(result.stdout)["path"].startswith(f"hf://{NAME}")


@pytest.mark.slow
def test_a_name_is_announced_before_the_hub_is_asked(hub: Hub) -> None:
    assert f"looked up on the Hugging Face hub: hf://{NAME}" in run("inspect", NAME).stderr
    Path("org").mkdir()
    asked = len(hub.requests)
    assert run("inspect", NAME).exit_code == 3
    assert run("inspect", "org/model.gguf").exit_code == 3
    assert run("inspect", "a/b/c").exit_code == 3
    assert len(hub.requests) == asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "id", "words"),
    [
        ("hf://org/other", "source.missing", "no such repository"),
        (f"hf://{NAME}@v2", "source.missing", "no revision v2"),
        (f"hf://{NAME}/models.ckpt", "source.missing", "has no models.ckpt"),
        (f"hf://{NAME}/../x", "source.missing", "has no ../x"),
    ],
)
def test_what_is_missing(hub: Hub, source: str, id: str, words: str) -> None:
    with pytest.raises(InputRefused) as caught:
        api.inspect(source)
    assert caught.value.id == id and words in caught.value.message


@pytest.mark.parametrize("source", ["hf://org", "hf://datasets/org/name", "ftp://host/x", "s3://", "hf://"])
def test_addresses_that_are_none(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        api.inspect(source)
    assert caught.value.id == "source.address"


@pytest.mark.slow
def test_a_gated_repository_names_the_next_step(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.gated = "secret", True
    error = refused(f"hf://{NAME}")
    assert error.id == "source.gated" and "no token is set" in error.message
    assert f"{hub.url}/{NAME}" in error.hint and "hf auth login" in error.hint
    monkeypatch.setenv("HF_TOKEN", "wrong")
    error = refused(f"hf://{NAME}")
    assert "has no access" in error.message and "wrong" not in error.message + error.hint
    result = run("convert", NAME, "out.gguf")
    assert result.exit_code == 3 and sorted(path.name for path in Path().iterdir()) == []


@pytest.mark.slow
def test_a_private_repository_and_its_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub, never to the store to which it redirects."""
    hub.token = "secret"
    assert "log in with 'hf auth login'" in refused(f"hf://{NAME}").hint
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert api.inspect(f"hf://{NAME}").format == "hf"
    assert all(
        headers.get("authorization") == "Bearer secret" for *_, headers in hub.requests if _[0] != "/config.json"
    )
    assert hub.store.requests and not any("authorization" in headers for *_, headers in hub.store.requests)


def test_a_store_whose_addresses_expire(hub: Hub) -> None:
    hub.files["big"] = hub.store.files["/big"] = bytes(range(256)) * 4096
    with locate(f"hf://{NAME}/big") as located, open_for_reading(located.path) as reader:
        assert reader.pread(0, 100_000) == hub.files["big"][:100_000]
        resolved = len(hub.requests)
        assert reader.pread(300_000, 100_000) == hub.files["big"][300_000:400_000]
        assert len(hub.requests) == resolved, "the address in the store is used again"
        hub.store.faults.refuse = [403]
        assert reader.pread(600_000, 100_000) == hub.files["big"][600_000:700_000]
        assert len(hub.requests) == resolved + 1


def fill_cache(hub: Hub, cache: Path) -> Path:
    """The repository as ``hf download`` leaves it; its folder."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, data in hub.files.items():
        (snapshot / name).write_bytes(data)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_files_in_the_cache_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    repository = fill_cache(hub, tmp_path / "cache")
    assert api.inspect(f"hf://{NAME}").format == "hf"
    assert not hub.requests and not hub.store.requests
    for path in (repository, repository / "snapshots"):
        assert api.inspect(path).format == "hf"
    (repository / "refs" / "main").unlink()
    (repository / "snapshots" / "other").mkdir()
    with pytest.raises(InputRefused) as caught:
        api.inspect(repository)
    assert caught.value.id == "source.snapshots"


@pytest.mark.slow
def test_the_cache_serves_when_the_hub_does_not(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: StringIO
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert refused(f"hf://{NAME}").id == "source.offline"
    fill_cache(hub, tmp_path / "cache")
    with api.open(f"hf://{NAME}") as checkpoint:
        assert checkpoint.pinned == f"hf://{NAME}@{COMMIT}"
    assert "read from the cache" in logged.getvalue()
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    hub.refuse_api = [503] * 9
    assert api.inspect(f"hf://{NAME}").format == "hf"


@pytest.mark.slow
def test_the_hub_is_asked_again(hub: Hub) -> None:
    hub.refuse_api = [429, 503]
    assert api.inspect(f"hf://{NAME}").format == "hf"
    hub.refuse_api = [503] * 9
    error = refused(f"hf://{NAME}")
    assert isinstance(error, ResourceError) and error.id == "source.unreachable" and "503" in error.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_damaged_small_file_is_noticed(hub: Hub, name: str) -> None:
    """By the digest that the hub states: a Git blob's, and the SHA-256 of a large file that is read whole."""
    hub.damaged = hub.store.damaged = f"/{name}"
    with pytest.raises(InputRefused) as caught, api.open(f"hf://{NAME}") as checkpoint:
        checkpoint.assets[name]
    assert caught.value.id == "source.digest" and name in caught.value.message


ODD = {
    "commit": {"sha": "../../.."},
    "no commit": {"sha": None},
    "date": {"lastModified": [1]},
    "siblings": {"siblings": 1},
    "name": {"siblings": [{"rfilename": 1}]},
    "size": {"siblings": [{"rfilename": "a", "size": 1e30}]},
    "negative": {"siblings": [{"rfilename": "a", "size": -1}]},
    "blob": {"siblings": [{"rfilename": "a", "size": 1, "blobId": "../a"}]},
    "digest": {"siblings": [{"rfilename": "a", "size": 1, "lfs": {"size": 1, "sha256": 5, "pointerSize": 1}}]},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_an_answer_that_cannot_be_right_is_refused(hub: Hub, change: dict[str, object]) -> None:
    hub.description = change
    error = refused(f"hf://{NAME}")
    assert error.id == "source.refused" and "answer cannot be read" in error.message


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/../../b", "a\\b", "\ud800", "x\x1b[2J"])
def test_a_name_that_leads_elsewhere_is_refused(hub: Hub, name: str) -> None:
    hub.description = {"siblings": [{"rfilename": name, "size": 1}]}
    error = refused(f"hf://{NAME}")
    assert error.id == "source.name" and error.message.isprintable()
