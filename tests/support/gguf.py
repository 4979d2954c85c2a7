"""What the tests of the GGUF room share: the oracles' expectations, and writing an ``Output`` in the plainest way."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
from pathlib import Path

from gemma2tool.containers import gguf
from gemma2tool.formats.base import Output
from gemma2tool.formats.options import WriteOptions
from gemma2tool.pipeline.write import write_output
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.options import write_options

VALUE_TYPES = [
    "UINT8",
    "INT8",
    "UINT16",
    "INT16",
    "UINT32",
    "INT32",
    "FLOAT32",
    "BOOL",
    "STRING",
    "ARRAY",
    "UINT64",
    "INT64",
    "FLOAT64",
]
TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
IMATRIX_PATH = "<the path given>"


@functools.cache
def expected(oracles: Path) -> dict:
    return json.loads(gzip.decompress((oracles / "gguf" / "expected.json.gz").read_bytes()))


class _File:
    def __init__(self, path: Path, size: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.truncate(self.fd, size)

    def pwrite(self, offset: int, buffer: object) -> None:
        assert os.pwrite(self.fd, buffer, offset) == len(memoryview(buffer))


def write(output: Output, folder: Path, *, memory: int = 64 << 20) -> list[Path]:
    """The output through the pipeline's writer, on two threads. What it leaves out would show as zeros."""
    sinks = {file.name: _File(folder / file.name, file.size) for file in output.files}
    try:
        write_output(output, sinks, threads=2, memory=memory)
    finally:
        for sink in sinks.values():
            os.close(sink.fd)
    return [folder / file.name for file in output.files]


def described(path: Path) -> dict:
    """A GGUF file in the terms of expected.json."""
    header = gguf.read_header(path, GGML_BLOCKS)
    data = path.read_bytes()
    kv = []
    for key, value in header.kv.items():
        types = [VALUE_TYPES[value.type]]
        content = value.value
        if value.element_type is not None:
            types.append(VALUE_TYPES[value.element_type])
            content = list(content)
            if len(content) > 16:
                digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
                content = {"len": len(content), "sha256": digest}
        if key == "quantize.imatrix.file":
            content = IMATRIX_PATH
        kv.append([key, types, content])
    tensors = []
    for name, entry in header.tensors.items():
        digest = hashlib.sha256(data[entry.offset : entry.offset + entry.nbytes]).hexdigest()
        tensors.append([name, TYPE_NAMES[entry.type_id], list(entry.dims), digest])
    return {"kv": kv, "tensors": tensors, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def differences(got: dict, reference: dict) -> list[str]:
    """What of ``reference``, which an oracle recorded, is otherwise in ``got``; empty where all is reproduced."""
    differing = []
    if got["kv"] != reference["kv"]:
        expected = {entry[0]: entry for entry in reference["kv"]}
        differing += [
            f"{entry[0]}: {entry[1:]} instead of {expected.get(entry[0])}"
            for entry in got["kv"]
            if entry != expected.get(entry[0])
        ]
        differing += [f"keys {[e[0] for e in got['kv']]} instead of {[e[0] for e in reference['kv']]}"]
    if [entry[:3] for entry in got["tensors"]] != [entry[:3] for entry in reference["tensors"]]:
        differing.append("the tensors' names, types, shapes or order differ")
    digests = {entry[0]: entry[3] for entry in reference["tensors"]}
    differing += [
        f"{name}: bytes of {type} differ" for name, type, _, digest in got["tensors"] if digests.get(name) != digest
    ]
    differing += [key for key in ("bytes", "sha256") if key in reference and got[key] != reference[key]]
    return differing


def options(
    name: str = "out.gguf", *, dtype: str | None = None, type: str | None = None, **extra: object
) -> WriteOptions:
    return write_options(dtype=dtype, type=type, name=name, **extra)
