"""Sources that are not local files: hubs, object stores, web servers, archives."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

_AGAIN = "run the command again; if it fails again, download the files and pass their folder"

ENTRIES = (
    usage(
        "source.address",
        "the address is of an unsupported kind",
        "write hf://ORG/NAME, s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH or a path",
    ),
    refused(
        "source.archive",
        "a tar archive is damaged, or contains links or unsafe names",
        "download it again, or unpack it and pass the folder",
    ),
    refused("source.digest", "a file does not match the digest or size that its server announced", _AGAIN),
    refused(
        "source.gated", "the hub repository is gated", "accept its license on its page, then log in: hf auth login"
    ),
    refused(
        "source.kept",
        "a file that no earlier download created is in the way of a download",
        "choose a different folder for --keep-download",
    ),
    refused("source.length", "a server sent bytes that were not requested", _AGAIN),
    refused(
        "source.listing",
        "a web server does not list the files of the folder",
        "pass the address of the weight file, or download the folder",
    ),
    refused("source.missing", "the source does not exist, or access to it is hidden", "check the address"),
    refused(
        "source.name",
        "a source lists a file whose name is not a plain relative path",
        "unpack or download the files that you need, then pass their folder",
    ),
    refused(
        "source.no-ranges",
        "a server does not support byte ranges of uncompressed files",
        "download it first: --keep-download FOLDER",
    ),
    resource("source.offline", "the hub's client is offline", "unset HF_HUB_OFFLINE, or download the model first"),
    resource(
        "source.place",
        "the temporary folder has no room for the list of a source's files",
        "set TMPDIR to a folder on a disk with free space",
    ),
    refused("source.refused", "a server refuses a request", "check the address; open it in a browser to see why"),
    refused(
        "source.snapshots", "a folder of the hub's cache contains several snapshots", "pass the folder of one of them"
    ),
    refused(
        "source.too-many-files", "the source lists more files than the limit allows", "name the file or folder to read"
    ),
    refused(
        "source.unauthorized",
        "a server refuses access",
        "check the credentials: those of the AWS or Google client, or those in the address",
    ),
    resource(
        "source.unreachable",
        "a source could not be reached after several attempts",
        "check the connection, then run the same command again: it resumes",
    ),
)
