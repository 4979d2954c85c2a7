"""Signatures: model-signing's own command accepts what is signed here and the other way round; both refuse the same."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from gemma2tool import api
from gemma2tool.errors import InputRefused, UsageError
from tests.support.commands import assert_refused, run
from tests.support.paths import TINY

pytest.importorskip("model_signing")
pytestmark = pytest.mark.peer

PEM = serialization.Encoding.PEM


def write_key(folder: Path, name: str, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def write_certificate(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: object = None) -> None:
    """A certificate of ``key`` for ``name``, by the key ``by`` of ``issuer``, or by itself."""
    start = datetime.datetime(2026, 1, 1)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    usage = {"digital_signature": True, "key_cert_sign": by is None, "crl_sign": False, "content_commitment": False}
    usage |= dict.fromkeys(("key_encipherment", "data_encipherment", "key_agreement"), False)
    usage |= dict.fromkeys(("encipher_only", "decipher_only"), False)
    builder = (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), 7, start, start.replace(year=2050))
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    certificate = builder.sign(by or key, hashes.SHA256())  # type: ignore[arg-type]
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(PEM))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        write_key(folder, name)
    root = write_key(folder, "root")
    write_certificate(folder, "root", root, "root")
    leaf = write_key(folder, "leaf")
    write_certificate(folder, "leaf", leaf, "root", root)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    api.convert(TINY / "model.ckpt", folder / "hf")
    api.convert(TINY / "model.ckpt", folder / "m.gguf", verify=False)
    return folder


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "outputs")
    return tmp_path / "outputs"


def peer_accepts(output: Path, signature: Path, *words: object) -> bool:
    """What the command of model-signing says."""
    command = [str(Path(sys.executable).parent / "model_signing"), "verify", *map(str, words)]
    if not Path(command[0]).exists():
        command[0:1] = [sys.executable, "-m", "model_signing"]
    process = subprocess.run(
        [*command, "--signature", str(signature), str(output)], capture_output=True, text=True, check=False, timeout=120
    )
    return process.returncode == 0


def accepted_here(output: Path, signer: Path) -> bool:
    result = api.verify(output, signed_by=signer)
    return result.passed


@pytest.mark.slow
def test_a_key(outputs: Path, keys: Path) -> None:
    signed = api.sign(outputs / "hf", key=keys / "alice.pem")
    assert [path.name for path in signed.signatures] == ["hf.sig", "hf.receipt.json.sig"]
    result = api.verify(outputs / "hf", signed_by=keys / "alice.pub")
    by_command = run("verify", outputs / "hf", "--signed-by", keys / "alice.pub")
    assert by_command.exit_code == 0 and "signed by alice.pub" in by_command.stdout, by_command.output
    assert run("verify", outputs / "hf", "--signed-by", keys / "mallory.pub").exit_code == 1
    assert result.verdict == "matches its receipt (signed by alice.pub: it says that it was verified as lossless)"
    for path in (outputs / "hf", outputs / "hf.receipt.json"):
        words = ("key", "--public_key", keys / "alice.pub")
        assert peer_accepts(path, path.with_name(path.name + ".sig"), *words)
        assert not peer_accepts(path, path.with_name(path.name + ".sig"), "key", "--public_key", keys / "mallory.pub")
    assert not accepted_here(outputs / "hf", keys / "mallory.pub")


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def add(folder: Path) -> None:
    (folder / "extra.txt").write_text("x")


def remove(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def rename(folder: Path) -> None:
    (folder / "generation_config.json").rename(folder / "generation_config2.json")


@pytest.mark.slow
def test_what_both_refuse(outputs: Path, keys: Path, tmp_path: Path) -> None:
    """The signature alone: without a receipt, nothing else is compared."""
    (outputs / "hf.receipt.json").unlink()
    api.sign(outputs / "hf", key=keys / "alice.pem")
    result = api.verify(outputs / "hf", signed_by=keys / "alice.pub")
    assert result.passed and result.verdict == "as alice.pub signed it"
    for change in (flip, add, remove, rename):
        copy = tmp_path / change.__name__
        shutil.copytree(outputs / "hf", copy)
        change(copy)
        result = api.verify(copy, signed_by=keys / "alice.pub", signature=outputs / "hf.sig")
        assert not result.passed and "not as alice.pub signed it" in result.verdict, change
        assert "Digest" not in result.gate("signature").summary
        assert change is not flip or "has other bytes" in result.gate("signature").summary
        assert not peer_accepts(copy, outputs / "hf.sig", "key", "--public_key", keys / "alice.pub"), change


@pytest.mark.slow
def test_a_file_and_a_certificate(outputs: Path, keys: Path) -> None:
    """A bundle signed by a certificate, whose root is given to verify, as catalogues of models sign."""
    api.sign(outputs / "m.gguf", key=keys / "leaf.pem", certificate=keys / "leaf.crt", chain=[keys / "root.crt"])
    gate = api.verify(outputs / "m.gguf", signed_by=keys / "root.crt").gate("signature")
    assert gate.metrics["subject"] == "CN=leaf" and "root.crt (CN=leaf)" in gate.summary
    words = ("certificate", "--certificate_chain", keys / "root.crt")
    assert peer_accepts(outputs / "m.gguf", outputs / "m.gguf.sig", *words)
    other = write_key(keys, "other")
    write_certificate(keys, "other", other, "other")
    assert not accepted_here(outputs / "m.gguf", keys / "other.crt")


@pytest.mark.slow
def test_what_the_peer_signs_is_accepted(outputs: Path, keys: Path) -> None:
    from model_signing import signing

    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "alice.pem")
    signer.sign(outputs / "m.gguf", outputs / "other.sig")
    result = api.verify(outputs / "m.gguf", signed_by=keys / "alice.pub", signature=outputs / "other.sig")
    assert result.passed


@pytest.mark.slow
def test_a_receipt_of_another_is_refused(outputs: Path, keys: Path) -> None:
    """A forged receipt beside an honest output: the output's signature holds, the receipt's does not."""
    api.sign(outputs / "hf", key=keys / "alice.pem")
    receipt = outputs / "hf.receipt.json"
    receipt.write_text(receipt.read_text().replace('"passed"', '"passed" ', 1))
    result = api.verify(outputs / "hf", signed_by=keys / "alice.pub")
    assert not result.passed and "hf.receipt.json" in result.gate("signature").summary
    (outputs / "hf.receipt.json.sig").unlink()
    result = api.verify(outputs / "hf", signed_by=keys / "alice.pub")
    assert "has no signature" in result.gate("signature").summary


@pytest.mark.slow
def test_refusals(outputs: Path, keys: Path, tmp_path: Path) -> None:
    model = outputs / "m.gguf"
    (tmp_path / "x.pem").write_text("nothing")
    for key in (tmp_path / "x.pem", keys / "alice.pub"):
        with pytest.raises(InputRefused) as refused:
            api.sign(model, key=key)
        assert refused.value.id == "signature.key"
    with pytest.raises(InputRefused) as refused:
        api.verify(model, signed_by=keys / "alice.pem")
    assert "is a private key" in refused.value.message
    with pytest.raises(UsageError):
        api.sign(model)
    api.sign(model, key=keys / "alice.pem")
    with pytest.raises(UsageError) as exists:
        api.sign(model, key=keys / "alice.pem")
    assert exists.value.id == "output.exists"
    write_key(tmp_path, "locked", b"secret")
    with pytest.raises(InputRefused):
        api.sign(model, key=tmp_path / "locked.pem", force=True)
    api.sign(model, key=tmp_path / "locked.pem", password="secret", force=True)
    assert accepted_here(model, tmp_path / "locked.pub")
    (outputs / "m.gguf.sig").write_text("{}")
    assert not accepted_here(model, tmp_path / "locked.pub")


@pytest.mark.slow
def test_a_receipt_as_a_statement(outputs: Path, tmp_path: Path) -> None:
    result = api.sign(outputs / "hf", statement=tmp_path / "s.json")
    assert result.signatures == ()
    statement = json.loads((tmp_path / "s.json").read_text())
    receipt = json.loads((outputs / "hf.receipt.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicate"] == receipt
    digests = {subject["name"]: subject["digest"] for subject in statement["subject"]}
    assert digests["hf (values)"] == {"gemma2tool-1": receipt["output"]["hashes"]["model"]}
    files = {file["name"]: {"sha256": file["sha256"]} for file in receipt["output"]["files"]}
    assert digests.items() >= files.items()


@pytest.mark.parametrize(
    "address", ["hf://org/name", "org-that-is-no-folder/name", "https://example.invalid/model.gguf"]
)
def test_signatures_are_of_local_files(keys: Path, address: str) -> None:
    result = run("verify", address, "--signed-by", keys / "alice.pub")
    assert_refused(result, 2, "option.ignored", "--signed-by works for local files only")


@pytest.mark.slow
@pytest.mark.parametrize("change", [flip, remove, "adapter"])
def test_an_output_that_its_receipt_does_not_describe_is_not_signed(outputs: Path, keys: Path, change: object) -> None:
    if callable(change):
        change(outputs / "hf")
    else:
        (outputs / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputRefused) as refused:
        api.sign(outputs / "hf", key=keys / "alice.pem")
    assert refused.value.id == "signature.receipt" and not list(outputs.glob("*.sig"))
    (outputs / "hf.receipt.json").unlink()
    assert api.sign(outputs / "hf", key=keys / "alice.pem").signatures == (outputs / "hf.sig",)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RSA", "Ed25519", "secp256k1"])
def test_a_key_of_another_kind_is_named(outputs: Path, keys: Path, tmp_path: Path, kind: str) -> None:
    key = {
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
        "Ed25519": ed25519.Ed25519PrivateKey.generate,
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    }[kind]()
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    api.sign(outputs / "m.gguf", key=keys / "alice.pem")
    assert_refused(run("verify", outputs / "m.gguf", "--signed-by", public), 3, "signature.key", kind, "P-256")
    for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL):
        if kind == "RSA" or form == serialization.PrivateFormat.PKCS8:
            private.write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
            refused = run("sign", outputs / "m.gguf", "--key", private, "--force")
            assert_refused(refused, 3, "signature.key", kind, "P-256")


@pytest.mark.slow
def test_a_signature_of_the_other_kind_is_named(outputs: Path, keys: Path) -> None:
    api.sign(outputs / "m.gguf", key=keys / "alice.pem")
    result = run("verify", outputs / "m.gguf", "--signed-by", keys / "root.crt")
    assert result.exit_code == 1 and "was made with a key, not with the certificate root.crt" in result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is no model: the signature alone is looked at."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_links_and_special_files(folder: Path, keys: Path, tmp_path: Path, kind: str) -> None:
    """Not signed, and named where one is added to what was signed."""
    api.sign(folder, key=keys / "alice.pem")
    added = folder / "added"
    if kind == "pipe":
        os.mkfifo(added)
    else:
        added.symlink_to(tmp_path / "nothing" if kind == "dangling" else keys / "alice.pem")
    refused = run("sign", folder, "--key", keys / "alice.pem", "--force")
    assert_refused(refused, 3, "signature.files", "added: is not a plain file")
    gate = api.verify(folder, signed_by=keys / "alice.pub").gate("signature")
    assert gate.failed and "holds added, which is not a plain file" in gate.summary


def test_what_a_signature_leaves_out_is_said(folder: Path, keys: Path) -> None:
    """model-signing leaves out what Git keeps, and what the signer names; its own command does not say so."""
    from model_signing import hashing, signing

    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]")
    (folder / "adapter.bin").write_text("1")
    chosen = hashing.Config().set_ignored_paths(paths=["adapter.bin"])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "alice.pem").set_hashing_config(chosen)
    signer.sign(folder, folder.with_name("model.sig"))
    (folder / "adapter.bin").write_text("2")
    result = api.verify(folder, signed_by=keys / "alice.pub")
    findings = {finding.subject: finding.severity for finding in result.gate("signature").findings}
    assert result.passed and findings == {".git": "note", "adapter.bin": "warning"}
    assert "adapter.bin: is not covered by" in run("verify", folder, "--signed-by", keys / "alice.pub").stdout


@pytest.mark.slow
def test_a_signature_of_one_file_of_several(keys: Path, tmp_path: Path) -> None:
    """The config beside a checkpoint is a warning, another shard an error: the weights in it may be anybody's."""
    for name in ("model.ckpt", "config.json"):
        shutil.copyfile(TINY / name, tmp_path / name)
    api.sign(tmp_path / "model.ckpt", key=keys / "alice.pem")
    gate = api.verify(tmp_path / "model.ckpt", signed_by=keys / "alice.pub").gate("signature")
    assert [(f.severity, f.subject) for f in gate.findings] == [("warning", "config.json")] and not gate.failed
    split = api.SplitOptions(split_max_tensors=20)
    api.convert(TINY / "model.ckpt", tmp_path / "m.gguf", verify=False, split=split)
    first = sorted(tmp_path.glob("m/m-00001-of-*.gguf"))[0]
    api.sign(first, key=keys / "alice.pem")
    gate = api.verify(first, signed_by=keys / "alice.pub").gate("signature")
    assert gate.failed and "m-00002-of-" in gate.summary


DAMAGED = (b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}", b"[]", b'{"mediaType": 1}')


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_signatures_fail_the_gate(folder: Path, keys: Path, content: bytes) -> None:
    folder.with_name("model.sig").write_bytes(content)
    gate = api.verify(folder, signed_by=keys / "alice.pub").gate("signature")
    assert gate.failed and "\n" not in gate.summary
    with open(folder.with_name("model.sig"), "r+b") as file:
        file.truncate(1 << 32)
    assert "at most" in api.verify(folder, signed_by=keys / "alice.pub").gate("signature").summary


def test_a_candidate_that_is_not_there(keys: Path, tmp_path: Path) -> None:
    assert_refused(run("verify", tmp_path / "none", "--signed-by", keys / "alice.pub"), 3, "file.missing", "none")
