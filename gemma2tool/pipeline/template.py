"""A chat template rendered: it is a program, and comes with the checkpoint.

jinja2's sandbox keeps it from the machine, but lets it loop for ever, and Python's own errors out. Here it has a few seconds, and
whatever it raises is a refusal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import quoted

MAX_TEMPLATE_CHARS = 1 << 18
SECONDS = 5.0


class _TooLong(Exception):
    """The time is over."""


def render(template: str, values: Mapping[str, Any], where: str) -> str:
    """The text of ``template`` for ``values``. Raises InputRefused (``template.*``), naming ``where``, if it cannot be had."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"**"})  # one step of which can take for ever

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> NoReturn:
            raise TemplateError(f"{operator} is not calculated")

    def refused(kind: str, what: str) -> InputRefused:
        return InputRefused(f"template.{kind}", f"{where}: the chat template {what}", hint="use --raw to give the prompt as it is")

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    if len(template) > MAX_TEMPLATE_CHARS:
        raise refused("too-large", f"has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are accepted")
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        compiled = environment.from_string(template)
        with _Deadline(SECONDS):
            return compiled.render(**values)
    except _TooLong:
        raise refused("limits", f"is not done after {SECONDS:g} seconds") from None
    except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise refused("broken", f"cannot be rendered ({type(error).__name__}: {quoted(str(error))})") from None


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
