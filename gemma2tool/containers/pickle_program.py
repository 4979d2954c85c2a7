"""What a pickle would do if it were loaded, without loading it.

A pickle is a program of a stack machine. This module follows its stack and its memo as far as names, texts and tuples
go, and lists every name that it imports, whether it calls it and with what. Nothing is imported or called. It reads
any protocol and any opcode, and what precedes a damaged place counts: a pickle is executed up to there. Whoever wants
the tensors uses ``torch_zip.pickle_index``, which refuses everything else.

Source: CPython's pickletools.py and pickle.py.
"""

from __future__ import annotations

import base64
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from gemma2tool.storage.quoting import quoted

MAX_OPCODES = 1_000_000
MAX_STACK = 200_000
MAX_USES = 1_000
MAX_DEPTH = 4
"""Of pickles inside of each other."""
MAGIC = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
"""The first bytes of the protocols 2 to 5; 0 and 1 have none."""
COMPUTED = "?"
"""Part of a name that the pickle computes instead of stating it."""

_MAX_SHOWN = 120
_NAMES = re.compile(rb"[ci][\w.]+\n[\w.]+\n|\x93")
"""What a pickle without a first opcode of its own has if it names anything: GLOBAL, INST or STACK_GLOBAL."""
_BASE64, _HEX = re.compile(rb"gA[I-X][A-Za-z0-9+/_-]*=?=?"), re.compile(rb"800[2-5][0-9A-Fa-f]*")
"""A pickle of the protocols 2 to 5 in either, from its first bytes on."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_VALUES = ("STRING", "UNICODE", "UNICODE8", "BYTES", "BYTES8", "BYTEARRAY8")
"""Ends of the names of opcodes whose argument is a text or bytes."""


@dataclass(frozen=True)
class PickleUse:
    """A name that a pickle imports: "os.system". ``arguments``: what it is called with, shortened; None where it is
    not called. ``offset``: of the opcode that names it.
    """

    name: str
    offset: int
    arguments: str | None = None


@dataclass(frozen=True)
class PickleProgram:
    """The names that a pickle uses, each once. ``end``: the byte after its last opcode. ``complete``: it ends as a
    pickle does. ``too_long``: it has more opcodes than were followed.
    ``nested``: the names that pickles use which it holds as bytes or, as the protocols 0 to 2 store bytes, as texts; as
    they are, in base64 or in hexadecimal digits.
    """

    uses: tuple[PickleUse, ...]
    end: int
    complete: bool
    too_long: bool = False
    nested: tuple[PickleUse, ...] = ()


class _Mark:
    """The mark on the stack."""


class _Unknown:
    """An object that is not followed."""


@dataclass(frozen=True)
class _Name:
    name: str
    offset: int


def read_programs(data: bytes, *, most: int = 16) -> Iterator[PickleProgram]:
    """The pickles that follow each other from the first byte, as torch's old files have them. The first is yielded in
    any case.
    """
    at = 0
    for _ in range(most):
        program = read_program(data, at)
        yield program
        at = program.end
        if not program.complete or data[at : at + 1] != b"\x80":
            return


def read_program(data: bytes, start: int = 0, *, depth: int = 0) -> PickleProgram:
    """The pickle that begins at byte ``start``. ``depth``: in how many other pickles it is."""
    machine, count, end, complete = _Machine(depth), 0, start, False
    stream = BytesIO(data)
    stream.seek(start)
    try:
        for opcode, argument, position in pickletools.genops(stream):
            count += 1
            if count > MAX_OPCODES or len(machine.stack) > MAX_STACK or len(machine.uses) > MAX_USES:
                return machine.program(end, complete=False, too_long=True)
            machine.step(opcode, argument, position or 0)
            end = stream.tell()
        complete = True
    except (ValueError, IndexError, OverflowError, AttributeError, TypeError):
        pass  # the program ends here: an unknown opcode, a bad argument, no more bytes
    return machine.program(end, complete=complete)


def _nested_uses(value: str | bytes | bytearray, depth: int) -> Iterator[PickleUse]:
    """The names that a value uses if it is a pickle itself, and those of the pickles in it."""
    try:
        data = value.encode("latin-1") if isinstance(value, str) else bytes(value)
    except UnicodeEncodeError:
        return
    data = _decoded(data)
    starts_as_pickle = data[:2] in MAGIC
    if depth > MAX_DEPTH or not (starts_as_pickle or _NAMES.search(data)):
        return
    program = read_program(data, depth=depth)
    if starts_as_pickle or program.complete:
        yield from (use for use in (*program.uses, *program.nested) if use.name != f"{COMPUTED}.{COMPUTED}")


def _decoded(data: bytes) -> bytes:
    """The pickle that a text in base64 or hexadecimal digits stands for; any other data as it is."""
    text = b"".join(data.split()) if data.startswith((b"gA", b"80")) else b""
    try:
        if _BASE64.fullmatch(text):
            return base64.b64decode(text.translate(_URL_SAFE) + b"=" * (-len(text) % 4))
        if _HEX.fullmatch(text):
            return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        pass
    return data


class _Machine:
    """The stack and memo of the pickle machine; values that are not names, texts or tuples are ``_Unknown``."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.uses: dict[str, PickleUse] = {}
        self.nested: dict[str, PickleUse] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, offset: int) -> None:
        if isinstance(argument, (str, bytes, bytearray)) and opcode.name.endswith(_VALUES):
            for use in _nested_uses(argument, self.depth + 1):
                if len(self.nested) < MAX_USES:
                    self.nested.setdefault(use.name, use)
        action = getattr(self, f"op_{opcode.name.lower()}", None)
        if action is not None:
            action(argument, offset)
        elif opcode.name.endswith(("PUT", "MEMOIZE")):
            self.memo[len(self.memo) if argument is None else int(argument)] = self.peek()
        elif opcode.name.endswith("GET"):
            self.stack.append(self.memo.get(int(argument), _Unknown))
        elif isinstance(argument, str) and opcode.name.endswith(("STRING", "UNICODE", "UNICODE8")):
            self.stack.append(argument)
        else:
            self._other(opcode)

    def program(self, end: int, *, complete: bool, too_long: bool = False) -> PickleProgram:
        """What was followed so far."""
        return PickleProgram(tuple(self.uses.values()), end, complete, too_long, tuple(self.nested.values()))

    def _other(self, opcode: pickletools.OpcodeInfo) -> None:
        """By the table of pickletools: what is popped, and how many objects are pushed."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            self.pop_to_mark()
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self.pop()
        self.stack += [_Unknown] * len(opcode.stack_after)

    def peek(self) -> Any:
        return self.stack[-1] if self.stack else _Unknown

    def pop(self) -> Any:
        return self.stack.pop() if self.stack else _Unknown

    def pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack and (value := self.stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def name(self, module: Any, attribute: Any, offset: int) -> _Name:
        parts = [part if isinstance(part, str) else COMPUTED for part in (module, attribute)]
        name = _Name(".".join(parts), offset)
        self.uses.setdefault(name.name, PickleUse(name.name, offset))
        return name

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, _Name):
            use = self.uses[function.name]
            if use.arguments is None:
                self.uses[function.name] = replace(use, arguments=_shown(arguments))
        self.stack.append(_Unknown)

    def op_mark(self, argument: Any, offset: int) -> None:
        self.stack.append(_Mark)

    def op_pop(self, argument: Any, offset: int) -> None:
        self.pop()

    def op_pop_mark(self, argument: Any, offset: int) -> None:
        self.pop_to_mark()

    def op_dup(self, argument: Any, offset: int) -> None:
        self.stack.append(self.peek())

    def op_global(self, argument: str, offset: int) -> None:
        module, _, attribute = argument.partition(" ")
        self.stack.append(self.name(module, attribute, offset))

    def op_stack_global(self, argument: Any, offset: int) -> None:
        attribute, module = self.pop(), self.pop()
        self.stack.append(self.name(module, attribute, offset))

    def op_ext1(self, argument: Any, offset: int) -> None:
        """A number of copyreg's registry, whose name the loading program knows."""
        self.stack.append(self.name("copyreg.extension", str(argument), offset))

    op_ext2 = op_ext4 = op_ext1

    def op_inst(self, argument: str, offset: int) -> None:
        arguments = tuple(self.pop_to_mark())
        module, _, attribute = argument.partition(" ")
        self.call(self.name(module, attribute, offset), arguments)

    def op_obj(self, argument: Any, offset: int) -> None:
        values = self.pop_to_mark()
        self.call(values[0] if values else _Unknown, tuple(values[1:]))

    def op_reduce(self, argument: Any, offset: int) -> None:
        arguments, function = self.pop(), self.pop()
        self.call(function, arguments)

    op_newobj = op_reduce

    def op_newobj_ex(self, argument: Any, offset: int) -> None:
        self.pop()
        self.op_reduce(argument, offset)

    def op_tuple(self, argument: Any, offset: int) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def op_empty_tuple(self, argument: Any, offset: int) -> None:
        self.stack.append(())

    def op_tuple1(self, argument: Any, offset: int) -> None:
        self.stack.append((self.pop(),))

    def op_tuple2(self, argument: Any, offset: int) -> None:
        second, first = self.pop(), self.pop()
        self.stack.append((first, second))

    def op_tuple3(self, argument: Any, offset: int) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.stack.append((first, second, third))


def _shown(arguments: Any) -> str:
    """Arguments as they would be written in Python, shortened."""
    values = arguments if isinstance(arguments, tuple) else (_Unknown,)
    texts = [
        quoted(value) if isinstance(value, str) else value.name if isinstance(value, _Name) else "..."
        for value in values[:4]
    ]
    text = ", ".join([*texts, *(["..."] if len(values) > 4 else [])])
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
