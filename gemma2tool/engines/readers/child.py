"""The witness: ``python -m gemma2tool.engines.readers.child``. Reads with the libraries alone.

Request: ``container`` ("gguf", "safetensors"), ``files`` (paths), ``tensors``: by Hugging Face's names of a Gemma 2,
the shape and the ranges of rows to send; ``raw``: by the file's own names, the ranges of stored rows; ``layers``: how
many.

Answer, a message for each of:

- ``library``: its name, version, and the processor time of its import;
- ``entry``: a tensor as the library lists it: file, name, shape, type; after the last, ``listed``;
- ``values``: rows of a tensor as float32, as the library dequantizes them, less the 1 that GGUF adds to norms;
- ``shape``: the library's shape of a tensor is not the one asked for;
- ``raw``: rows of a tensor as they are stored;
- ``absent``: the library's table has the name, and the file no such tensor;
- ``refused``: the library does not accept the file;
- ``unable``: the library cannot do this here, which says nothing about the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2tool.engines.messages import Message, Unable, serve


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages for a request."""
    if request["container"] == "gguf":
        from gemma2tool.engines.readers.gguf_library import read
    else:
        from gemma2tool.engines.readers.safetensors_library import read
    try:
        yield from read(request)
    except Unable as error:
        yield Message({"kind": "unable", "message": str(error)})
    yield Message({"kind": "time", "cpu_seconds": time.process_time()})


if __name__ == "__main__":
    serve(answer)
