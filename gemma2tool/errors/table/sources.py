"""Sources that are not local files: hubs, object stores, web servers, archives."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

_AGAIN = "run the command again; if it fails again, download the files and give their folder"

ENTRIES = (
    usage(
        "source.address",
        "an address is not of a kind that is read",
        "write hf://ORG/NAME, s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH or a path",
    ),
    refused(
        "source.archive",
        "a tar archive is damaged, or holds links or names that are not plain",
        "download it again, or unpack it and give the folder",
    ),
    refused("source.digest", "a file of a source is not the one that its server announced", _AGAIN),
    refused(
        "source.gated", "a repository of the hub is gated", "accept its license on its page, then log in: hf auth login"
    ),
    refused(
        "source.kept",
        "a file is in the way of a download, and is not from an earlier one",
        "choose another folder for --keep-download",
    ),
    refused("source.length", "a server sent other bytes than it was asked for", _AGAIN),
    refused(
        "source.listing",
        "a folder of a web server has no listing of its files",
        "give the address of the file of weights, or download the folder",
    ),
    refused("source.missing", "a source does not exist, or is not shown", "check the address"),
    refused(
        "source.name",
        "a source lists a file whose name is not a plain relative path",
        "unpack or download the files that you need, then give their folder",
    ),
    refused(
        "source.no-ranges",
        "a server does not send parts of files as they are stored",
        "download it first: --keep-download FOLDER",
    ),
    resource("source.offline", "the hub's client may not connect", "unset HF_HUB_OFFLINE, or download the model first"),
    resource(
        "source.place",
        "the folder for temporary files cannot hold the list of a source's files",
        "set TMPDIR to a folder on a disk with free space",
    ),
    refused("source.refused", "a server refuses a request", "check the address; open it in a browser to see why"),
    refused(
        "source.snapshots", "a folder of the hub's cache holds several snapshots", "give the folder of one of them"
    ),
    refused("source.too-many-files", "a source lists more files than are accepted", "name the file or folder to read"),
    refused(
        "source.unauthorized",
        "a server refuses access",
        "check the credentials: those of the AWS or Google client, or an address that contains them",
    ),
    resource(
        "source.unreachable",
        "a source could not be reached after several attempts",
        "check the connection, then run the same command again: what is complete is kept",
    ),
)
