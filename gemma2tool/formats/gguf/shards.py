"""Which files make up a GGUF: one, or all shards of a split one."""

from __future__ import annotations

import re
from pathlib import Path

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFHeader
from gemma2tool.errors import InputRefused
from gemma2tool.formats.gguf.key_values import KeyReader
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS, UNREAD_TYPES
from gemma2tool.storage.paths import confined_path

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_headers(file: Path) -> list[GGUFHeader]:
    """The header of the file, or of every shard of a split one, that with the key-values first.

    Raises ``InputRefused`` (``gguf.split``, ``gguf.split-name``) for shards that do not belong together.
    """
    header = gguf.read_header(file, GGML_BLOCKS, UNREAD_TYPES)
    if "split.count" not in header.kv:
        return [header]
    count = KeyReader(header.kv, file.name).integer("split.count")
    name = _SHARD.fullmatch(file.name)
    if count == 1 and name is None:
        return [header]
    if name is None or int(name[3]) != count:
        raise InputRefused(
            "gguf.split-name",
            f"{file.name}: a shard of {count}, but its name does not end in -00001-of-{count:05d}.gguf",
        )
    headers = []
    for number in range(1, count + 1):
        path = confined_path(file.parent, _shard(file, name[1], number, count), what="shard")
        header = gguf.read_header(path, GGML_BLOCKS, UNREAD_TYPES)
        keys = KeyReader(header.kv, path.name)
        if keys.integer("split.no") != number - 1 or keys.integer("split.count") != count:
            raise InputRefused("gguf.split", f"{path.name}: its split.no or split.count does not match its name")
        headers.append(header)
    total = KeyReader(headers[0].kv, file.name).integer("split.tensors.count", None)
    stored = sum(len(header.tensors) for header in headers)
    if total is not None and total != stored:
        raise InputRefused("gguf.split", f"{file.name}: the shards hold {stored} tensors of {total}")
    return headers


def _shard(file: Path, stem: str, number: int, count: int) -> str:
    """The name of a shard. Raises ``InputRefused`` if it is missing, naming all that are."""
    names = [f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    if not (file.parent / names[number - 1]).exists():
        missing = [name for name in names if not (file.parent / name).exists()]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        message = f"{file}: {count - len(missing)} of {count} shards are there; missing: {', '.join(missing[:3])}{more}"
        raise InputRefused("gguf.split", message, hint="download the missing shards into the same folder")
    return names[number - 1]


def only_model(folder: Path) -> Path | None:
    """The GGUF of a folder that holds exactly one; of a split one, its first shard."""
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    names = [_SHARD.fullmatch(path.name) for path in files]
    models = {(name[1], name[3]) if name else None for name in names}
    if len(files) == 1 or (len(models) == 1 and None not in models):
        return files[0]
    return None
