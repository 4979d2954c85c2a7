"""From what a user named to a local path, behind which the bytes of the source are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

from gemma2tool.errors import InputRefused, ToolError, choices
from gemma2tool.sources import archive, hub_cache
from gemma2tool.sources.address import Address, HubAddress, hub_name, parse
from gemma2tool.sources.readahead import ReadAhead
from gemma2tool.storage.attached import AttachedFolder, SourceFile

logger = logging.getLogger("gemma2tool")


class Located:
    """A source that can be read at ``path`` until it is closed.

    ``address``: what people know it by; None for a local path that is read as it is. ``pinned``: the address of exactly
    this content, for receipts; None for a local one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address: str | None = None
        self.pinned: str | None = None
        self.failure: Callable[[], ToolError | None] = lambda: None
        """The first failure of the source, if there was one."""
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Located:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def take(self, path: Path, part: AttachedFolder | archive.InPlace | archive.Unpacked) -> None:
        """Read at ``path`` from now on, which is inside of ``part``."""
        self.path = path
        self._stack.callback(part.close)

    def closing(self, close: Callable[[], None]) -> None:
        """Call ``close`` when this is closed."""
        self._stack.callback(close)


def locate(
    source: Path | str, *, suffixes: Collection[str] = (), beside: Collection[str] = (), place: Path | None = None
) -> Located:
    """What ``source`` names: a path, an address (hf://, s3://, gs://, https://), or the name of a model on the hub.

    Archives (.tar, .tar.gz) and folders of the hub's cache are looked into. The network is touched only for an address
    or a name on the hub; the latter is logged first. ``suffixes``: of files that are no names on the hub. ``beside``:
    names of the small files of a model, which a web server need not list. ``place``: where a compressed archive is
    unpacked.
    """
    text = str(source)
    address = parse(text)
    if address is None and (address := hub_name(text, (*suffixes, *archive.SUFFIXES))) is not None:
        logger.info("%s: no such folder here, so it is looked up on the Hugging Face hub: %s", text, address)
    located = Located(Path(source))
    try:
        if isinstance(address, HubAddress):
            _hub(located, address)
        elif address is not None:
            _server(located, address, beside)
        elif located.path.is_dir():
            located.path = hub_cache.snapshot(located.path)
        _look_into_archive(located, place)
    except BaseException:
        located.close()
        raise
    return located


def _hub(located: Located, address: HubAddress) -> None:
    from gemma2tool.sources.hub import Repository, hub_client

    ahead = _read_ahead(located)
    client = hub_client(address)
    located.closing(client.close)
    repository = Repository(address, client, ahead)
    below = f"/{address.path}" if address.path else ""
    located.address, located.pinned = str(address), address.at(repository.commit) + below
    if repository.cached is not None:
        located.path = repository.cached / address.path
        return
    _attach(
        located, address.repository.rpartition("/")[2], address.at(address.revision), repository.files, address.path
    )


def _server(located: Located, address: Address, beside: Collection[str]) -> None:
    """A file or folder of an object store or a web server."""
    ahead = _read_ahead(located)
    text = str(address)
    if address.scheme in ("s3", "gs"):
        from gemma2tool.sources.objects import objects

        name, files = objects(address, ahead)
    else:
        from gemma2tool.sources.http import check_address, make_client, without_secrets
        from gemma2tool.sources.web import Website

        check_address(text)
        client = make_client()
        located.closing(client.close)
        site = Website(address, client, ahead, beside)
        name, files, text = site.name, site.files, without_secrets(text)
    located.address = located.pinned = text
    folder = text.rstrip("/")
    if name:
        folder = folder.rpartition("/")[0]
    _attach(located, folder.rpartition("/")[2], folder, files, name)


def _read_ahead(located: Located) -> ReadAhead:
    ahead = ReadAhead()
    located.closing(ahead.close)
    located.failure = lambda: ahead.failure
    return ahead


def _attach(located: Located, name: str, address: str, files: dict[str, SourceFile], inside: str) -> None:
    """Attach ``files`` as a folder, and read ``inside`` of it: a file, a folder, or empty for all of it."""
    folder = AttachedFolder(name, address, files)
    located.take(folder.path, folder)
    if not inside:
        return
    located.path = folder.path.joinpath(*inside.split("/"))
    if ".." in inside.split("/") or not located.path.exists():
        names = sorted(files)
        likely = choices.meant(inside, names)
        hint = f"did you mean {' or '.join(likely)}?" if likely else f"it has {', '.join(names[:8])}"
        raise InputRefused("source.missing", f"{address}: has no {inside}", hint=hint)


def _look_into_archive(located: Located, place: Path | None) -> None:
    name, address = located.path.name.lower(), located.address or str(located.path)
    if not name.endswith(archive.SUFFIXES) or not located.path.is_file():
        return
    if archive.is_something_else(located.path):
        return  # the readers say what it is
    if name.endswith(archive.COMPRESSED):
        unpacked = archive.Unpacked(located.path, address, place)
        located.take(unpacked.path, unpacked)
    else:
        in_place = archive.InPlace(located.path, address)
        located.take(in_place.path, in_place)
    located.address = address
