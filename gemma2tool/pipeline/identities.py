"""Signatures by identity, without keys: Sigstore's, through model-signing and sigstore.

Whoever signs proves an identity to an issuer (an address of mail to the provider of the account, a workflow to its
forge). Sigstore certifies a key that lives for minutes, and its public log records both. Verifying needs roots of trust
and no service: those of the public instance, which are fetched, or those in a file.

Sources: Sigstore's client specification; model-signing 1.1 and sigstore 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.storage.quoting import one_line
from gemma2tool.storage.reading import read_whole

MAX_TRUST_BYTES = 16 << 20
_ISSUERS = ("https://accounts.google.com", "https://github.com/login/oauth")
_WORKFLOWS = "https://token.actions.githubusercontent.com"


@dataclass(frozen=True)
class Identity:
    """Who must have signed: ``name``, as the certificate has it, vouched for by ``issuer``. ``trust_config``: a file
    with the roots of trust of another Sigstore than the public one (a client trust configuration, JSON).
    """

    name: str
    issuer: str
    trust_config: Path | None = None


def is_identity(text: str) -> bool:
    """Whether ``text`` is an identity and not a file: an address of mail, or a URI such as a workflow's."""
    return ("@" in text or "://" in text) and not os.path.exists(text)


def checked_identity(name: str, issuer: str | None, trust_config: Path | None) -> Identity:
    """The identity; UsageError without an issuer, because any issuer may vouch for any name."""
    if not issuer:
        workflow = name.startswith("https://github.com/")
        example = _WORKFLOWS if workflow else " or ".join(_ISSUERS)
        raise UsageError(
            "option.pair",
            f"{name}: no issuer is given for this identity",
            hint=f"add --issuer, as in {example}",
        )
    return Identity(name, issuer, trust_config)


def refuse_of_identities(issuer: str | None, trust_config: Path | None) -> None:
    """Raise ``UsageError`` for options that have no effect for a signer that is a file."""
    for option, value in (("--issuer", issuer), ("--trust-config", trust_config)):
        if value is not None:
            raise UsageError("option.ignored", f"{option} applies to identities, but --signed-by names a file")


def verifier(library: ModuleType, identity: Identity) -> Any:
    """A configuration of model-signing that accepts what ``identity`` signed.

    Raises ResourceError ``signature.unreachable`` if the public roots of trust cannot be fetched, InputRefused
    ``signature.trust`` for a trust configuration that cannot be used.
    """
    _read_trust(identity.trust_config)
    with sigstore_errors(identity.trust_config):
        return library.verifying.Config().use_sigstore_verifier(
            identity=identity.name, oidc_issuer=identity.issuer, trust_config=identity.trust_config
        )


def signer(library: ModuleType, token: str | None, trust_config: Path | None, *, interactive: bool) -> Any:
    """A configuration of model-signing that signs with the identity of ``token``, of the CI service that runs this
    program, or, if ``interactive``, of who logs in with a browser.

    Raises InputRefused ``signature.identity`` if there is no such identity, and what ``verifier`` raises.
    """
    oidc = require("sigstore.oidc", "trust", "signing with an identity")
    trust = _read_trust(trust_config)
    with sigstore_errors(trust_config):
        token = token or oidc.detect_credential()
        if token is None and not interactive:
            raise InputRefused("signature.identity", "no identity to sign with: no token and no CI service")
        if token is None:
            models = require("sigstore.models", "trust", "signing with an identity").ClientTrustConfig
            settings = (models.from_json(trust) if trust else models.production()).signing_config
            token = str(oidc.Issuer(settings.get_oidc_url()).identity_token())
        return library.signing.Config().use_sigstore_signer(identity_token=token, trust_config=trust_config)


def _read_trust(path: Path | None) -> str:
    """The text of a trust configuration; empty where none is given."""
    if path is None:
        return ""
    try:
        return read_whole(path, what="trust configuration", max_bytes=MAX_TRUST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise InputRefused("signature.trust", f"{path}: is not a trust configuration: {one_line(error)}") from error


@contextmanager
def sigstore_errors(trust_config: Path | None) -> Iterator[None]:
    """What sigstore raises, as errors of this program: its services are not reached, the identity is not accepted, or
    the trust configuration is none.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, ToolError)):
            raise
        chain = list(_chain(error))
        reason = " ".join(dict.fromkeys(filter(None, map(one_line, chain[:2])))) or type(error).__name__
        if any(map(_is_of_network, chain)):
            raise ResourceError("signature.unreachable", f"Sigstore's services could not be used: {reason}") from error
        if type(error).__name__ in ("IdentityError", "ExpiredIdentity"):
            raise InputRefused("signature.identity", f"the identity cannot be used: {reason}") from error
        if trust_config is not None:
            raise InputRefused("signature.trust", f"{trust_config}: cannot be used: {reason}") from error
        raise InputRefused("signature.identity", f"Sigstore rejected the identity: {reason}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_network(error: BaseException) -> bool:
    """Whether a library's error says that a service was not reached, or did not answer as it should."""
    module = type(error).__module__.split(".")[0]
    return module in ("requests", "urllib3") or type(error).__name__ in _NETWORK_ERRORS


_NETWORK_ERRORS = (
    "NetworkError",
    "DownloadError",
    "SlowRetrievalError",
    "FulcioClientError",
    "RekorClientError",
    "IssuerError",
)
"""Of sigstore and tuf, which have no class for all of them."""
