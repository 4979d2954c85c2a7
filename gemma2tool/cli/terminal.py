"""The only module that prints. Results go to stdout; progress, notes, warnings and errors go to stderr.

Tensor names, paths, config values and error messages may come from files written by strangers. Every text is therefore
escaped here (``safe``), so that it cannot move the cursor, forge a line, hide text or be read as markup.
"""

from __future__ import annotations

import json as json_module
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from gemma2tool.errors import EXIT_BUG, ToolError
from gemma2tool.model.progress import ProgressBar
from gemma2tool.storage.quoting import inert, one_line
from gemma2tool.storage.units import human_bytes, human_seconds

if TYPE_CHECKING:
    import rich.console
    from rich.progress import Task
    from rich.text import Text

_PLAIN_WIDTH = 160
"""Width of tables, in characters, where the output is not a terminal."""
_NARROW = 80
"""Columns of a terminal below which a bar shows neither rate nor name, so that its numbers stay whole."""
_LABEL_WIDTH = 13
"""Width of the labels of items on a terminal, so that their texts are aligned."""
_INDENT = 4
"""Columns by which the lines after the first one of a paragraph are indented."""
_LEAST_WIDTH = 20
"""Columns in which a text is not broken further."""
_GAP = 3
"""Columns between those of a table."""
_PLAIN_SECONDS = 5.0
"""Time between two lines of progress where the output is not a terminal, at the beginning of a step."""
_PLAIN_SHARE = 0.1
"""The same as a part of the time since the beginning, so that a log of hours stays short."""
_KNOWN_SHARE = 0.02
"""The part of a step that must be done before it says how long the rest will take."""

Later = Callable[[float], float]
"""From the seconds that a step takes to those that the steps after it are expected to take."""


class Console:
    """Where everything is shown.

    ``quiet``: no progress, no notes; warnings, errors and results stay. ``json``: stdout carries only what
    ``emit_json`` is given; tables and other results for people are dropped. ``debug``: errors come with a traceback.
    """

    def __init__(
        self,
        quiet: bool = False,
        json: bool = False,
        debug: bool = False,
        *,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.quiet, self.json, self.debug = quiet, json, debug
        self._stdout, self._stderr = stdout, stderr
        self._rich: dict[bool, rich.console.Console] = {}

    # -- results -------------------------------------------------------------------------------------------------------

    def print(self, message: object = "") -> None:
        """Print one line of the result to stdout."""
        self.line((str(message), ""))

    def line(self, *spans: tuple[str, str]) -> None:
        """Print one line of styled spans (text, rich style) to stdout. The texts are escaped."""
        if not self.json:
            self._line(False, *((one_line(text), style) for text, style in spans))

    def paragraph(self, *spans: tuple[str, str]) -> None:
        """Print styled spans to stdout. On a terminal they wrap between words, and what follows the first line is
        indented; elsewhere they are one line.
        """
        console = self._console(False)
        if not console.is_terminal:
            self.line(*spans)
        elif not self.json:
            text = self._text(False, *((one_line(text), style) for text, style in spans))
            indent = " " * (len(text.plain) - len(text.plain.lstrip()) + _INDENT)
            first, *rest = text.wrap(console, max(console.width - len(indent), _LEAST_WIDTH), overflow="fold")
            for line in (first, *(self._text(False, (indent, "")).append_text(line) for line in rest)):
                console.print(line, soft_wrap=True, markup=False, highlight=False)

    def command(self, label: str, command: str) -> None:
        """Print a command line that is to be copied, after its label: it is not broken into lines."""
        is_terminal = self._console(False).is_terminal
        shown = f"{label:<{_LABEL_WIDTH}}  " if is_terminal else f"{label}: "
        self.line((shown, "bold"), (command, "cyan"))

    def item(self, label: tuple[str, str], *spans: tuple[str, str]) -> None:
        """Print a labeled item of a list to stdout. On a terminal its text wraps behind the label; elsewhere it is one
        line.
        """
        if not self._console(False).is_terminal:
            self.line((f"{label[0]}: ", label[1]), *spans)
        elif not self.json:
            from rich.table import Table

            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(no_wrap=True, min_width=_LABEL_WIDTH)
            grid.add_column(overflow="fold")
            grid.add_row(
                *(self._text(False, *((one_line(t), style) for t, style in part)) for part in ([label], spans))
            )
            self._console(False).print(grid, markup=False, highlight=False)

    def can_show(self, text: str) -> bool:
        """Whether the encoding of stdout can represent ``text``."""
        try:
            text.encode(self._encoding(False))
        except UnicodeEncodeError:
            return False
        return True

    def stream(self, text: str) -> None:
        """Write a piece of running text to stdout. Line breaks and tabs are kept, other control
        characters are escaped.
        """
        if self.json:
            return
        escaped = "".join(c if c in "\n\t" else one_line(c) for c in text)
        stream = self._stdout or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(escaped.encode(encoding, "replace").decode(encoding))
        stream.flush()

    def markdown(self, text: str) -> None:
        """Print Markdown to stdout, line by line. Its writer has escaped the markup in names that come from files."""
        for line in text.splitlines():
            self.print(line)

    def emit_json(self, content: object) -> None:
        """Print ``content`` as JSON to stdout: sorted keys, two spaces, ASCII only, so that no string can control a
        terminal.
        """
        text = json_module.dumps(content, indent=2, sort_keys=True, allow_nan=False).replace("\x7f", "\\u007f")
        text = text.replace("##[", "##\\u005b")  # a command for GitHub's runner
        stream = self._stdout or sys.stdout
        stream.write(text + "\n")
        stream.flush()

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """Print a table to stdout. A column whose name ends in "#" is aligned right; the mark is not shown. Where the
        terminal is too narrow for it, every row is printed as a paragraph.
        """
        if self.json:
            return
        cells = [[one_line(cell) for cell in row] for row in rows]
        if not _fits(columns, cells, self._console(False).width):
            self._records([column.removesuffix("#") for column in columns], cells, title)
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            box=SIMPLE_HEAD,
            title=self._text(False, (one_line(title), "bold")) if title else None,
            title_justify="left",
            pad_edge=False,
            show_edge=False,  # no blank lines around it
        )
        for column in columns:
            table.add_column(
                self._text(False, (one_line(column.removesuffix("#")), "bold")),
                justify="right" if column.endswith("#") else "left",
                overflow="fold",
                no_wrap=column.endswith("#"),  # numbers stay whole
            )
        for row in cells:
            table.add_row(*(self._text(False, (cell, "")) for cell in row))
        self._console(False).print(table, markup=False, highlight=False)

    def _records(self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
        """Rows as paragraphs: what stands up to the first named column, then names and values."""
        if title:
            self.line((title, "bold"))
        first = next((index for index, column in enumerate(columns) if column), 0) + 1
        for row in rows:
            self.paragraph(("  ".join(filter(None, row[:first])), "bold"))
            pairs = zip(columns[first:], row[first:], strict=True)
            self.paragraph(("    " + ", ".join(f"{column} {cell}".strip() for column, cell in pairs if cell), ""))

    # -- messages ------------------------------------------------------------------------------------------------------

    def note(self, message: object) -> None:
        """Print to stderr a remark that can be ignored."""
        if not self.quiet:
            self._line(True, (one_line(message), "dim"))

    def warn(self, message: object) -> None:
        """Print a warning to stderr, also when quiet."""
        self._line(True, ("warning: ", "bold yellow"), (one_line(message), ""))

    def error(self, error: ToolError) -> None:
        """Print ``error[id]: message`` and ``hint: ...`` to stderr; in JSON mode also an object to stdout."""
        if self.debug:
            self._traceback(error)
        self.failure(error.id, error.message, error.hint)
        self.emit_failure(error.id, error.message, error.hint, error.exit_code)

    def failure(self, id: str, message: str, hint: str) -> None:
        """Print ``error[id]: message`` and ``hint: ...`` to stderr."""
        self._line(True, (f"error[{one_line(id)}]: ", "bold red"), (one_line(message), ""))
        if hint:
            self._line(True, ("hint: ", "bold cyan"), (one_line(hint), ""))

    def bug(self, error: BaseException) -> None:
        """Print an unexpected exception as one line, and its traceback when debugging."""
        message = f"{type(error).__name__}: {error}"
        hint = "this is a bug in gemma2tool; run again with GEMMA2TOOL_DEBUG=1 set and report what it prints"
        if self.debug:
            self._traceback(error)
        self._line(True, ("error[bug]: ", "bold red"), (one_line(message), ""))
        self._line(True, ("hint: ", "bold cyan"), (hint, ""))
        self.emit_failure("bug", message, hint, EXIT_BUG)

    # -- progress ------------------------------------------------------------------------------------------------------

    @contextmanager
    def progress(
        self, total: int, label: str, /, unit: str = "bytes", later: Later | None = None
    ) -> Iterator[ProgressBar]:
        """Show the progress of a step of ``total`` units: a bar on a terminal, a line every few seconds elsewhere.
        ``later``: with it, also when all steps will be done.
        """
        if self.quiet:
            yield _NullBar()
        elif self._console(True).is_terminal:
            with _rich_bar(self._console(True), total, label, unit, later) as bar:
                yield bar
        else:
            plain = _PlainBar(self, total, label, unit, later)
            yield plain
            plain.finish()

    # -- rich ----------------------------------------------------------------------------------------------------------

    def _console(self, err: bool) -> rich.console.Console:
        if err not in self._rich:
            from rich.console import Console as _Console

            class RichConsole(_Console):
                def on_broken_pipe(self) -> None:
                    raise BrokenPipeError  # the command line handles it, not rich

            stream = self._stderr if err else self._stdout
            console = RichConsole(
                file=stream, stderr=err, markup=False, highlight=False, emoji=False, legacy_windows=False
            )
            if not console.is_terminal:
                console.width = _PLAIN_WIDTH
            self._rich[err] = console
        return self._rich[err]

    def _text(self, err: bool, *spans: tuple[str, str]) -> Text:
        """Styled text; characters that the stream's encoding cannot represent are escaped."""
        from rich.text import Text

        encoding = self._encoding(err)
        return Text.assemble(
            *((inert(text.encode(encoding, "backslashreplace").decode(encoding)), style) for text, style in spans)
        )

    def _line(self, err: bool, *spans: tuple[str, str]) -> None:
        self._console(err).print(self._text(err, *spans), soft_wrap=True, markup=False, highlight=False)

    def _encoding(self, err: bool) -> str:
        return getattr(self._console(err).file, "encoding", None) or "utf-8"

    def _traceback(self, error: BaseException) -> None:
        """Print the traceback with a bar before every line, so that no text in it can pass for a line of gemma2tool."""
        for block in traceback.format_exception(error):
            for line in block.splitlines():
                self._line(True, (f"| {one_line(line)}", "dim"))

    def emit_failure(self, id: str, message: str, hint: str, exit_code: int) -> None:
        """In JSON mode, print the object of a failure to stdout."""
        if self.json:
            self.emit_json({"error": {"id": id, "message": message, "hint": hint, "exit_code": exit_code}})


def _fits(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether a table leaves its texts enough room beside its numbers, which stay whole."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    texts = [width for column, width in zip(columns, widths, strict=True) if not column.endswith("#")]
    room = width - (sum(widths) - sum(texts)) - _GAP * (len(widths) - 1)
    return room >= sum(min(text, _LEAST_WIDTH) for text in texts)


class _NullBar:
    def advance(self, count: int, name: str = "", /) -> None:
        pass


class _PlainBar:
    """Progress as lines of text, for logs."""

    def __init__(self, console: Console, total: int, label: str, unit: str, later: Later | None) -> None:
        self.console, self.total, self.label, self.unit, self.later = console, total, label, unit, later
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.lock = threading.Lock()

    def _amount(self, count: float) -> str:
        if self.unit == "bytes":
            return human_bytes(count)
        slow = 0 < count < 10 and count != int(count)
        return f"{count:.2g} {self.unit}" if slow else f"{count:,.0f} {self.unit}"

    def advance(self, count: int, name: str = "", /) -> None:
        with self.lock:
            self.done += count
            now = time.monotonic()
            elapsed = now - self.started
            if now - self.last_line < max(_PLAIN_SECONDS, _PLAIN_SHARE * elapsed):
                return
            self.last_line = now
            rate = self.done / elapsed
            share = f" of {self._amount(self.total)} ({min(self.done / self.total, 1):.0%})" if self.total else ""
            known = rate and self.total and self.done >= _KNOWN_SHARE * self.total
            left = f", {self._left(elapsed, max(self.total - self.done, 0) / rate)}" if known else ""
            at = f": {name}" if name else ""
            self.console.note(f"{self.label}: {self._amount(self.done)}{share}, {self._amount(rate)}/s{left}{at}")

    def _left(self, elapsed: float, seconds: float) -> str:
        left = f"{human_seconds(seconds)} left"
        if self.later is None:
            return left
        return f"{left} (all steps: about {human_seconds(seconds + self.later(elapsed + seconds))})"

    def finish(self) -> None:
        seconds = time.monotonic() - self.started
        if seconds >= _PLAIN_SECONDS:
            rate = self._amount(self.done / seconds)
            self.console.note(f"{self.label}: {self._amount(self.done)} in {human_seconds(seconds)} ({rate}/s)")


@contextmanager
def _rich_bar(
    console: rich.console.Console, total: int, label: str, unit: str, later: Later | None
) -> Iterator[ProgressBar]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Name(ProgressColumn):
        """A field of the task as literal text; rich's own text column would read markup in it."""

        def __init__(self, field: str, style: str) -> None:
            super().__init__()
            self.field, self.style = field, style

        def render(self, task: Task) -> Text:
            return Text(task.fields[self.field], style=self.style, no_wrap=True, overflow="ellipsis")

    class AllLeft(ProgressColumn):
        """When all steps will be done."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            if later is None or task.time_remaining is None or task.elapsed is None:
                return Text("")
            seconds = task.time_remaining + later(task.elapsed + task.time_remaining)
            return Text(f"(all: about {human_seconds(seconds)})", style="cyan", no_wrap=True)

    amounts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if unit == "bytes":
        amounts = (DownloadColumn(), TransferSpeedColumn())
    columns = (Name("label", "bold"), BarColumn(), *amounts, TimeRemainingColumn(), AllLeft(), Name("at", "dim"))
    if console.width < _NARROW:
        columns = (Name("label", "bold"), BarColumn(10), amounts[0], TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total or None, label=one_line(label), at="")

        class RichBar:
            def advance(self, count: int, name: str = "", /) -> None:
                progress.update(task, advance=count, at=one_line(name))

        yield RichBar()
