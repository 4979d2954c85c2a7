"""What users type for a source: a local path, an address with a scheme, or a model's name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from gemma2tool.errors import UsageError

HUB = "hf"
STORES = ("s3", "gs", "gcs")
WEB = ("https", "http")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_HUB = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?")
_HUB_PAGE = re.compile(
    r"(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)"
    r"(?:/(?:resolve|blob|tree|raw)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?"
)
"""A page of a repository, or of a file in it."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Address:
    """``scheme``: "hf", "s3", "gs", "https" or "http". ``rest``: what follows it."""

    scheme: str
    rest: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.rest}"


@dataclass(frozen=True)
class HubAddress:
    """A model repository, a revision of it, and a file or folder in it (empty: all of it)."""

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        return self.at(self.revision) + (f"/{self.path}" if self.path else "")

    def at(self, revision: str | None) -> str:
        """The address of the whole repository at a revision."""
        return f"hf://{self.repository}" + (f"@{revision}" if revision else "")


def parse(text: str) -> Address | HubAddress | None:
    """The address that ``text`` is; None for a path.

    Raises UsageError ``source.address`` for an address that cannot be read from.
    """
    match = _SCHEME.match(text)
    if match is None or len(match[1]) == 1:
        return None
    scheme, rest = match[1].lower(), text[match.end() :]  # a Path has lost one of the slashes
    if scheme in WEB and (page := _HUB_PAGE.fullmatch(rest)):
        return HubAddress(page[1], unquote(page[2]) if page[2] else None, unquote(page[3] or "").strip("/"))
    if scheme in (HUB, "huggingface"):
        return _hub(text, rest)
    if scheme in STORES:
        scheme = "gs" if scheme == "gcs" else scheme
    elif scheme not in WEB:
        raise UsageError("source.address", f"{text}: {scheme}:// addresses are not supported")
    if not rest.strip("/"):
        raise UsageError("source.address", f"{text}: names no file or folder")
    return Address(scheme, rest)


def hub_name(text: str, suffixes: Collection[str]) -> HubAddress | None:
    """The repository that ``text`` names without a scheme, as in "google/gemma-2-2b-it".

    It has exactly one slash, does not end like a file of a model (``suffixes``), and its first part is not a folder.
    """
    if not _HUB_NAME.fullmatch(text) or text.lower().endswith(tuple(suffixes)):
        return None
    return None if Path(text).parent.exists() else HubAddress(text)


def _hub(text: str, rest: str) -> HubAddress:
    parts = rest.split("/")
    if parts[0] in ("datasets", "spaces", "kernels", "buckets") and len(parts) > 2:
        raise UsageError("source.address", f"{text}: is not a model repository")
    if parts[0] == "models" and len(parts) > 2:
        rest = "/".join(parts[1:])
    match = _HUB.fullmatch(rest)
    if match is None:
        raise UsageError("source.address", f"{text}: does not name a model repository")
    return HubAddress(match[1], unquote(match[2]) if match[2] else None, (match[3] or "").strip("/"))
