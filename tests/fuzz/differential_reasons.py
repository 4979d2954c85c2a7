"""Where gemma2tool refuses what the library accepts, or the other way, and why that stays as it is.

By container: a regular expression of who refuses with which message, and the reason.
"""

from __future__ import annotations

_LAYOUT = "bytes that no tensor has are damage or hide something; llama.cpp refuses most of them"
_UNREAD = "gemma2tool reads the tree of the newest version only; older ones, times and counts are not read"
_MISSING = "a missing field has the only value that is accepted"
_LIBHDF5 = "the library also reads parts of the file that no tensor depends on: free lists, attributes, times"

EVERYWHERE = {
    r"theirs (?:hang|crash|MemoryError)": "the library has no limit for what a file says it has, or crashes",
}

REASONS: dict[str, dict[str, str]] = {
    "safetensors": {
        r"ours safetensors\.tensor-fields": "the format names three fields; another program could act on a fourth",
        r"ours safetensors\.duplicate-": "programs that take the first and those that take the last see other tensors",
    },
    "gguf": {
        r"ours gguf\.(?:gap|trailing-bytes|overlap|unaligned)": _LAYOUT,
        r"ours gguf\.(?:bool|name-length|duplicate-\w+|alignment|version|dims|shape)": "llama.cpp refuses it, too",
        r"theirs UnicodeDecodeError": "values need not be UTF-8 for llama.cpp; the bytes are kept",
    },
    "torch": {
        r"ours (?:zip|torch)\.(?:crc\w*|checksum)": "torch does not compare the checksums of storages",
        r"ours zip\.": "an archive that programs unpack or read in different ways",
        r"ours torch\.storage-size": "torch does not compare the size of a storage with its member",
        r"theirs .*Unsupported operand 1(?:4[0-9]|50)": "weights_only knows protocol 2; LitGPT saves with 5",
        r"theirs .*version": "the archive's version is not needed to read it",
    },
    "hdf5": {
        r"ours hdf5\.(?:name|dtype)": "Keras writes neither names that are not UTF-8 nor other kinds of integers",
        r"theirs .*(?:heap|temporary file space|exceeds EOA)": _LIBHDF5,
    },
    "zarr": {
        r"ours orbax\.metadata: .*fill_value": "Orbax writes no fill value but zero",
        r"ours orbax\.(?:missing-chunk|broken)": "for the library a chunk that is not there is the fill value",
        r'theirs .*"(?:compressor|filters|order)": Expected': _MISSING,
        r"theirs .*extra members": "what else a regular grid says does not change what it means",
    },
    "ocdbt": {
        r"ours ocdbt\.path": "a path with characters that tensorstore does not write",
        r"theirs .*(?:manifest|node)": _UNREAD,
    },
}
