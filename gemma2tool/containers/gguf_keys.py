"""The key-values of a GGUF file alone: what is said about a model whose tensors need not be known."""

from __future__ import annotations

import os
import struct

from gemma2tool.containers.gguf import MAX_KV, Cursor, GGUFValue, read_value, read_version
from gemma2tool.storage.reading import open_for_reading

_U64 = struct.Struct("<Q")


def read_key_values(path: str | os.PathLike[str]) -> dict[str, GGUFValue]:
    """The key-values, the last of equal keys. Raises InputRefused (``gguf.*``) where they cannot be read."""
    with open_for_reading(path) as reader:
        cursor = Cursor(reader)
        read_version(cursor)
        cursor.integer(_U64)
        count = cursor.integer(_U64)
        if count > MAX_KV:
            raise cursor.refusal("too-many-keys", f"has a count of {count} key-values; at most {MAX_KV} are accepted")
        keys: dict[str, GGUFValue] = {}
        for _ in range(count):
            key = cursor.name("key")
            keys[key] = read_value(cursor, key)
        return keys
