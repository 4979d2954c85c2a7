"""Signatures by identity, against a Sigstore on this machine; model-signing's own command is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused, ResourceError, UsageError
from gemma2tool.pipeline.key_files import Bundle
from tests.pipeline.test_signing import peer_accepts, write_key
from tests.support.commands import assert_refused, run
from tests.support.paths import TINY

pytest.importorskip("model_signing")
pytestmark = pytest.mark.peer

ALICE, MALLORY = "alice@example.org", "mallory@example.org"


@pytest.fixture(scope="module")
def sigstore() -> Iterator[object]:
    from tests.support.sigstore_instance import SigstoreInstance

    instance = SigstoreInstance()
    yield instance
    instance.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a few files; signing and verifying a signature alone need no model."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


def signed(folder: Path, sigstore: object, name: str = ALICE) -> dict[str, object]:
    """Signs the folder as ``name``; what a verification is given beside the identity."""
    trust = sigstore.trust_config(folder.parent / "trust.json")
    api.sign(folder, keyless=True, identity_token=sigstore.token(name), trust_config=trust, force=True)
    return {"issuer": sigstore.issuer, "trust_config": trust}


@pytest.mark.slow
def test_an_identity(folder: Path, sigstore: object) -> None:
    settings = signed(folder, sigstore)
    result = api.verify(folder, signed_by=ALICE, **settings)
    assert result.passed and result.verdict == f"as {ALICE} signed it"
    assert result.gate("signature").metrics == {"signer": ALICE, "kind": "identity", "issuer": sigstore.issuer}
    words = ("sigstore", "--trust_config", settings["trust_config"], "--identity_provider", sigstore.issuer)
    signature = folder.parent / "model.sig"
    assert Bundle(signature).material == "identity"
    assert peer_accepts(folder, signature, *words, "--identity", ALICE)
    for name, issuer in ((MALLORY, sigstore.issuer), (ALICE, "https://accounts.google.com")):
        other = api.verify(folder, signed_by=name, issuer=issuer, trust_config=settings["trust_config"])
        assert not other.passed and f"not as {name} signed it" in other.verdict
    assert not peer_accepts(folder, signature, *words, "--identity", MALLORY)
    (folder / "config.json").write_text("changed")
    result = api.verify(folder, signed_by=ALICE, **settings)
    assert not result.passed and "config.json" in result.gate("signature").summary
    assert not peer_accepts(folder, signature, *words, "--identity", ALICE)


@pytest.mark.slow
def test_another_sigstore_is_not_trusted(folder: Path, sigstore: object, tmp_path: Path) -> None:
    """One that mallory runs certifies any name."""
    from tests.support.sigstore_instance import SigstoreInstance

    settings = signed(folder, sigstore)
    other = SigstoreInstance()
    try:
        trust = other.trust_config(tmp_path / "other.json")
        api.sign(folder, keyless=True, identity_token=other.token(ALICE), trust_config=trust, force=True)
    finally:
        other.close()
    result = api.verify(folder, signed_by=ALICE, issuer=other.issuer, trust_config=settings["trust_config"])
    assert not result.passed
    assert api.verify(folder, signed_by=ALICE, issuer=other.issuer, trust_config=trust).passed


@pytest.mark.slow
def test_an_output_with_its_receipt(sigstore: object, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    api.convert(TINY / "model.ckpt", output)
    settings = signed(output, sigstore)
    assert (tmp_path / "hf.receipt.json.sig").exists()
    words = ("--signed-by", ALICE, "--issuer", sigstore.issuer, "--trust-config", settings["trust_config"])
    result = run("verify", output, *words)
    assert result.exit_code == 0 and f"signed by {ALICE}: it says" in result.stdout, result.output


def test_a_signature_of_another_kind(folder: Path, tmp_path: Path) -> None:
    write_key(tmp_path, "bob")
    api.sign(folder, key=tmp_path / "bob.pem")
    trust = tmp_path / "trust.json"
    trust.write_text("{}")
    with pytest.raises(InputRefused) as refused:
        api.verify(folder, signed_by=ALICE, issuer="https://accounts.google.com", trust_config=trust)
    assert refused.value.id == "signature.trust"


def test_a_bundle_of_another_kind_is_named(folder: Path, sigstore: object, tmp_path: Path) -> None:
    write_key(tmp_path, "bob")
    api.sign(folder, key=tmp_path / "bob.pem")
    trust = sigstore.trust_config(tmp_path / "trust.json")
    result = api.verify(folder, signed_by=ALICE, issuer=sigstore.issuer, trust_config=trust)
    assert f"was made with a key, not with the identity {ALICE}" in result.gate("signature").summary


def test_a_chain_in_a_log_is_an_identity(tmp_path: Path) -> None:
    """Bundles before 0.3 have a chain where later ones have a certificate."""
    (tmp_path / "a.sig").write_text('{"verificationMaterial": {"x509CertificateChain": {"a": 1}, "tlogEntries": [1]}}')
    (tmp_path / "b.sig").write_text('{"verificationMaterial": {"x509CertificateChain": {"a": 1}, "tlogEntries": []}}')
    assert Bundle(tmp_path / "a.sig").material == "identity" and Bundle(tmp_path / "b.sig").material == "certificate"


@pytest.mark.slow
def test_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    write_key(tmp_path, "bob")
    public = tmp_path / "bob.pub"
    assert_refused(run("verify", folder, "--signed-by", ALICE), 2, "option.pair", "add --issuer")
    workflow = "https://github.com/org/model/.github/workflows/release.yml@refs/tags/v1"
    refused = run("verify", folder, "--signed-by", workflow)
    assert_refused(refused, 2, "option.pair", f"{workflow}: no issuer is given", "token.actions.githubusercontent.com")
    assert_refused(run("verify", folder, "--signed-by", public, "--issuer", "https://x.org"), 2, "option.ignored")
    for option in ("--issuer", "--signature", "--trust-config"):
        assert_refused(run("verify", folder, option, "x"), 2, "option.pair", option, "add --signed-by")
    assert_refused(run("sign", folder, "--keyless", "--key", tmp_path / "bob.pem"), 2, "option.pair")
    assert_refused(run("sign", folder, "--key", tmp_path / "bob.pem", "--trust-config", "x"), 2, "option.ignored")


@pytest.mark.parametrize("token", ["", "no token", "expired"])
def test_no_identity(folder: Path, sigstore: object, tmp_path: Path, token: str) -> None:
    trust = sigstore.trust_config(tmp_path / "trust.json")
    text = sigstore.token(ALICE, -3600) if token == "expired" else token
    with pytest.raises(InputRefused) as refused:
        api.sign(folder, keyless=True, identity_token=text or None, trust_config=trust)
    assert refused.value.id == "signature.identity" and "\n" not in refused.value.message
    assert not (tmp_path / "model.sig").exists()


def test_services_that_do_not_answer(folder: Path, sigstore: object, tmp_path: Path) -> None:
    trust = sigstore.trust_config(tmp_path / "trust.json")
    sigstore.refuses = True
    try:
        with pytest.raises(ResourceError) as refused:
            api.sign(folder, keyless=True, identity_token=sigstore.token(ALICE), trust_config=trust)
    finally:
        sigstore.refuses = False
    assert refused.value.id == "signature.unreachable"


def test_the_public_roots_without_a_network(
    folder: Path, sigstore: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    signed(folder, sigstore)
    with pytest.raises(ResourceError) as refused:
        api.verify(folder, signed_by=ALICE, issuer="https://accounts.google.com")
    assert refused.value.id == "signature.unreachable" and "\n" not in refused.value.message


def test_a_file_with_an_at_sign_is_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(tmp_path, "bob@example.org")
    api.sign(folder, key=tmp_path / "bob@example.org.pem")
    monkeypatch.chdir(tmp_path)
    assert api.verify(folder, signed_by="bob@example.org.pub").passed
    with pytest.raises(UsageError):
        api.verify(folder, signed_by="eve@example.org.pub")
