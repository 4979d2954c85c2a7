"""What this machine has for gemma2tool: versions, kernels, processors, memory, disk, extras, a GPU."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma2tool.errors.extras import install_command
from gemma2tool.pipeline.calibration.cost import available_memory
from gemma2tool.pipeline.requests import default_threads
from gemma2tool.storage.units import human_bytes
from gemma2tool.version import __version__

Status = Literal["ok", "warning", "error"]

_KNOWN_FAULTS = {
    "keras-hub": (r"0\.17\..*", "from_preset(dtype=...) fails on presets that have a task.json"),
    "transformers": (r"5\.23\..*", "loads w4a16-asym folders with dequantize=True only"),
}
"""Distribution -> versions (a pattern) that were seen to fail on right files, and how. They are the consumers', and do
not affect what gemma2tool writes."""

_FOR_DEVELOPERS = ("test", "dev", "all")
"""Extras that users do not need one by one."""


@dataclass(frozen=True)
class Fact:
    """One fact about the machine. ``remedy``: what to do about a warning or an error."""

    name: str
    value: str
    status: Status = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found."""

    facts: tuple[Fact, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that all commands need is present."""
        return all(fact.status != "error" for fact in self.facts)

    def to_json(self) -> dict[str, object]:
        """Return the diagnosis as ``--json`` prints it."""
        return {"ok": self.ok, "facts": [vars(fact) for fact in self.facts]}


def doctor(path: str | Path = ".") -> Diagnosis:
    """Describe the machine, as bug reports need it. ``path``: a path on the file system whose free space to report."""
    return Diagnosis((*_versions(), *_required(), *_consumers(), *_machine(Path(path)), *_extras(), _gpu()))


def _versions() -> Iterator[Fact]:
    yield Fact("gemma2tool", f"{__version__} in {Path(__file__).parents[1]}")
    yield Fact("Python", f"{platform.python_version()} ({sys.executable})")
    yield Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}")


def _required() -> Iterator[Fact]:
    """The distributions that the package declares, with their versions."""
    if not _declared():
        yield Fact("installation", "not installed as a package", "warning", "pip install .")
    for line in _declared():
        if ";" in line:  # of an extra
            continue
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?", line)
        if match is None:
            continue
        name, minimum = match[1], match[2] or ""
        version = _installed(name)
        if version is None:
            yield Fact(name, "missing", "error", f"pip install '{line}'")
        elif _numbers(version) < _numbers(minimum):
            yield Fact(name, f"{version}, older than {minimum}", "error", f"pip install '{line}'")
        else:
            yield Fact(name, version)


def _consumers() -> Iterator[Fact]:
    for name, (pattern, fault) in _KNOWN_FAULTS.items():
        version = _installed(name)
        if version is not None and re.fullmatch(pattern, version):
            yield Fact(name, f"{version}: {fault}", "warning", "use a different version for such files")


def _machine(path: Path) -> Iterator[Fact]:
    try:
        from gemma2tool.quantizers import kernels

        sets = kernels.available_instruction_sets()
        yield Fact("kernels", f"{kernels.current_instruction_set()} (of {', '.join(sets)})")
    except ImportError as error:
        yield Fact("kernels", str(error), "error", "install the package with a C++17 compiler: pip install .")
    yield Fact("threads", str(default_threads()))
    memory = available_memory()
    yield Fact("free memory", "unknown" if memory is None else human_bytes(memory))
    try:
        yield Fact("free disk", f"{human_bytes(shutil.disk_usage(path).free)} at {path.resolve()}")
    except OSError as error:
        yield Fact("free disk", f"{path}: {error.strerror}", "warning", "name an existing folder")


def _extras() -> Iterator[Fact]:
    """Which of the package's extras are installed."""
    needed: dict[str, list[str]] = {}
    for line in _declared():
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if extra is not None and extra[1] not in _FOR_DEVELOPERS:
            needed.setdefault(extra[1], []).append(re.split(r"[^\w.-]", line, maxsplit=1)[0])
    for name, distributions in needed.items():
        missing = [distribution for distribution in distributions if _installed(distribution) is None]
        yield Fact(f"extra {name}", f"not installed: {install_command(name)}" if missing else "installed")


def _gpu() -> Fact:
    try:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError, AssertionError) as error:
        return Fact("GPU", f"unknown: {str(error).splitlines()[0]}", "warning", "reinstall torch")
    return Fact("GPU", ", ".join(names) or "none that torch can use; everything runs on the CPU")


def _declared() -> list[str]:
    """The requirements that the installed package declares."""
    try:
        return importlib.metadata.requires("gemma2tool") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing."""
    return tuple(int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part)  # type: ignore[index]
