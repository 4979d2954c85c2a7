"""The renames that put a staged output at its destination, and undo it.

``new_fd`` is the open folder in the staging place that contains the new output under the destination's name.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemma2tool.storage import syscalls
from gemma2tool.storage.staging.lock import ASIDE, OLD
from gemma2tool.storage.staging.place import StagingPlace
from gemma2tool.storage.syscalls import retrying, sync_folder, translate_os_errors


def put_in_place(place: StagingPlace, new_fd: int) -> None:
    """Moves the new output to the destination. What the destination held is then in ``new_fd`` or in ``old``."""
    name = place.name
    with translate_os_errors(place.parent / name, "moving the finished output into place"):
        if place.identity(name, place.parent_fd) is None:
            retrying(os.rename, name, name, src_dir_fd=new_fd, dst_dir_fd=place.parent_fd)
        elif not syscalls.exchange(name, new_fd, name, place.parent_fd):
            retrying(os.rename, name, OLD, src_dir_fd=place.parent_fd, dst_dir_fd=place.fd)
            retrying(os.rename, name, name, src_dir_fd=new_fd, dst_dir_fd=place.parent_fd)
        sync_folder(place.parent_fd)


def put_back(place: StagingPlace, new_fd: int, new: tuple[int, int]) -> None:
    """Undoes as much of ``put_in_place`` as was done.

    ``new`` is the new output's identity, which tells where it is now.

    Raises OSError or ToolError if that fails.
    """
    name = place.name
    if place.identity(name, place.parent_fd) == new:
        if place.identity(name, new_fd):  # the old output: the two were swapped
            syscalls.exchange(name, new_fd, name, place.parent_fd)
        else:
            retrying(os.rename, name, name, src_dir_fd=place.parent_fd, dst_dir_fd=new_fd)
    place.recover()


def set_aside(place: StagingPlace, neighbor: Path) -> None:
    """Moves a file beside the destination into the staging place.

    Raises ResourceError, leaving it where it was, if the disk fails.
    """
    with translate_os_errors(neighbor, "moving it aside"):
        retrying(os.rename, neighbor.name, ASIDE, src_dir_fd=place.parent_fd, dst_dir_fd=place.fd)
        sync_folder(place.parent_fd)


def bring_back(place: StagingPlace, neighbor: Path) -> None:
    """Undoes ``set_aside``, unless nothing was set aside or another file has taken the name. Raises ResourceError."""
    with translate_os_errors(neighbor, "moving it back"):
        if place.identity(ASIDE, place.fd) and not place.identity(neighbor.name, place.parent_fd):
            retrying(os.rename, ASIDE, neighbor.name, src_dir_fd=place.fd, dst_dir_fd=place.parent_fd)
