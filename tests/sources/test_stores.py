"""S3 (moto's server) and Google Cloud Storage (an emulator): read as from a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused, ToolError
from tests.support.audit import watched

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class Bucket:
    """A bucket "models" with the model in a folder. ``put`` writes an object."""

    def __init__(self, scheme: str, port: int, put: Any) -> None:
        self.scheme, self.port, self.put = scheme, port, put

    @property
    def folder(self) -> str:
        return f"{self.scheme}://models/a/tiny"


def request(url: str, method: str, data: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
    with urlopen(Request(url, data, dict(headers or {}), method=method), timeout=20) as response:
        assert response.status == 200


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[int, Any]]:
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fs = s3fs.S3FileSystem(
        key="test", secret="test", endpoint_url=f"http://{host}:{port}", client_kwargs={"region_name": "us-east-1"}
    )
    fs.call_s3("create_bucket", Bucket="models")
    yield port, lambda name, data, **options: fs.pipe_file(f"models/{name}", data, **options)
    server.stop()


@pytest.fixture(scope="module")
def gs() -> Iterator[tuple[int, Any]]:
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    port = server._api._httpd.server_port
    url = f"http://127.0.0.1:{port}"
    request(f"{url}/storage/v1/b?project=p", "POST", b'{"name": "models"}', {"Content-Type": "application/json"})

    def put(name: str, data: bytes) -> None:
        request(f"{url}/upload/storage/v1/b/models/o?uploadType=media&name={quote(name, safe='')}", "POST", data)

    yield port, put
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    port, put = request.getfixturevalue(request.param)
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in SECRETS:
            monkeypatch.setenv(name, "test")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    for file in model.iterdir():
        put(f"a/tiny/{file.name}", file.read_bytes())
    return Bucket(request.param, port, put)


@pytest.mark.slow
def test_a_folder_and_an_object(bucket: Bucket, model: Path) -> None:
    expected = api.hash(model)
    with watched() as seen:
        assert api.hash(bucket.folder) == expected
        assert api.hash(f"{bucket.folder}/model.safetensors") == expected
        with api.open(f"{bucket.folder}/") as checkpoint:
            assert str(checkpoint.known_as).rstrip("/") == bucket.folder and "tokenizer.model" in checkpoint.assets
    ports = {port for port in seen.connections if isinstance(port, int)}
    assert ports == {bucket.port}


@pytest.mark.slow
def test_conversion_and_verification(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    for name, source in (("remote", bucket.folder), ("local", model)):
        (tmp_path / name).mkdir()
        assert api.quantize(source, tmp_path / name / "m.gguf", type="q8_0").written
    assert (tmp_path / "remote" / "m.gguf").read_bytes() == (tmp_path / "local" / "m.gguf").read_bytes()
    assert api.verify(tmp_path / "local" / "m.gguf", reference=bucket.folder).passed
    bucket.put("out/m.gguf", (tmp_path / "local" / "m.gguf").read_bytes())
    assert api.verify(f"{bucket.scheme}://models/out/m.gguf", reference=model).passed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["models/none", "models/a/tiny/none.gguf", "none/x"])
def test_what_is_not_there(bucket: Bucket, place: str) -> None:
    with pytest.raises(InputRefused) as caught:
        api.open(f"{bucket.scheme}://{place}")
    assert caught.value.id == "source.missing" and caught.value.message.startswith(f"{bucket.scheme}://{place}: ")


@pytest.mark.slow
def test_an_object_that_is_replaced(bucket: Bucket) -> None:
    """S3 is asked for the ETag that was listed. The emulator of Google's store does not know generations."""
    if bucket.scheme == "gs":
        pytest.skip("the emulator gives any generation")
    data = bytes(range(256)) * 2000
    bucket.put("b/x.gguf", data)
    from gemma2tool.sources.locate import locate
    from gemma2tool.storage.reading import open_for_reading

    with locate("s3://models/b/x.gguf") as located, open_for_reading(located.path) as reader:
        assert reader.pread(0, 1000) == data[:1000]
        bucket.put("b/x.gguf", data[::-1])
        with pytest.raises(InputRefused) as caught:
            reader.pread(300_000, 1000)
    assert caught.value.id == "file.changed"


@pytest.mark.slow
def test_a_public_object_needs_no_credentials(s3: tuple[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    port, put = s3
    put("p/x.gguf", b"GGUF....", ACL="public-read")
    for name in (*SECRETS, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(ToolError) as caught:
        api.open("s3://models/p/x.gguf")
    assert caught.value.id.startswith("gguf."), caught.value.message
