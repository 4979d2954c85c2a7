"""Repositories on the Hugging Face hub, through huggingface_hub: its token, its endpoint, its cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gemma2tool.errors import InputRefused, ResourceError, ToolError, UsageError
from gemma2tool.errors.extras import require
from gemma2tool.sources.address import HubAddress
from gemma2tool.sources.fetching import attempt
from gemma2tool.sources.http import TRANSIENT, HTTPFile, http_errors, make_client
from gemma2tool.sources.readahead import ReadAhead
from gemma2tool.sources.remote import Digest, Transient
from gemma2tool.storage.attached import SourceFile, check_names
from gemma2tool.storage.ranges import LocalFile
from gemma2tool.version import __version__

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger("gemma2tool")

Result = TypeVar("Result")
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}(?:[0-9a-f]{24})?"), re.compile("[0-9a-f]{64}")
"""Git names commits and blobs by SHA-1 or SHA-256."""
_MAX_SIZE = 1 << 63
_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


class Repository:
    """One revision of a repository.

    ``commit``: of the revision. ``files``: all of its files; those in the hub's cache are read from there. If the hub
    cannot be reached and the revision is in the cache, ``cached`` is its folder instead.
    """

    def __init__(self, address: HubAddress, client: httpx2.Client, source: ReadAhead) -> None:
        self.client = client
        self.address, self.files, self.cached = address, dict[str, SourceFile](), None
        try:
            listed = attempt(str(address), lambda: self._asked(lambda: self._listed(source)), source.stop)
        except ResourceError as unreachable:
            self.cached = _cached_snapshot(address)
            if self.cached is None:
                raise
            self.commit = self.cached.name
            logger.warning("%s; read from the cache: commit %s", unreachable.message, self.commit)
            return
        self.commit, self.files = listed

    def _listed(self, source: ReadAhead) -> tuple[str, dict[str, SourceFile]]:
        """The commit of the revision and its files."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="gemma2tool", library_version=__version__)
        info = api.model_info(self.address.repository, revision=self.address.revision, files_metadata=True, timeout=30)
        commit, siblings = _checked_commit(info), info.siblings or ()
        check_names(str(self.address), [sibling.rfilename for sibling in siblings])
        return commit, {sibling.rfilename: self._file(sibling, commit, source) for sibling in siblings}

    def _file(self, sibling: Any, commit: str, source: ReadAhead) -> SourceFile:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        name, repository = sibling.rfilename, self.address.repository
        cached = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(cached, str):
            return SourceFile(Path(cached).stat().st_size, partial(LocalFile, cached))
        digest = Digest("git", sibling.blob_id) if sibling.blob_id else None
        if sibling.lfs:
            digest = Digest("sha256", sibling.lfs.sha256)
        file = HTTPFile(
            self.client,
            hf_hub_url(repository, name, revision=commit),
            where=f"{self.address.at(self.address.revision)}/{name}",
            size=sibling.size or 0,
            version=digest.value if digest else commit,
            digest=digest,
            headers=build_hf_headers(library_name="gemma2tool", library_version=__version__),
            pinned=True,
            refusal=self._refusal,
        )
        return SourceFile(file.size, source.opener(file), sibling.lfs.sha256 if sibling.lfs else None)

    def _refusal(self, response: httpx2.Response) -> ToolError | None:
        """The error for a file that the hub does not give."""
        if response.status_code not in (401, 403):
            return None
        return self._gated() if response.headers.get("x-error-code") == "GatedRepo" else self._no_access()

    def _asked(self, call: Callable[[], Result]) -> Result:
        """``call()``, with the errors of the hub's client as errors of this program."""
        from huggingface_hub import errors

        repository = self.address.repository
        try:
            with http_errors(str(self.address)):
                return call()
        except errors.GatedRepoError as error:
            raise self._gated() from error
        except errors.RevisionNotFoundError as error:
            raise InputRefused(
                "source.missing",
                f"{self.address}: the repository has no revision {self.address.revision or 'main'}",
                hint=f"see {_page(repository)} for its branches and tags",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise self._no_access() from error
        except errors.HFValidationError as error:
            raise UsageError("source.address", f"{self.address}: is not the name of a repository") from error
        except errors.OfflineModeIsEnabled as error:
            raise ResourceError("source.offline", f"{self.address}: HF_HUB_OFFLINE is set") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in TRANSIENT:
                raise Transient(f"the hub answered {status}") from error
            if status in (401, 403):
                raise self._no_access() from error
            raise InputRefused("source.refused", f"{self.address}: the hub answered {status}") from error
        except (AttributeError, TypeError, LookupError, ValueError, OverflowError) as error:
            raise InputRefused("source.refused", f"{self.address}: the hub's answer cannot be read") from error

    def _gated(self) -> InputRefused:
        repository = self.address.repository
        has_token = _token_is_known()
        state = "the account of your token has no access" if has_token else "and no token is set"
        then = "check that your token may read gated repositories" if has_token else _LOG_IN
        return InputRefused(
            "source.gated",
            f"{self.address}: access is gated, {state}",
            hint=f"accept the license at {_page(repository)}, then {then}",
        )

    def _no_access(self) -> InputRefused:
        then = "check that your token may read it" if _token_is_known() else f"if it is private, {_LOG_IN}"
        return InputRefused(
            "source.missing",
            f"{self.address}: no such repository on the hub, or you have no access to it",
            hint=f"check the name; {then}",
        )


def _checked_commit(info: Any) -> str:
    """The commit of an answer. Raises ValueError for one whose fields are not what they must be, which huggingface_hub
    takes as they are.

    The commit becomes a part of paths in the cache.
    """
    if not _matches(_COMMIT, info.sha):
        raise ValueError("the commit is not one")
    for file in info.siblings or ():
        size, sha256 = file.size or 0, file.lfs.sha256 if file.lfs else None
        if not isinstance(file.rfilename, str) or not isinstance(size, int) or not 0 <= size < _MAX_SIZE:
            raise ValueError("a file without a name, or of an impossible size")
        if (file.blob_id and not _matches(_COMMIT, file.blob_id)) or (file.lfs and not _matches(_SHA256, sha256)):
            raise ValueError("a digest is not one")
    return str(info.sha)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def hub_client(address: HubAddress) -> httpx2.Client:
    """A client for the files of the hub; not huggingface_hub's, which is shared: closing this one ends what is in
    flight.
    """
    require("huggingface_hub", "hub", f"reading {address}")
    return make_client()


def _token_is_known() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _page(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _cached_snapshot(address: HubAddress) -> Path | None:
    """The folder of the revision in the hub's cache, if it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(address.repository, revision=address.revision, local_files_only=True))
    except (OSError, ValueError):
        return None
