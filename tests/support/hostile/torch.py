"""torch.save files that are each wrong, or attack, in one way."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import Any

from tests.support.hostile.refusal import Hostile

OK_PICKLE = b"\x80\x02}."


@dataclass(frozen=True)
class Member:
    """A member of a zip archive, in which every field of both headers can be forged (None: the correct value)."""

    name: str | bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    extra: bytes = b""
    local_name: str | None = None
    local_flags: int | None = None
    local_method: int | None = None
    local_crc: int | None = None
    local_size: int | None = None
    local_signature: bytes = b"PK\3\4"
    signature: bytes = b"PK\1\2"
    header_offset: int | None = None
    disk: int = 0


def zip_members(data: bytes) -> list[Member]:
    """The members of a valid archive, to be assembled again."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [Member(name, file.read(name)) for name in file.namelist()]


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def archive(
    members: list[Member],
    *,
    between: bytes = b"",
    prefix: bytes = b"",
    suffix: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
    directory_offset: int | None = None,
    directory_size: int | None = None,
    disk: int = 0,
    end64: dict[str, int] | None = None,
) -> bytes:
    """A zip archive in the simplest form. ``end64`` adds zip64 end records with fields overridden by name."""
    out, directory = bytearray(prefix), b""
    for member in members:
        name = member.name if isinstance(member.name, bytes) else member.name.encode()
        local_name = name if member.local_name is None else member.local_name.encode()
        crc = _first(member.crc, zlib.crc32(member.data))
        size = _first(member.size, len(member.data))
        packed = _first(member.packed, size)
        offset = _first(member.header_offset, len(out))
        out += struct.pack(
            "<4s5H3I2H", member.local_signature, 0, _first(member.local_flags, member.flags),
            _first(member.local_method, member.method), 0, 0, _first(member.local_crc, crc),
            _first(member.local_size, packed),
            _first(member.local_size, size), len(local_name), 0,
        ) + local_name + member.data + between  # fmt: skip
        directory += struct.pack(
            "<4s6H3I5H2I", member.signature, 0, 0, member.flags, member.method, 0, 0, crc, packed, size, len(name),
            len(member.extra), 0, member.disk, 0, 0, offset,
        ) + name + member.extra  # fmt: skip
    at, total = len(out), len(members)
    offset, size = _first(directory_offset, at), _first(directory_size, len(directory))
    out += directory
    if end64 is not None:
        fields = {"length": 44, "disk": 0, "here": total, "count": total, "size": size, "offset": offset, "disks": 1}
        fields |= {"place": len(out), "signature": 0x06064B50} | end64
        out += struct.pack(
            "<IQ2H2I4Q", *(fields[key] for key in ("signature", "length")), 45, 45, fields["disk"], 0,
            *(fields[key] for key in ("here", "count", "size", "offset")),
        )  # fmt: skip
        out += struct.pack("<4sIQI", b"PK\6\7", 0, fields["place"], fields["disks"])
    count = _first(count, total)
    return (
        bytes(out)
        + struct.pack("<4s4H2IH", b"PK\5\6", disk, 0, count, count, size, offset, len(comment))
        + comment
        + suffix
    )


PKL = Member("a/data.pkl", OK_PICKLE)
LAST = Member("a/byteorder", b"little")


def _zip(id: str, case: str, /, *members: Member, **fields: Any) -> Hostile:
    return Hostile(case, archive(list(members) or [PKL, LAST], **fields), id)


def _forged(id: str, case: str, /, **fields: Any) -> Hostile:
    """The second member is forged."""
    return Hostile(case, archive([PKL, replace(LAST, **fields)]), id)


def _zip64(**values: int) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values.values())


_GOOD = archive([PKL, LAST])
_DEFLATED = zlib.compressobj(9, zlib.DEFLATED, -15)
_BOMB = _DEFLATED.compress(bytes(1 << 26)) + _DEFLATED.flush()

ZIP_CASES = [
    Hostile("empty file", b"", "torch.not-zip"),
    Hostile("a text", b"model: gemma\n" * 9, "file.message"),
    Hostile("a tar", b"data.pkl" + bytes(1016), "torch.not-zip"),
    Hostile("legacy torch.save", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + OK_PICKLE, "pickle.protocol"),
    Hostile("a bare pickle of protocol 4", pickle.dumps({}, 4), "torch.legacy"),
    Hostile("a bare pickle of protocol 0", b"cos\nsystem\n(S'true'\ntR.", "file.message"),
    Hostile("only a signature", b"PK\3\4", "zip.truncated"),
    Hostile("cut in the middle", _GOOD[: len(_GOOD) // 2], "zip.end"),
    Hostile("last byte missing", _GOOD[:-1], "zip.end"),
    Hostile("a byte too many", _GOOD + b"\0", "zip.end"),
    _zip("zip.end", "a comment", comment=b"hello"),
    _zip("zip.gap", "another zip in front", prefix=archive([Member("x", b"PK")]), directory_offset=None),
    _zip("zip.gap", "40 bytes between members", between=bytes(40)),
    _zip("zip.multi-disk", "on another disk", disk=1),
    _forged("zip.multi-disk", "a member on another disk", disk=3),
    _zip("zip.directory", "directory elsewhere", directory_offset=7),
    _zip("zip.directory", "directory size wrong", directory_size=5),
    _zip("zip.directory", "one member more than there is", count=3),
    _zip("zip.directory", "one member less than there is", count=1),
    _zip("zip.too-many-members", "30,000 members", count=30_000),
    _forged("zip.directory", "broken directory entry", signature=b"PK\1\3"),
    _zip("zip.zip64", "directory at 2^32-1 without zip64", directory_offset=0xFFFFFFFF),
    _zip("zip.zip64", "zip64 contradicts the count", end64={"count": 7, "here": 7}),
    _zip("zip.zip64", "zip64 contradicts the size", end64={"size": 1}),
    _zip("zip.zip64", "zip64 record of another length", end64={"length": 45}),
    _zip("zip.zip64", "zip64 record without signature", end64={"signature": 0}),
    _zip("zip.zip64", "locator points elsewhere", end64={"place": 0}),
    _zip("zip.multi-disk", "zip64 on another disk", end64={"disk": 1}),
    _zip("zip.zip64", "zip64 with three disks", end64={"disks": 3}),
    _zip("zip.directory", "zip64 offset near 2^64", directory_offset=0xFFFFFFFF, end64={"offset": (1 << 64) - 60}),
    _forged("zip.size", "zip64 size of 2^63", size=0xFFFFFFFF, packed=0xFFFFFFFF,
        extra=_zip64(size=1 << 63, packed=1 << 63)),
    _forged("zip.zip64", "saturated size without zip64", size=0xFFFFFFFF, packed=0xFFFFFFFF),
    _forged("zip.zip64", "zip64 field without need", extra=_zip64(size=6)),
    _forged("zip.zip64", "zip64 field too short", size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=_zip64(size=6)),
    _forged("zip.extra", "extra field cut off", extra=b"\1\0\x08\0abc"),
    _forged("zip.extra", "two zip64 fields", extra=_zip64() + _zip64()),
    _forged("zip.compressed", "deflated", data=_BOMB[:99], method=8, size=1 << 16, packed=99),
    _forged("zip.compressed", "deflated 1000 to 1", data=_BOMB, method=8, size=1 << 26, packed=len(_BOMB)),
    _forged("zip.compressed", "method 99", method=99),
    _forged("zip.encrypted", "encrypted", flags=1),
    _forged("zip.encrypted", "headers masked", flags=1 << 13),
    _forged("zip.size", "sizes differ", packed=5, size=6),
    _forged("zip.size", "a terabyte", size=0xFFFFFFF0, packed=0xFFFFFFF0),
    _forged("zip.past-end", "larger than its part of the file", size=40, packed=40, local_size=40),
    _forged("zip.gap", "begins beyond the file", header_offset=0xFFFFFF00),
    _zip("zip.duplicate-member", "the same name twice", PKL, LAST, LAST),
    _zip("zip.overlap", "two names for one place", PKL, replace(LAST, header_offset=0)),
    _zip("zip.overlap", "begins inside another", PKL, replace(LAST, header_offset=9)),
    _forged("zip.local-header", "no local header", local_signature=b"PK\7\7"),
    _forged("zip.local-header", "another name locally", local_name="a/byteordex"),
    _forged("zip.local-header", "a longer name locally", local_name="a/byteorderr"),
    _forged("zip.local-header", "another CRC locally", local_crc=1),
    _forged("zip.local-header", "another size locally", local_size=5),
    _forged("zip.local-header", "compressed only locally", local_method=8),
    _forged("zip.local-header", "encrypted only locally", local_flags=1),
    _forged("zip.member-name", "name leaves the archive", name="a/../../etc/passwd"),
    _forged("zip.member-name", "absolute name", name="/etc/passwd"),
    _forged("zip.member-name", "backslashes", name="a\\..\\b"),
    _forged("zip.member-name", "a drive", name="C:/x"),
    _forged("zip.member-name", "a NUL", name="a/b\0c"),
    _forged("zip.member-name", "empty name", name=""),
    _forged("zip.member-name", "a folder", name="a/"),
    _forged("zip.member-name", "name is not UTF-8", name=b"a/\xff\xfe"),
    _forged("zip.member-name", "name of 2,000 bytes", name="a/" + "n" * 2000),
    _forged("torch.crc", "byteorder damaged", crc=1),
    _zip("torch.crc", "pickle damaged", replace(PKL, crc=1)),
    _forged("torch.byteorder", "big-endian", data=b"big"),
    _forged("torch.byteorder", "unknown byte order", data=b"middle"),
    _zip("torch.archive", "no data.pkl", LAST),
    _zip("torch.archive", "two data.pkl", PKL, Member("b/data.pkl", OK_PICKLE)),
    _zip("torch.archive", "data.pkl deeper inside", Member("a/b/data.pkl", OK_PICKLE)),
    _zip("torch.archive", "a member beside the folder", PKL, Member("evil", b"x")),
    _zip("torch.torchscript", "TorchScript", PKL, Member("a/constants.pkl", OK_PICKLE)),
    _zip("torch.too-large", "a pickle of 33 MiB", replace(PKL, data=bytes(33 << 20))),
]  # fmt: skip


def body(code: bytes, stop: bytes = b".") -> bytes:
    return b"\x80\x02" + code + stop


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _int(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def storage(
    name: str = "torch\nFloatStorage", key: str = "0", count: int = 4, device: str = "cpu", tag: str = "storage"
) -> bytes:
    return _tuple(_text(tag), b"c" + name.encode() + b"\n", _text(key), _text(device), _int(count)) + b"Q"


def tensor(
    place: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,),
    hooks: bytes = b"ccollections\nOrderedDict\n)R", rest: bytes = b"", function: str = "_rebuild_tensor_v2",
) -> bytes:  # fmt: skip
    return (
        b"ctorch._utils\n" + function.encode() + b"\n"
        + _tuple(
            storage() if place is None else place, _int(offset), _tuple(*map(_int, shape)), _tuple(*map(_int, stride)),
            b"\x89",
            hooks, rest,
        ) + b"R"
    )  # fmt: skip


def saved(value: bytes, data: bytes = bytes(16)) -> bytes:
    """An archive of {'w': value} with one storage of 16 bytes."""
    return archive([Member("a/data.pkl", body(b"}" + _text("w") + value + b"s")), Member("a/data/0", data), LAST])


def pickled(code: bytes) -> bytes:
    return archive([Member("a/data.pkl", code), Member("a/data/0", bytes(16)), LAST])


def _tensor(id: str, name: str, data: bytes = bytes(16), **fields: Any) -> Hostile:
    return Hostile(name, saved(tensor(**fields), data), id)


TENSOR_CASES = [
    _tensor("torch.stride", "10^12 elements of stride 0", shape=(10**12,), stride=(0,)),
    _tensor("torch.stride", "one stride 0 of two", shape=(2, 2), stride=(0, 1)),
    _tensor("torch.bounds", "windows that overlap into 10^12 elements", shape=(10**6, 10**6), stride=(1, 1)),
    _tensor("torch.bounds", "shape larger than its storage", shape=(5,)),
    _tensor("torch.bounds", "stride beyond its storage", shape=(2, 2), stride=(3, 1)),
    _tensor("torch.bounds", "offset beyond its storage", offset=4, shape=(1,)),
    _tensor("torch.bounds", "offset of an empty tensor beyond its storage", offset=5, shape=(0,)),
    _tensor("torch.bounds", "huge offset", offset=(1 << 63) - 1),
    _tensor("torch.overflow", "shape overflows", shape=(1 << 40, 1 << 40), stride=(1, 1)),
    _tensor("torch.overflow", "zero hides a shape that overflows", shape=(0, 1 << 40, 1 << 40), stride=(1, 1, 1)),
    _tensor("torch.bounds", "huge stride", shape=(2, 2), stride=((1 << 62), 1)),
    _tensor("pickle.tensor", "negative offset", offset=-1),
    _tensor("pickle.tensor", "negative shape", shape=(-4,)),
    _tensor("pickle.tensor", "negative stride", stride=(-1,)),
    _tensor("pickle.tensor", "shape of 2^64", shape=(1 << 64,)),
    _tensor("pickle.tensor", "strides for another shape", stride=(1, 1)),
    _tensor("pickle.tensor", "70 dimensions", shape=(1,) * 70, stride=(1,) * 70),
    _tensor("pickle.tensor", "conjugate", rest=b"}" + _text("conj") + b"\x88s"),
    _tensor("pickle.tensor", "a hook", hooks=b"ccollections\nOrderedDict\n)RK\0Ns"),
    _tensor("torch.storage-missing", "storage that is not there", place=storage(key="1")),
    _tensor("torch.storage-missing", "storage outside the archive", place=storage(key="../../etc/passwd")),
    _tensor("torch.storage-missing", "storage is the pickle", place=storage(key="../data.pkl")),
    _tensor("torch.storage-size", "storage larger than its member", place=storage(count=5)),
    _tensor("torch.storage-size", "storage smaller than its member", place=storage(count=3), shape=(3,)),
    _tensor("torch.storage-size", "member shorter by a byte", data=bytes(15)),
    _tensor("torch.storage-size", "storage of 2^100", place=storage(count=1 << 100)),
    _tensor("pickle.storage", "negative count", place=storage(count=-4)),
    _tensor("pickle.storage", "not a storage tag", place=storage(tag="module")),
    _tensor("pickle.global", "quantized storage", place=storage("torch\nQInt8Storage")),
    _tensor("pickle.storage", "a function as storage class", place=storage("collections\nOrderedDict")),
    _tensor("pickle.tensor", "v3 without dtype", function="_rebuild_tensor_v3",
        place=storage("torch.storage\nUntypedStorage", count=16)),
    _tensor("pickle.tensor", "v3 of a typed storage", function="_rebuild_tensor_v3", rest=b"ctorch\nfloat8_e4m3fn\n"),
    _tensor("pickle.tensor", "v2 of an untyped storage", place=storage("torch.storage\nUntypedStorage", count=16)),
    Hostile("20,001 tensors", pickled(body(
        b"}(" + b"".join(_text(f"t{i}") + (tensor() + b"q\0" if i == 0 else b"h\0") for i in range(20_001)) + b"u"
    )), "torch.too-many-tensors"),
]  # fmt: skip


_CALLS = {
    "os.system": "os\nsystem", "posix.system": "posix\nsystem", "nt.system": "nt\nsystem",
    "subprocess.Popen": "subprocess\nPopen",
    "builtins.eval": "builtins\neval", "builtins.exec": "builtins\nexec", "__builtin__.eval": "__builtin__\neval",
    "builtins.__import__": "builtins\n__import__", "builtins.getattr": "builtins\ngetattr",
    "builtins.open": "builtins\nopen",
    "importlib.import_module": "importlib\nimport_module", "operator.attrgetter": "operator\nattrgetter",
    "operator.methodcaller": "operator\nmethodcaller", "functools.partial": "functools\npartial",
    "pip.main": "pip\nmain",
    "pip._internal": "pip._internal.cli.main\nmain", "runpy.run_path": "runpy\nrun_path",
    "webbrowser.open": "webbrowser\nopen",
    "socket.create_connection": "socket\ncreate_connection", "ctypes.CDLL": "ctypes\nCDLL", "pty.spawn": "pty\nspawn",
    "timeit.timeit": "timeit\ntimeit", "bdb.Bdb.run": "bdb\nBdb",
    "code.InteractiveInterpreter": "code\nInteractiveInterpreter",
    "marshal.loads": "marshal\nloads", "types.FunctionType": "types\nFunctionType", "shutil.rmtree": "shutil\nrmtree",
    "pickle.loads": "pickle\nloads", "_pickle.loads": "_pickle\nloads", "asyncio": "asyncio\ncreate_subprocess_shell",
    "torch.load": "torch\nload", "torch.hub.load": "torch.hub\nload",
    "torch.storage._load_from_bytes": "torch.storage\n_load_from_bytes",
    "torch.jit.load": "torch.jit\nload", "torch.ops": "torch\nops",
    "torch.serialization.load": "torch.serialization\nload",
    "torch._utils._rebuild_tensor": "torch._utils\n_rebuild_tensor",
    "a dotted name": "torch._utils\n_rebuild_tensor_v2.__globals__",
    "numpy._reconstruct": "numpy.core.multiarray\n_reconstruct",
    "a class of gemma2tool": "gemma2tool.containers.torch_zip.pickle_index\ninterpret",
    "__main__": "__main__\nEvil", "a control character": "os\x1b[2J\nsystem", "not ASCII": "ös\nsystem",
    "collections.defaultdict": "collections\ndefaultdict", "argparse.Namespace": "argparse\nNamespace",
}  # fmt: skip


def _evil(name: str, id: str, code: bytes) -> Hostile:
    return Hostile(name, pickled(code), f"pickle.{id}")


def _laughs(depth: int) -> bytes:
    """A list of ten times a list of ten times ... ten times a list."""
    code = b"N"
    for _ in range(depth):
        code = b"](" + code + b"q\0" + b"h\0" * 9 + b"e"
    return code


_ORDERED = b"ccollections\nOrderedDict\n"
PICKLE_CASES = [
    *(_evil(f"calls {name}", "global", body(b"c" + target.encode() + b"\n(" + _text("true") + b"tR")) for name,
        target in _CALLS.items()),
    _evil("a name as value only", "global", body(b"cos\nsystem\n")),
    _evil("a call deep inside a dict", "global",
        body(b"}" + _text("w") + b"](cos\nsystem\n" + _text("true") + b"\x85Res")),
    _evil("OBJ", "opcode", body(b"(" + _ORDERED + b"o")),
    _evil("INST", "opcode", body(b"(" + _text("true") + b"ios\nsystem\n")),
    _evil("NEWOBJ", "opcode", body(_ORDERED + b")\x81")),
    _evil("NEWOBJ_EX", "opcode", body(_ORDERED + b")}\x92")),
    _evil("STACK_GLOBAL", "global", body(_text("os") + _text("system") + b"\x93")),
    _evil("EXT1", "opcode", body(b"\x82\1")),
    _evil("EXT4", "opcode", body(b"\x84\1\0\0\0")),
    _evil("PERSID", "opcode", body(b"P/etc/passwd\n")),
    _evil("STACK_GLOBAL of numbers", "global", body(b"K\1K\2\x93")),
    _evil("STACK_GLOBAL of nothing", "stack", body(b"\x93")),
    _evil("MEMOIZE of nothing", "stack", body(b"\x94")),
    _evil("a frame beyond the end", "truncated", body(b"\x95" + b"\xff" * 8)),
    _evil("a short text beyond the end", "truncated", body(b"\x8c\xff")),
    _evil("bytes beyond the end", "truncated", body(b"B\xff\xff\xff\xff")),
    _evil("a set", "opcode", pickle.dumps({"a": {1}}, 4)),
    _evil("protocol 6", "protocol", b"\x80\6}."),
    _evil("protocol 1", "protocol", pickle.dumps({"a": 1}, 1)),
    _evil("protocol 0", "protocol", b"cos\nsystem\n(S'true'\ntR."),
    _evil("a second PROTO", "opcode", body(b"\x80\x04}")),
    _evil("empty pickle", "protocol", b""),
    _evil("no stop", "truncated", body(b"}", stop=b"")),
    _evil("bytes after the stop", "stop", body(b"}") + b"cos\nsystem\n."),
    _evil("two objects left", "stop", body(b"}}")),
    _evil("nothing left", "stop", body(b"")),
    _evil("a mark left", "stack", body(b"(")),
    _evil("set items of nothing", "stack", body(b"}u")),
    _evil("a tuple of nothing", "stack", body(b"\x86")),
    _evil("a mark in a tuple", "stack", body(b"}(\x85")),
    _evil("a mark remembered", "stack", body(b"}(q\0")),
    _evil("an unknown memo", "memo", body(b"h\7")),
    _evil("an unknown long memo", "memo", body(b"j\xff\xff\xff\xff")),
    _evil("calls a dict", "reduce", body(b"})R")),
    _evil("calls with a list", "reduce", body(_ORDERED + b"]R")),
    _evil("calls a storage class", "reduce", body(b"ctorch\nFloatStorage\n)R")),
    _evil("calls a dtype", "reduce", body(b"ctorch\nbfloat16\n)R")),
    _evil("an OrderedDict of a tensor", "reduce", body(_ORDERED + b"K\1\x85R")),
    _evil("bytes in another encoding", "reduce", body(b"c_codecs\nencode\n" + _text("x") + _text("rot13") + b"\x86R")),
    _evil("a size of nothing", "reduce", body(b"ctorch\nSize\n)R")),
    _evil("a parameter of text", "tensor", body(b"ctorch._utils\n_rebuild_parameter\n" + _text("x") + b"\x88}\x87R")),
    _evil("a tensor of nothing", "tensor", body(b"ctorch._utils\n_rebuild_tensor_v2\n)R")),
    _evil("attributes of a list", "type", body(b"]}b")),
    _evil("attributes that are a tuple", "type", body(_ORDERED + b")RN}\x86b")),
    _evil("appends to a dict", "type", body(b"}N" + b"a")),
    _evil("sets items of a list", "type", body(b"](" + _text("a") + b"Nu")),
    _evil("an item without a value", "type", body(b"}(" + _text("a") + b"u")),
    _evil("a key that is a list", "key", body(b"}]Ns")),
    _evil("a key that is None", "key", body(b"}NNs")),
    _evil("a key that is true", "key", body(b"}\x88Ns")),
    _evil("a key twice", "duplicate-key", body(b"}(" + _text("a") + b"N" + _text("a") + b"Nu")),
    _evil("a key as number and text", "duplicate-key", body(b"}(K\0N" + _text("0") + b"Nu")),
    _evil("a text longer than the pickle", "truncated", body(b"X\xff\xff\xff\xff")),
    _evil("a text that is not UTF-8", "utf8", body(b"X\2\0\0\0\xff\xfe")),
    _evil("an integer of 255 bytes", "too-large", body(b"\x8a\xff" + bytes(255))),
    _evil("a name that does not end", "global", body(b"c" + b"o" * 5000)),
    _evil("a million marks", "too-large", body(b"(" * 1_000_000)),
    _evil("two million steps", "too-large", body(b"}" + b"q\0" * 2_000_000)),
    Hostile("not a dict", pickled(body(b"]")), "torch.not-a-dict"),
    Hostile("a tensor alone", pickled(body(tensor())), "torch.not-a-dict"),
    Hostile("a dict inside itself", pickled(body(b"}q\0" + _text("a") + b"h\0s")), "torch.too-large"),
    Hostile("a list inside itself", pickled(body(b"}" + _text("a") + b"]q\0h\0as")), "torch.too-large"),
    Hostile("a billion laughs", pickled(body(b"}" + _text("a") + _laughs(12) + b"s")), "torch.too-large"),
    Hostile("a million laughs", pickled(body(b"}" + _text("a") + _laughs(6) + b"s")), "torch.too-large"),
]  # fmt: skip

CASES = ZIP_CASES + TENSOR_CASES + PICKLE_CASES
