"""Pickles that do anything but tensors.

By what a checkpoint needs, not by a list of what is bad: whatever is not known to be harmless is reported. Lists of bad
names were passed by again and again (CVE-2025-1716, CVE-2025-10155 to 10157).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma2tool.containers.pickle_program import COMPUTED, MAGIC, PickleProgram, PickleUse, read_programs
from gemma2tool.containers.torch_zip.pickle_index import KNOWN_NAMES, SHARDED
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

_MAX_SHOWN = 5

_MORE_TENSORS = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in (
        "tensor",
        "qtensor",
        "sparse_tensor",
        "sparse_csr_tensor",
        "meta_tensor_no_storage",
        "device_tensor_from_numpy",
        "wrapper_subclass",
    )
)
_BUILTINS = frozenset(
    {
        *("set", "frozenset", "dict", "list", "tuple", "int", "float", "bool", "str", "bytes", "bytearray"),
        *("complex", "slice", "range", "object"),
    }
)
_PLAIN = frozenset(
    {
        *(f"collections.{name}" for name in ("OrderedDict", "defaultdict", "Counter", "deque")),
        *(
            f"{module}.{name}"
            for module in ("builtins", "__builtin__")
            for name in _BUILTINS
        ),
        *(f"{module}._reconstructor" for module in ("copyreg", "copy_reg")),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        "numpy.ndarray",
        "numpy.dtype",
        "argparse.Namespace",
        "datetime.datetime",
        "datetime.timedelta",
        "pathlib.PosixPath",
        "pathlib.Path",
        "pathlib._local.PosixPath",
        "uuid.UUID",
        "types.SimpleNamespace",
    }
)  # fmt: skip
"""Values that are no code: containers, numbers, arrays."""

_NUMPY_TYPE = re.compile(r"numpy\.(?:dtypes\.\w+DType|u?int\d+|float\d+|complex\d+|bool_?|str_|bytes_)")
_LIBRARY_OBJECT = re.compile(
    r"(?:(?:transformers|trl|peft|accelerate|deepspeed|lightning|pytorch_lightning|omegaconf|torchtune)\.[\w.]+"
    r"|torch\.(?:nn\.modules|optim)\.\w+|torch\.distributed\.[\w.]+)\.[A-Z]\w*"
)
"""Classes whose objects trainers save: configs, schedulers, modules."""


def looks_like_pickle(data: bytes, name: str) -> bool:
    """Whether a file is a pickle: by its first bytes, or, for the protocols that have none, by its name."""
    if data[:2] in MAGIC:
        return True
    return name.lower().endswith((".pkl", ".pickle", ".p", ".joblib", ".dill", ".pt", ".pth", ".bin", ".ckpt", ".dat"))


def is_pickle(data: bytes) -> bool:
    """Whether data begins with a pickle of any protocol, even a damaged one if it says its protocol."""
    return data[:2] in MAGIC or next(read_programs(data)).complete


def scan_unmarked(data: bytes, place: Place) -> Iterator[ScanFinding]:
    """The findings of a file that only its content shows to be a pickle of protocol 0 or 1: one that calls something.
    torch.load and pickle.load do not ask for a name.
    """
    program = next(read_programs(data))
    if any(use.arguments is not None for use in program.uses):
        yield from _judged(program, place)


def scan_pickle(data: bytes, place: Place, *, whole: bool = True) -> Iterator[ScanFinding]:
    """The findings of the pickles at the beginning of ``data``. ``whole``: these are all bytes of the file."""
    starts_as_pickle = data[:2] in MAGIC
    for number, program in enumerate(read_programs(data)):
        if not starts_as_pickle and not program.uses and not program.complete:
            return  # another file of a name that pickles have too
        yield from _judged(program, place)
        if program.too_long:
            yield place.finding("pickle.too-long", "its opcodes were followed to the limit")
        elif not whole and not program.complete and (number == 0 or program.uses) and starts_as_pickle:
            yield place.finding("pickle.too-long", f"it was followed for {len(data):,} bytes")
        elif not program.complete and starts_as_pickle and (number == 0 or program.uses):
            yield place.finding("pickle.damaged", f"it cannot be read after byte {program.end}")


def is_harmless(name: str) -> bool:
    """Whether a name builds tensors, containers, numbers or arrays, and nothing else."""
    return name in KNOWN_NAMES or name in _MORE_TENSORS or name in _PLAIN or _NUMPY_TYPE.fullmatch(name) is not None


def _judged(program: PickleProgram, place: Place) -> Iterator[ScanFinding]:
    if inner := [use for use in program.nested if not is_harmless(use.name)]:
        yield place.finding("pickle.nested", f"a pickle inside it {_listed(inner)}")
    computed = [use for use in program.uses if COMPUTED in use.name.split(".")]
    other = [use for use in program.uses if use not in computed and not is_harmless(use.name)]
    objects = [use for use in other if _LIBRARY_OBJECT.fullmatch(use.name) or use.name.startswith(SHARDED)]
    code = [use for use in other if use not in objects]
    if code:
        yield place.finding("pickle.code", f"it {_listed(code)}, which no tensor needs")
    if computed:
        yield place.finding("pickle.computed", f"it imports names that it computes ({_listed(computed)})")
    if objects:
        yield place.finding("pickle.objects", f"it {_listed(objects)}")


def _listed(uses: list[PickleUse]) -> str:
    calls = [f"{use.name}({use.arguments})" for use in uses if use.arguments is not None]
    names = [use.name for use in uses if use.arguments is None]
    shown = [f"calls {quoted(call, 160)}" for call in calls[:_MAX_SHOWN]]
    shown += [f"names {quoted(name)}" for name in names[: _MAX_SHOWN - len(shown)]]
    more = len(uses) - len(shown)
    return " and ".join([*shown, *([f"{more} more"] if more else [])])
