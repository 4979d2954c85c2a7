"""Reading and writing files, and what the machine provides."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

_DOWNLOAD = "download the file again"

ENTRIES = (
    resource("disk.error", "the system refused to write, sync or rename a file", "write to another disk"),
    resource(
        "disk.file-too-large", "the file is too large for the file system or a resource limit", "write to another disk"
    ),
    resource("disk.full", "the disk has no room for the output", "free space on this disk or write to another one"),
    resource("disk.io", "the disk reported an error while writing", "write to another disk"),
    refused("file.changed", "the file changed while it was being read", "wait until it is complete, then run again"),
    resource("file.io", "the disk reported an error while reading", "check the disk"),
    refused("file.missing", "a file does not exist", "check the path, or download the file"),
    refused("file.archive", "the file is an archive", "unpack it, then pass the folder or the file that was in it"),
    refused("file.lfs-pointer", "the file is a Git LFS pointer, not the file itself", "run 'git lfs pull'"),
    refused("file.message", "the file contains text, such as a server's error message", "download the file itself"),
    refused(
        "file.not-regular",
        "the path is a device, a pipe or something else that is not a file",
        "pass the path of a file",
    ),
    refused(
        "file.other-container",
        "the file's content does not match its name",
        "rename the file to match its content",
    ),
    refused("file.too-large", "the file is larger than the limit for its kind", "check that it is the right file"),
    refused("file.truncated", "the file ends before the data that it describes", _DOWNLOAD),
    refused(
        "file.unreadable", "permission to read the file was denied", "check the permissions of the file and its folder"
    ),
    resource("files.too-many", "the process has too many open files", "raise the limit with ulimit -n"),
    refused(
        "index.link",
        "a file or folder of the checkpoint is a symbolic link that points outside it",
        "replace the link with a copy",
    ),
    refused(
        "index.mismatch",
        "the index assigns a tensor to a file that does not contain it",
        "the index and the shards do not belong together: download them again",
    ),
    refused(
        "file.web-page", "the file is a web page", "download the file itself; log in first if an account is needed"
    ),
    refused("file.zeros", "the file begins with nothing but zeros", _DOWNLOAD),
    refused("index.name", "the index names a file that is not in the checkpoint's folder", "correct the index file"),
    refused("index.too-many-tensors", "the index names more tensors than the limit allows", "download the index again"),
    refused("index.weight-map", "the index has no map from tensors to files", "download the index again"),
    refused(
        "input.distributed",
        "the folder contains a training run's shards, which are not whole tensors",
        "merge the shards with the library that wrote them",
    ),
    refused("input.empty", "the file is empty", _DOWNLOAD),
    refused("input.kind", "the path is neither a file nor a folder", "pass the path of a checkpoint"),
    refused("input.missing", "the path does not exist", "check the path of the checkpoint"),
    refused(
        "input.other-file",
        "the path is a file that belongs to a model, such as its config, its receipt or an adapter",
        "pass the checkpoint itself",
    ),
    refused(
        "input.run", "the folder is not a checkpoint itself but contains checkpoints", "pass the folder of one of them"
    ),
    refused("input.several", "the folder contains several weight files", "name the file to read"),
    refused(
        "input.unknown",
        "no Gemma 2 checkpoint in a known format was found at the path",
        "run 'gemma2tool formats' to list the formats that can be read",
    ),
    resource("memory.exhausted", "memory ran out", "close other programs, or lower --memory and --threads"),
    refused(
        "shards.incomplete", "shards of a checkpoint are missing", "download the missing shards into the same folder"
    ),
    refused(
        "shards.several",
        "a folder contains shards of several checkpoints and no index",
        "move the shards that are not part of the model out of the folder",
    ),
    refused("text.binary", "the text file contains NUL bytes", "pass a UTF-8 text file"),
    usage("text.empty", "the text is empty", "pass a file that contains text"),
    refused("text.encoding", "the text file is not UTF-8", "convert the file to UTF-8"),
    resource("threads.exhausted", "the system refused to start more threads", "lower --threads"),
)
