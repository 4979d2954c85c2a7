"""Renders a chat template, which is a program that comes with the checkpoint.

jinja2's sandbox denies it access to the machine, but does not prevent endless loops, unlimited memory or Python's own
exceptions. Here it is compiled and run in a fork with limits, and any exception becomes a refusal. On systems without
fork, only the time between two lines of Python is limited.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from gemma2tool.errors import InputRefused
from gemma2tool.storage import limited_process
from gemma2tool.storage.quoting import quoted

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

MAX_TEMPLATE_CHARS = 1 << 18
MAX_TEXT_CHARS = 1 << 20
SECONDS = 2
"""Of processor time; Gemma's templates take a few milliseconds."""
MEMORY = 256 << 20
_ROOM = 1 << 10
PYTHON_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a template can raise besides jinja's own errors."""


class _TooLong(Exception):
    """The time limit was reached."""


def render(template: str, values: Mapping[str, Any], where: str) -> str:
    """The text of ``template`` for ``values``. Raises InputRefused (``template.*``), naming ``where``, if it cannot be
    rendered.
    """
    import jinja2.sandbox  # noqa: F401 - before the fork, so that it is loaded once

    def refused(kind: str, what: str) -> InputRefused:
        return InputRefused(
            f"template.{kind}", f"{where}: the chat template {what}", hint="use --raw to pass the prompt unchanged"
        )

    if len(template) > MAX_TEMPLATE_CHARS:
        raise refused("too-large", f"has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are accepted")
    try:
        if limited_process.is_available():
            answer = limited_process.call(
                lambda: _outcome(template, values),
                cpu_seconds=SECONDS,
                memory_bytes=MEMORY,
                answer_bytes=4 * MAX_TEXT_CHARS + _ROOM,
            )
        else:
            with _Deadline(SECONDS):
                answer = _outcome(template, values)
    except (limited_process.LimitExceeded, _TooLong):
        limits = f"{SECONDS} seconds, {MEMORY >> 20} MiB of memory and {MAX_TEXT_CHARS} characters"
        raise refused("limits", f"does not finish within {limits}") from None
    problem, _, text = answer.partition("\n")
    if problem:
        raise refused("broken", f"cannot be rendered ({problem})")
    return text


def _outcome(template: str, values: Mapping[str, Any]) -> str:
    """An empty line and the text, or a line that says what is wrong. Raises MemoryError and ``LimitExceeded`` beyond
    the limits.
    """
    from jinja2.exceptions import TemplateError

    pieces, size = ["\n"], 0
    try:
        for piece in environment().from_string(template).generate(**values):
            size += len(piece)
            if size > MAX_TEXT_CHARS:
                raise limited_process.LimitExceeded
            pieces.append(piece)
    except MemoryError:
        raise limited_process.LimitExceeded from None
    except (TemplateError, *PYTHON_ERRORS) as error:
        return f"{type(error).__name__}: {quoted(str(error))}\n"
    return "".join(pieces)


def environment(watch: Callable[[str], None] | None = None) -> SandboxedEnvironment:
    """The sandbox, with what transformers offers beyond jinja. ``watch`` is called with every attribute that leads to
    Python's internals and that a template asks for; the sandbox denies it.
    """
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``generation`` marks what the assistant said, for training; the text is that of its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 reads a plain set

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"**"})  # a single step of these can take forever

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
            raise TemplateError(f"{operator} is not calculated")

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if watch is not None and attr.startswith("__"):
                watch(attr)
            return super().is_safe_attribute(obj, attr, value)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    # As transformers renders templates: with these extensions, globals and this filter.
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    made.filters["tojson"] = _to_json
    return made


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Deadline:
    """Raises in this thread, at the next line of Python, when so many seconds of processor time have passed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.thread_time() + seconds

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if time.thread_time() > self.end:
            raise _TooLong
        return self._trace

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.before)
