"""Sources that are not local files: hubs, object stores, web servers, archives."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource

ENTRIES = (
    refused(
        "source.name",
        "a source lists a file whose name is not a plain relative path",
        "unpack or download the files that you need, then give their folder",
    ),
    resource(
        "source.place",
        "the folder for temporary files cannot hold the list of a source's files",
        "set TMPDIR to a folder on a disk with free space",
    ),
    refused("source.too-many-files", "a source lists more files than are accepted", "name the file or folder to read"),
)
