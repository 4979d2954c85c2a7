"""Runs command lines of gemma2tool, each in a fork of one warm process, under an audit hook.

Writes what they did to a JSON file.

    python hostile_runner.py PLAN RESULTS

PLAN is a list of {"argv": [...], "folder": ..., "may_write": [...]}. A forked child does not pay for importing the
tool, and contains nothing of a test runner.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
from pathlib import Path

HEAVY = (
    "torch",
    "bitsandbytes",
    "transformers",
    "gguf",
    "safetensors",
    "sentencepiece",
    "h5py",
    "tensorstore",
    "pickle",
)
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.kill",
    "subprocess.",
    "socket.",
    "pickle.",
    "ctypes.dlopen",
    "marshal.loads",
)
_PATHS = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "shutil.rmtree": 1,
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_events: list[str] | None = None
_folder = ""
_may_write: tuple[str, ...] = ()


def _hook(event: str, arguments: tuple) -> None:
    if _events is None:
        return
    if event.startswith(_FORBIDDEN) and not _is_own(event):
        _events.append(event)
    elif event in ("exec", "compile"):
        source = getattr(arguments[0], "co_filename", "") if event == "exec" else str(arguments[1])
        if _folder in source:
            _events.append(f"{event} of {source}")
    elif event == "open":
        path, mode, flags = arguments
        if isinstance(path, (str, bytes)) and ((mode and set(mode) & set("wax+")) or flags & _WRITING):
            _check(event, path)
    elif event in _PATHS:
        for path in arguments[: _PATHS[event]]:
            _check(event, path)


def _is_own(event: str) -> bool:
    """Python itself reads compiled modules with marshal."""
    frame = sys._getframe(2)
    return event.startswith("marshal") and "importlib" in frame.f_code.co_filename


def _check(event: str, path: object) -> None:
    text = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes)) else str(path)
    if text != os.devnull and not text.startswith(_may_write):
        _events.append(f"{event}: {text}")


def _run(case: dict) -> dict:
    global _events, _folder, _may_write
    from gemma2tool.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    before = set(sys.modules)
    _folder, _may_write = case["folder"], tuple(case["may_write"])
    os.chdir(case["folder"])
    sys.argv = ["gemma2tool", *case["argv"]]
    _events = seen = []
    code: object = "returned"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    _events = None
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "code": code, "out": out.getvalue(), "err": err.getvalue(), "events": seen,
        "seconds": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss << 10, "heavy": [name for name in HEAVY if name in sys.modules and name not in before],
    }  # fmt: skip


def _forked(case: dict, scratch: Path) -> dict:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            scratch.write_text(json.dumps(_run(case)))
            status = 0
        finally:
            os._exit(status)
    _, status, _ = os.wait4(pid, 0)
    if status:
        return {"code": f"wait status {status}"}
    return json.loads(scratch.read_text())


def _warm() -> None:
    """Imports everything that a command imports before it looks at its input, and every format."""
    import gemma2tool.cli.main
    import gemma2tool.cli.terminal
    from gemma2tool.formats import registry

    for name in registry.NAMES:
        registry.by_name(name)
    with contextlib.suppress(ImportError):
        import zstandard  # noqa: F401
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        sys.argv = ["gemma2tool", "inspect", "/nowhere", "--json"]
        gemma2tool.cli.main.main()


def _main() -> None:
    sys.dont_write_bytecode = True
    plan = json.loads(Path(sys.argv[1]).read_text())
    results = Path(sys.argv[2])
    _warm()
    sys.addaudithook(_hook)
    results.write_text(json.dumps([_forked(case, results.with_suffix(".one")) for case in plan]))


if __name__ == "__main__":
    _main()
