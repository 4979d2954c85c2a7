"""Publishing to a hub on the loopback interface: what arrives there, once, whatever happens on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma2tool
from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError
from gemma2tool.publish import upload
from gemma2tool.sources import fetching
from tests.support.audit import watched
from tests.support.commands import listing, run
from tests.support.writable_hub import TOKEN, WritableHub

pytest.importorskip("httpx2")
hub_constants = pytest.importorskip("huggingface_hub.constants")

NAME = "org/small-GGUF"
TYPES = ("q4_0", "nf4")
OUTPUTS = {"Small-it-Q4_0.gguf", "Small-it-nf4"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    server = WritableHub(name=NAME)
    monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(hub_constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.01, 0.01))
    yield server
    server.close()


def request(model: Path, text: Path, folder: Path, **options: object) -> gemma2tool.PublishRequest:
    types = options.pop("types", TYPES)
    assert isinstance(types, tuple)
    release = gemma2tool.ReleaseRequest(source=model, folder=folder, types=types, text=text, tokens=256)
    return gemma2tool.PublishRequest(release=release, to=NAME, **options)


def released(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in listing(folder).items() if not name.startswith(".")}


def assert_complete(hub: WritableHub) -> None:
    """The repository has exactly the files of the release, as its checksums and receipts say, each committed once."""
    content = hub.content
    sums = dict(reversed(line.split("  ")) for line in content["SHA256SUMS"].decode().splitlines())
    assert content.keys() == sums.keys() | {"README.md", "SHA256SUMS"}
    assert sums == {name: hashlib.sha256(content[name]).hexdigest() for name in sums}
    assert {name.partition("/")[0] for name in sums if not name.endswith(".receipt.json")} == OUTPUTS
    assert {name for name in sums if name.endswith(".receipt.json")} == {f"{name}.receipt.json" for name in OUTPUTS}
    assert max(Counter(path for commit in hub.commits for path in commit).values()) == 1


@pytest.mark.slow
def test_what_arrives(hub: WritableHub, model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small-GGUF"
    with watched() as seen:
        plan = gemma2tool.plan_release(request(model, text, folder))
        assert plan.upload_to == NAME and not hub.created and not folder.exists()
        result = gemma2tool.publish(request(model, text, folder, private=True))
    assert set(seen.connections) == {hub.server.server_port} and seen.hosts <= {"127.0.0.1"}
    assert hub.private and set(result.uploaded) == set(hub.content)
    assert hub.content == released(folder)
    assert_complete(hub)
    assert [len(commit) for commit in hub.commits] == [2, len(hub.commits[1]), 2]
    card = hub.content["README.md"].decode()
    assert "quantized_by: org" in card and f"hf download {NAME} --include Small-it-Q4_0.gguf" in card
    assert f'from_pretrained("{NAME}", subfolder="Small-it-nf4"' in card
    again = gemma2tool.publish(request(model, text, folder))
    assert again.uploaded == () and len(hub.commits) == 3
    more = gemma2tool.publish(request(model, text, folder, types=("q8_0",)))
    assert set(more.uploaded) == {"Small-it-Q8_0.gguf", "Small-it-Q8_0.gguf.receipt.json", "README.md", "SHA256SUMS"}
    assert hub.content == released(folder)


@pytest.mark.slow
def test_uploaded_outputs_may_be_removed(
    hub: WritableHub, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, peaks = tmp_path / "out", []
    write = upload.write_outputs

    def counted(*arguments: object) -> object:
        results = write(*arguments)
        peaks.append({path.name for path in folder.iterdir()} & OUTPUTS)
        return results

    monkeypatch.setattr(upload, "write_outputs", counted)
    gemma2tool.publish(request(model, text, folder, discard=True))
    assert peaks == [{"Small-it-Q4_0.gguf"}, {"Small-it-nf4"}]
    assert not {path.name for path in folder.iterdir()} & OUTPUTS
    assert_complete(hub)
    again = gemma2tool.publish(request(model, text, folder, discard=True))
    assert again.uploaded == () and again.results == () and len(peaks) == 2
    assert all(file.finished for file in gemma2tool.plan_release(request(model, text, folder)).files)
    del hub.files["Small-it-nf4/config.json"]
    gemma2tool.publish(request(model, text, folder, discard=True))
    assert peaks[2:] == [{"Small-it-nf4"}] and "Small-it-nf4/config.json" in hub.content


@pytest.mark.slow
def test_a_hub_that_falters(hub: WritableHub, model: Path, text: Path, tmp_path: Path) -> None:
    """Errors that pass, and a commit whose answer is lost."""
    hub.refuse, hub.refuse_objects, hub.lose = [503, 429], [400], 1
    gemma2tool.publish(request(model, text, tmp_path / "out"))
    assert hub.content == released(tmp_path / "out")
    hub.refuse = [503] * 99
    with pytest.raises(ResourceError) as caught:
        gemma2tool.publish(request(model, text, tmp_path / "out", types=("q8_0",)))
    assert caught.value.id == "publish.unreachable" and "503" in caught.value.message
    hub.refuse = []
    gemma2tool.publish(request(model, text, tmp_path / "out", types=("q8_0",)))
    assert hub.content == released(tmp_path / "out")


@pytest.mark.slow
def test_nothing_unverified_leaves(
    hub: WritableHub, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write = upload.write_outputs

    def damaged(*arguments: object) -> object:
        results = write(*arguments)
        (folder / "Small-it-Q4_0.gguf").write_bytes(b"other")
        return results

    monkeypatch.setattr(upload, "write_outputs", damaged)
    with pytest.raises(InputRefused) as caught:
        gemma2tool.publish(request(model, text, folder, types=("q4_0",)))
    assert caught.value.id == "publish.changed" and hub.content == {} and not hub.objects


def refused(model: Path, text: Path, folder: Path, **options: object) -> ToolError:
    with pytest.raises(ToolError) as caught:
        gemma2tool.publish(request(model, text, folder, **options))
    assert not list(folder.rglob("*.gguf")) if folder.exists() else True
    assert TOKEN not in caught.value.message + caught.value.hint
    return caught.value


@pytest.mark.slow
def test_refusals_come_before_the_work(
    hub: WritableHub, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    hub.authorized = False
    assert refused(model, text, folder).id == "publish.refused"
    hub.authorized, hub.created = True, True
    hub.files["README.md"] = b"---\n---\nmy own"
    assert refused(model, text, folder).id == "publish.card"
    monkeypatch.delenv("HF_TOKEN")
    error = refused(model, text, folder)
    assert error.id == "publish.refused" and "hf auth login" in error.hint
    monkeypatch.setenv("HF_TOKEN", "wrong")
    del hub.files["README.md"]
    assert refused(model, text, folder).id == "publish.refused"
    with pytest.raises(UsageError) as caught:
        upload.repository_name("only-a-name", "--to")
    assert caught.value.id == "publish.name"


@pytest.mark.slow
def test_a_release_connects_to_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    command = ("release", model, tmp_path / "out", "--types", "q4_0", "--text", text, "--tokens", 64)
    with watched() as seen:
        assert run(*command).exit_code == 0
    assert not seen.connections and not seen.hosts
