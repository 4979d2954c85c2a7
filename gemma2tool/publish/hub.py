"""A repository on the Hugging Face hub that is written to, through huggingface_hub: its token, its endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemma2tool.errors import InputRefused, ResourceError
from gemma2tool.errors.extras import require
from gemma2tool.receipt.files import digest_file
from gemma2tool.sources.fetching import attempt
from gemma2tool.sources.http import TRANSIENT, http_errors
from gemma2tool.sources.remote import Digest, Transient
from gemma2tool.version import __version__

Result = TypeVar("Result")
_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN, with a token that may write"


@dataclass(frozen=True)
class LocalFile:
    """A file to upload, and the SHA-256 that it must have."""

    path: Path
    sha256: str

    def is_at(self, remote: Digest | None) -> bool:
        """Whether the repository has this content already."""
        if remote is None or remote.algorithm == "sha256":
            return remote is not None and remote.value == self.sha256
        content = self.path.read_bytes()  # a small file, which the hub knows by its Git blob
        blob = remote.hasher(len(content))
        blob.update(content)
        return blob.hexdigest() == remote.value


class Target:
    """The repository ``name``. Nothing connects before a method is called."""

    def __init__(self, name: str) -> None:
        require("huggingface_hub", "hub", f"uploading to hf://{name}")
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        if get_token() is None:
            raise InputRefused("publish.refused", f"hf://{name}: no token is set", hint=_LOG_IN)
        disable_progress_bars()
        self.name, self.address = name, f"hf://{name}"
        self.api = HfApi(library_name="gemma2tool", library_version=__version__)

    def files(self) -> dict[str, Digest]:
        """The files that it has; none if there is no such repository yet."""
        from huggingface_hub import errors

        try:
            info = self._asked(lambda: self.api.model_info(self.name, files_metadata=True, timeout=30))
        except InputRefused as refused:
            if isinstance(refused.__cause__, errors.RepositoryNotFoundError):
                return {}
            raise
        return {
            file.rfilename: Digest("sha256", file.lfs.sha256) if file.lfs else Digest("git", str(file.blob_id))
            for file in info.siblings or ()
        }

    def create(self, *, private: bool) -> None:
        """Make the repository if it is not there, and see whether it may be written to."""
        from huggingface_hub import CommitOperationAdd

        self._asked(lambda: self.api.create_repo(self.name, private=private or None, exist_ok=True))
        question = CommitOperationAdd("README.md", b"-")  # a small file is not sent before it is committed
        self._asked(lambda: self.api.preupload_lfs_files(self.name, [question]))

    def upload(self, files: Mapping[str, LocalFile], message: str) -> None:
        """Commit files by their paths in the repository, all or none.

        Raises ``InputRefused`` (``publish.changed``) for a file that does not have its SHA-256: nothing is sent then.
        """
        self._asked(lambda: self._commit(files, message))

    def _commit(self, files: Mapping[str, LocalFile], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = []
        for name, file in files.items():
            operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file.path))
            if operation.upload_info.sha256.hex() != file.sha256:
                raise InputRefused("publish.changed", f"{file.path}: has changed since it was verified")
            operations.append(operation)
        self.api.create_commit(self.name, operations, commit_message=message)

    def _asked(self, call: Callable[[], Result]) -> Result:
        """``call()``, attempted again where the failure may pass, with the client's errors as those of this program."""
        try:
            return attempt(self.address, lambda: self._translated(call))
        except ResourceError as error:
            if error.id != "source.unreachable":
                raise
            reason = error.message.partition("could not be read, ")[2]
            raise ResourceError("publish.unreachable", f"{self.address}: not uploaded, {reason}") from error

    def _translated(self, call: Callable[[], Result]) -> Result:
        from huggingface_hub import errors

        try:
            with http_errors(self.address):
                return call()
        except errors.OfflineModeIsEnabled as error:
            raise ResourceError("source.offline", f"{self.address}: HF_HUB_OFFLINE is set") from error
        except errors.RepositoryNotFoundError as error:
            message = f"{self.address}: there is no such repository, or your token may not write to it"
            raise InputRefused("publish.refused", message, hint=f"check the name; {_LOG_IN}") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in TRANSIENT:
                raise Transient(f"the hub answered {status}") from error
            hint = _LOG_IN if status in (401, 403) else ""
            raise InputRefused("publish.refused", f"{self.address}: the hub answered {status}", hint=hint) from error
        except RuntimeError as error:  # how the client reports an object that was not taken
            raise Transient(f"{error}: {error.__cause__}" if error.__cause__ else str(error)) from error
        except (TypeError, KeyError, ValueError) as error:
            raise InputRefused("publish.refused", f"{self.address}: {error}") from error


def local_file(path: Path) -> LocalFile:
    """A file as it is now."""
    return LocalFile(path, digest_file(path, path.name).sha256)
