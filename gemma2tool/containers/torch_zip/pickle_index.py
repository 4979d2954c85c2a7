"""Reads the contents of a torch.save pickle without unpickling it.

A pickle is a program. This interpreter knows only the opcodes that torch.save emits for plain values and tensors
(protocol 2, and with ``pickle_protocol`` 3 to 5) and only the names in a short list. A name builds an inert record;
nothing is imported or called. The steps, the stack, the memo and the lengths of texts are limited.

Sources: CPython's pickletools.py, torch/serialization.py, and litgpt's ``incremental_save``, which numbers storages
with integers and wrote protocol 5 before 2025.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from gemma2tool.containers.torch_zip.tensor_refs import STORAGE_DTYPES, TORCH_DTYPES, StorageRef, TensorRef
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

T = TypeVar("T")
Arguments = tuple[Any, ...]

MAX_STEPS = 1_000_000  # 20,000 tensors take about 750,000
FREE_STEPS = 150_000  # for everything that is not a tensor
STEPS_PER_TENSOR = 60
MAX_STACK = 200_000
MAX_INT_BYTES = 16
PROTOCOLS = (b"\2", b"\3", b"\4", b"\5")


@dataclass(frozen=True, slots=True)
class _Global:
    """One of the known names."""

    name: str


class _Mark:
    """The mark on the stack."""


def interpret(data: bytes, where: str) -> Any:
    """Returns the object that ``data`` describes, made of dict, list, tuple, int, float, str, bool, None, bytes and
    TensorRef.

    ``where`` names the file in messages. Raises InputRefused (``pickle.*``) for any opcode, name or argument that
    torch.save does not write for these.
    """
    interpreter = _Interpreter(data, where)
    value = interpreter.run()
    if interpreter.at != len(data):
        raise interpreter.refusal("stop", "the pickle ends with objects or bytes left over")
    return value


def interpret_next(data: bytes, at: int, where: str) -> tuple[Any, dict[str, StorageRef], int]:
    """``interpret`` of the pickle that begins at byte ``at``, its storages by key, and the byte after it."""
    interpreter = _Interpreter(data, where, at)
    return interpreter.run(), interpreter.storages, interpreter.at


class _Interpreter:
    def __init__(self, data: bytes, where: str, at: int = 0) -> None:
        self.data = data
        self.where = where
        self.at = at
        self.storages: dict[str, StorageRef] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.max_steps = FREE_STEPS

    def refusal(self, kind: str, message: str) -> InputRefused:
        return InputRefused(f"pickle.{kind}", f"{self.where}: {message} (byte {self.at} of the pickle)")

    def run(self) -> Any:
        if self.data[self.at : self.at + 1] != b"\x80" or self.data[self.at + 1 : self.at + 2] not in PROTOCOLS:
            raise self.refusal("protocol", "is not a pickle of the protocols 2 to 5, as torch.save writes")
        self.at += 2
        actions, data, steps = _ACTIONS, self.data, 0
        while steps < self.max_steps:
            steps += 1
            if self.at >= len(data):
                raise self.refusal("truncated", "the pickle ends early")
            opcode = data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise self.refusal("stop", "the pickle ends with objects or bytes left over")
                return self.pop()
            action = actions.get(opcode)
            if action is None:
                raise self.refusal(
                    "opcode", f"torch.save does not write the opcode {quoted(bytes([opcode]))} for tensors"
                )
            action(self)
            if len(self.stack) > MAX_STACK:
                raise self.refusal("too-large", f"the pickle has more than {MAX_STACK} objects on its stack")
        raise self.refusal("too-large", f"the pickle takes more than {self.max_steps} steps, too many for its tensors")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise self.refusal("truncated", "the pickle ends early")
        begin, self.at = self.at, end
        return self.data[begin:end]

    def number(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise self.refusal("global", "a global name is too long or not terminated")
        raw = self.take(end + 1 - self.at)[:-1]
        return raw.decode("ascii", "backslashreplace")

    def pop(self) -> Any:
        if not self.stack:
            raise self.refusal("stack", "the pickle pops from an empty stack")
        value = self.stack.pop()
        if value is _Mark:
            raise self.refusal("stack", "the pickle uses a mark as a value")
        return value

    def top(self, kind: type[T], action: str) -> T:
        """The object on top of the stack, which must be of this type. ``action`` says what the pickle does with it."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self.refusal("type", f"the pickle {action} an object that is not a {kind.__name__}")
        value: T = self.stack[-1]
        return value

    def pop_to_mark(self) -> list[Any]:
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth] is _Mark:
                values = self.stack[depth + 1 :]
                del self.stack[depth:]
                return values
        raise self.refusal("stack", "the pickle uses a mark that is not on the stack")

    def remember(self, index: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.refusal("memo", f"the pickle reads memo entry {index}, which it has not written")
        self.stack.append(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, "sets items in")
        if len(items) % 2:
            raise self.refusal("type", "the pickle sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is int:
                key = str(key)  # optimizer states number their parameters
            if type(key) is not str:
                raise self.refusal("key", f"the key {quoted(key)} is not a string")
            if key in target:
                raise self.refusal("duplicate-key", f"the key {quoted(key)} appears twice")
            target[key] = value

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise self.refusal("reduce", "the pickle calls an object that is not a known name")
        self.stack.append(_BUILDERS[function.name](self, arguments))

    def global_(self) -> None:
        self.push_global(f"{self.line()}.{self.line()}")

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise self.refusal("global", "a global name is not text")
        self.push_global(f"{module}.{name}")

    def push_global(self, name: str) -> None:
        if name.startswith(SHARDED):
            raise self.refusal("sharded", f"holds one rank's part of a sharded tensor ({quoted(name)})")
        if name not in KNOWN_NAMES:
            raise self.refusal("global", f"names {quoted(name)}, which is not needed to store tensors")
        self.stack.append(_Global(name))

    def persistent(self) -> None:
        """('storage', storage class, key, device, number of elements), and None in files without an archive"""
        match self.pop():
            case ("storage", _Global(name), str(key) | int(key), str(_), int(count), *rest) if (
                name in _STORAGES and count >= 0 and rest in ([], [None])
            ):
                self.stack.append(StorageRef(_STORAGES[name], str(key), count))
                self.storages[str(key)] = self.stack[-1]
            case _:
                raise self.refusal("storage", "the pickle has a persistent id that is not a storage")

    def build(self) -> None:
        """Ignores attributes of an OrderedDict: a state dict has its modules' versions in ``_metadata``."""
        state = self.pop()
        self.top(dict, "sets attributes of")
        if type(state) is not dict:
            raise self.refusal("type", "the pickle sets attributes that are not a dict")

    def long(self) -> None:
        length = self.take(1)[0]
        if length > MAX_INT_BYTES:
            raise self.refusal(
                "too-large", f"the pickle has an integer of {length} bytes; at most {MAX_INT_BYTES} are accepted"
            )
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def frame(self) -> None:
        """Frames only tell a reader of streams how much to buffer."""
        if self.number(_U64) > len(self.data) - self.at:
            raise self.refusal("truncated", "the pickle ends early")

    def text(self, length: struct.Struct) -> None:
        raw = self.take(int(self.number(length)))
        try:
            self.stack.append(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise self.refusal("utf8", "a string in the pickle is not UTF-8") from error

    def append(self, values: list[Any]) -> None:
        self.top(list, "appends to").extend(values)

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))


def _rebuild_tensor(interpreter: _Interpreter, arguments: Arguments) -> TensorRef:
    """_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=None)"""
    match arguments:
        case (
            StorageRef(dtype=str(dtype)) as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            bool(),
            dict(hooks),
            *rest,
        ):
            return _tensor(interpreter, TensorRef(storage, dtype, offset, shape, stride), hooks, rest)
    raise interpreter.refusal("tensor", "a tensor is described in an unknown way")


def _rebuild_tensor_v3(interpreter: _Interpreter, arguments: Arguments) -> TensorRef:
    """_rebuild_tensor_v3(storage, storage_offset, size, stride, requires_grad, backward_hooks, dtype, metadata=None)"""
    match arguments:
        case (
            StorageRef(dtype=None) as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            bool(),
            dict(hooks),
            _Global(name),
            *rest,
        ) if name.removeprefix("torch.") in TORCH_DTYPES:
            dtype = TORCH_DTYPES[name.removeprefix("torch.")]
            return _tensor(interpreter, TensorRef(storage, dtype, offset, shape, stride), hooks, rest)
    raise interpreter.refusal("tensor", "a tensor is described in an unknown way")


def _tensor(interpreter: _Interpreter, tensor: TensorRef, hooks: dict[Any, Any], rest: list[Any]) -> TensorRef:
    """Checks the types of what a rebuild function was given and allows the steps that a tensor takes."""
    shape, stride = tensor.shape, tensor.stride
    sizes = (tensor.storage_offset, *shape, *stride)
    are_sizes = all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)
    if not are_sizes or len(shape) != len(stride) or len(shape) > 8:
        raise interpreter.refusal(
            "tensor",
            f"a tensor has shape {quoted(shape)}, stride {quoted(stride)} and offset {quoted(tensor.storage_offset)}",
        )
    if hooks or any(rest):
        raise interpreter.refusal("tensor", "a tensor has hooks or flags (conjugate, negative)")
    interpreter.max_steps = min(interpreter.max_steps + STEPS_PER_TENSOR, MAX_STEPS)
    return tensor


def _parameter(interpreter: _Interpreter, arguments: Arguments) -> TensorRef:
    """_rebuild_parameter(data, requires_grad, backward_hooks) and _rebuild_parameter_with_state(..., state)"""
    match arguments:
        case (TensorRef() as tensor, _, _) | (TensorRef() as tensor, _, _, _):
            return tensor
    raise interpreter.refusal("tensor", "a parameter is described in an unknown way")


def _from_type(interpreter: _Interpreter, arguments: Arguments) -> Any:
    """_rebuild_from_type_v2(function, type, arguments, state): a tensor with attributes of its own, as FSDP leaves
    them; the attributes are ignored.
    """
    match arguments:
        case (_Global(name), _Global(kind), tuple(inner), _) if kind in _TENSOR_TYPES and name in _REBUILDERS:
            return _BUILDERS[name](interpreter, inner)
    raise interpreter.refusal("tensor", "a tensor is described in an unknown way")


def _ordered_dict(interpreter: _Interpreter, arguments: Arguments) -> dict[str, Any]:
    if arguments:
        raise interpreter.refusal("reduce", "an OrderedDict is described in an unknown way")
    return {}


def _size(interpreter: _Interpreter, arguments: Arguments) -> tuple[Any, ...]:
    match arguments:
        case (tuple(size),):
            return size
    raise interpreter.refusal("reduce", "a torch.Size is described in an unknown way")


def _device(interpreter: _Interpreter, arguments: Arguments) -> str:
    if not 1 <= len(arguments) <= 2 or type(arguments[0]) is not str:
        raise interpreter.refusal("reduce", "a torch.device is described in an unknown way")
    return ":".join(str(part) for part in arguments)


def _encoded(interpreter: _Interpreter, arguments: Arguments) -> bytes:
    """_codecs.encode(text, 'latin1'): how protocol 2 writes bytes."""
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1", "replace")
    raise interpreter.refusal("reduce", "bytes are described in an unknown way")


def _no_call(interpreter: _Interpreter, arguments: Arguments) -> NoReturn:
    raise interpreter.refusal("reduce", "the pickle calls a dtype, or the class of a storage or tensor")


_STORAGES: dict[str, str | None] = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPES.items()}
_STORAGES["torch.storage.UntypedStorage"] = None
_REBUILDERS = frozenset(
    f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
)
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
SHARDED = ("torch.distributed.tensor.", "torch.distributed._tensor.", "torch.distributed._shard.")
_BUILDERS: dict[str, Callable[[_Interpreter, Arguments], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encoded,
}
_BUILDERS |= dict.fromkeys([*_STORAGES, *_TENSOR_TYPES, *(f"torch.{name}" for name in TORCH_DTYPES)], _no_call)
KNOWN_NAMES = frozenset(_BUILDERS)

_U8, _U16, _U32, _U64, _I32, _F64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q", "<i", ">d"))


def _pushes(value: Callable[[_Interpreter], Any]) -> Callable[[_Interpreter], None]:
    return lambda self: self.stack.append(value(self))


_ACTIONS: dict[int, Callable[[_Interpreter], None]] = {
    ord("N"): _pushes(lambda self: None),
    0x88: _pushes(lambda self: True),
    0x89: _pushes(lambda self: False),
    ord("K"): _pushes(lambda self: self.number(_U8)),
    ord("M"): _pushes(lambda self: self.number(_U16)),
    ord("J"): _pushes(lambda self: self.number(_I32)),
    0x8A: _Interpreter.long,
    ord("G"): _pushes(lambda self: self.number(_F64)),
    ord("X"): lambda self: self.text(_U32),
    0x8C: lambda self: self.text(_U8),
    ord("C"): _pushes(lambda self: self.take(self.number(_U8))),
    ord("B"): _pushes(lambda self: self.take(self.number(_U32))),
    ord("("): _pushes(lambda self: _Mark),
    ord("}"): _pushes(lambda self: {}),
    ord("]"): _pushes(lambda self: []),
    ord(")"): _pushes(lambda self: ()),
    0x85: lambda self: self.tuple_of(1),
    0x86: lambda self: self.tuple_of(2),
    0x87: lambda self: self.tuple_of(3),
    ord("t"): lambda self: self.stack.append(tuple(self.pop_to_mark())),
    ord("a"): lambda self: self.append([self.pop()]),
    ord("e"): lambda self: self.append(self.pop_to_mark()),
    ord("s"): lambda self: self.set_items([self.pop(), self.pop()][::-1]),
    ord("u"): lambda self: self.set_items(self.pop_to_mark()),
    ord("q"): lambda self: self.remember(self.number(_U8)),
    ord("r"): lambda self: self.remember(self.number(_U32)),
    ord("h"): lambda self: self.recall(self.number(_U8)),
    ord("j"): lambda self: self.recall(self.number(_U32)),
    0x94: lambda self: self.remember(len(self.memo)),
    0x95: _Interpreter.frame,
    ord("c"): _Interpreter.global_,
    0x93: _Interpreter.stack_global,
    ord("R"): _Interpreter.reduce,
    ord("b"): _Interpreter.build,
    ord("Q"): _Interpreter.persistent,
}
