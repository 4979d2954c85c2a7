"""The only place that prints. Results go to stdout; progress, notes, warnings and errors to stderr.

Names of tensors, paths, config values and error messages come from files that nobody vouches for. Here they meet the
terminal, so here whatever could move the cursor, forge a line, hide text or be taken for markup is shown as an escape
instead (``safe``).
"""

from __future__ import annotations

import json as json_module
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Protocol

from gemma2tool.errors import EXIT_BUG, ToolError
from gemma2tool.storage.quoting import safe

if TYPE_CHECKING:
    import rich.console
    from rich.text import Text

    from gemma2tool.verify.diagnosis.cause import Cause
    from gemma2tool.verify.difference import Difference
    from gemma2tool.verify.result import GateResult, Verification

_PLAIN_WIDTH = 160  # of tables where the output is no terminal and so has no width
_PLAIN_SECONDS = 5.0  # between two lines of progress where the output is no terminal

Marks = Mapping[str, tuple[str, str, str]]
_MARKS: Marks = {
    "passed": ("\u2713", "ok", "green"),
    "failed": ("\u2717", "FAIL", "bold red"),
    "skipped": ("\u2013", "skip", "yellow"),
    "reported": ("\u00b7", "--", "cyan"),
}
_DIFFERENCE_MARKS: Marks = {**_MARKS, "passed": ("=", "=", "green"), "failed": ("\u2260", "!=", "bold yellow")}
_SEVERITY_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}
_KL_PARTS = (
    ("mean", "kl_mean"),
    ("median", "kl_median"),
    ("99 %", "kl_p99"),
    ("99.9 %", "kl_p99_9"),
    ("max", "kl_max"),
)
_MAX_NAMES = 6  # of the tensors that a cause explains
_MAX_FINDINGS = 12  # of one gate on the screen; JSON has them all
_MAX_EXPLAINED = 3  # the same where causes say what is behind them


def human_bytes(count: float) -> str:
    """Bytes in decimal units, three digits: "5.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_seconds(seconds: float) -> str:
    """Such as "45 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Bar(Protocol):
    def advance(self, nbytes: int, name: str = "") -> None:
        """``nbytes`` more are done; ``name`` is the tensor at hand. Any thread may call."""


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

    # -- messages ------------------------------------------------------------------------------------------------------

    def print(self, message: object = "") -> None:
        """A line of the result, to stdout."""
        if not self.json:
            self._line(False, (safe(message), ""))

    def stream(self, text: str) -> None:
        """A piece of running text to stdout as it comes: line breaks and tabs as they are, other control characters escaped."""
        if self.json:
            return
        shown = "".join(c if c in "\n\t" else safe(c) for c in text)
        stream = self._stdout or sys.stdout
        stream.write(
            shown.encode(getattr(stream, "encoding", None) or "utf-8", "replace").decode(stream.encoding or "utf-8")
        )
        stream.flush()

    def markdown(self, text: str) -> None:
        """Markdown that somebody asked for, to stdout as it is: its writer has escaped what came from files."""
        if not self.json:
            for line in text.splitlines():
                self._line(False, (safe(line), ""))

    def note(self, message: object) -> None:
        """Something to know, to stderr."""
        if not self.quiet:
            self._line(True, (safe(message), "dim"))

    def warn(self, message: object) -> None:
        """Something to look at, to stderr, also when quiet."""
        self._line(True, ("warning: ", "bold yellow"), (safe(message), ""))

    def error(self, error: ToolError) -> None:
        """``error[id]: message`` and ``hint: ...``, to stderr; in JSON mode also as an object on stdout."""
        if self.debug:
            self._traceback(error)
        self._line(True, (f"error[{safe(error.id)}]: ", "bold red"), (safe(error.message), ""))
        if error.hint:
            self._line(True, ("hint: ", "bold cyan"), (safe(error.hint), ""))
        self._emit_error(error.id, error.message, error.hint, error.exit_code)

    def bug(self, error: BaseException) -> None:
        """What no one foresaw: one line, and the traceback when debugging."""
        message = f"{type(error).__name__}: {error}"
        hint = "this is a bug in gemma2tool; run again with GEMMA2TOOL_DEBUG=1 set and report what it prints"
        if self.debug:
            self._traceback(error)
        self._line(True, ("error[bug]: ", "bold red"), (safe(message), ""))
        self._line(True, ("hint: ", "bold cyan"), (hint, ""))
        self._emit_error("bug", message, hint, EXIT_BUG)

    def emit_json(self, content: Any) -> None:
        """``content`` as JSON to stdout: sorted, two spaces, ASCII only, so that no string can steer a terminal."""
        text = json_module.dumps(content, indent=2, sort_keys=True, allow_nan=False).replace("\x7f", "\\u007f")
        stream = self._stdout or sys.stdout
        stream.write(text + "\n")
        stream.flush()

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """A table to stdout. Columns whose names end in "#" hold numbers, set flush right; the mark is not shown."""
        if self.json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            box=SIMPLE_HEAD,
            title=self._text(False, (safe(title), "bold")) if title else None,
            title_justify="left",
            pad_edge=False,
        )
        for column in columns:
            justify = "right" if column.endswith("#") else "left"
            table.add_column(
                self._text(False, (safe(column.removesuffix("#")), "bold")), justify=justify, overflow="fold"
            )
        for row in rows:
            table.add_row(*(self._text(False, (safe(cell), "")) for cell in row))
        self._console(False).print(table, markup=False, highlight=False)

    def verification(self, result: Verification, *, findings: int = _MAX_FINDINGS) -> None:
        """A verification for people: a line per gate, what was found, the measures, and the verdict."""
        if self.json:
            return
        stored = ", ".join(f"{kind}" for kind in sorted(result.candidate.stored))
        self._line(False, ("source     ", "dim"), (safe(f"{result.source.path} ({result.source.format})"), ""))
        self._line(
            False, ("candidate  ", "dim"), (safe(f"{result.candidate.path} ({result.candidate.format}: {stored})"), "")
        )
        width = max((len(gate.name) for gate in result.gates), default=0)
        for gate in result.gates:
            self._gate(gate, width, min(findings, _MAX_EXPLAINED) if result.causes else findings)
        self._measures(result)
        for cause in result.causes:
            self._cause(cause)
        skipped = f" (not looked at: {', '.join(result.skipped)})" if result.skipped else ""
        verdict = ("PASSED", "bold green") if result.passed else ("FAILED", "bold red")
        said = (
            safe(result.verdict)
            if result.passed
            else f"{len(result.failures)} finding{'s' * (len(result.failures) != 1)}"
        )
        self._line(False, verdict, (f": {said}{skipped}", ""))

    def difference(self, result: Difference, *, findings: int = 4) -> None:
        """Two checkpoints beside each other for people: a line per part, the tensors farthest apart, and the verdict."""
        if self.json:
            return
        for name, side in (("A  ", result.a), ("B  ", result.b)):
            stored = ", ".join(sorted(side.stored))
            self._line(False, (name, "bold"), (safe(f"{side.path} ({side.format}: {stored})"), ""))
        width = max(len(part.name) for part in result.parts)
        for part in result.parts:
            self._gate(part, width, findings, _DIFFERENCE_MARKS, {"error": "differs"})
        if result.causes:
            self._line(False, ("if B was made of A:", "bold"))
        for cause in result.causes:
            self._cause(cause)
        apart = sorted((each for each in result.tensors if each.differing), key=lambda each: -each.relative)[:8]
        if apart:
            self.table(
                ("tensors farthest apart", "A", "B", "values#", "differing#", "RMS#", "largest#"),
                [
                    (
                        each.name,
                        *each.types,
                        f"{each.values:,}",
                        f"{each.differing:,}",
                        f"{each.relative:.3g}",
                        f"{each.max_abs_difference:.3g}",
                    )
                    for each in apart
                ],
            )
        word = ("SAME", "bold green") if result.same else ("DIFFERENT", "bold yellow")
        self._line(False, word, (f": {result.verdict}", ""))

    def _gate(
        self,
        gate: GateResult,
        width: int,
        limit: int,
        marks: Marks = _MARKS,
        words: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        mark, ascii_mark, style = marks[gate.status]
        mark = mark if self._can_show(mark) else ascii_mark
        self._line(False, (f"{mark} ", style), (f"{gate.name:<{width}}  ", "bold"), (safe(gate.summary), ""))
        news = [each for each in gate.findings if each.message != gate.summary]
        notes = [each for each in news if each.severity == "note"]
        few = notes if len(notes) <= 3 else notes[:1]
        shown = [each for each in news if each.severity != "note" or each in few]
        for finding in shown[:limit]:
            self._line(
                False,
                (f"    {words.get(finding.severity, finding.severity)}: ", _SEVERITY_STYLES[finding.severity]),
                (safe(finding.sentence), ""),
            )
        hidden = len(news) - len(shown[:limit])
        if hidden:
            self._line(False, (f"    and {hidden} more (--json lists them all)", "dim"))

    def _cause(self, cause: Cause) -> None:
        """What went wrong, and the tensors or fields it explains."""
        self._line(False, ("cause: ", "bold red"), (safe(cause.message), "bold"), (f" [{safe(cause.id)}]", "dim"))
        about = (*cause.fields, *cause.tensors)
        if about:
            more = f" and {len(about) - _MAX_NAMES} more" if len(about) > _MAX_NAMES else ""
            self._line(False, (f"    {safe(', '.join(about[:_MAX_NAMES]))}{more}", "dim"))

    def _measures(self, result: Verification) -> None:
        metrics = {gate.name: gate.metrics for gate in result.gates}
        types = metrics.get("tensors", {}).get("by_type", {})
        if any(row["rmse"] for row in types.values()):
            self.table(
                ("stored as", "tensors#", "values#", "RMSE / RMS#", "SNR dB#", "largest error#"),
                [(kind, row["tensors"], f"{row['values']:,}", *_errors(row)) for kind, row in types.items()],
            )
            tensors = metrics["tensors"]["tensors"]
            worst = sorted(
                (name for name in tensors if tensors[name]["rmse"]), key=lambda name: -tensors[name]["relative_rmse"]
            )[:5]
            self.table(
                ("worst tensors", "stored as", "RMSE / RMS#", "SNR dB#"),
                [(name, tensors[name]["candidate_type"], *_errors(tensors[name])[:2]) for name in worst],
            )
        spread = metrics.get("distribution", {})
        if spread.get("kl_mean"):
            parts = (f"{word} {spread[name]:.3g}" for word, name in _KL_PARTS if name in spread)
            rows = [("KL divergence, nats", "  ".join(parts))]
            rows.append(("same likeliest token", f"{spread['top1_agreement']:.2%} of {spread['positions']} positions"))
            if "perplexity_ratio" in spread:
                rows.append(("perplexity of the source", _plus_minus(spread, "perplexity_source")))
                rows.append(("perplexity of the candidate", _plus_minus(spread, "perplexity_candidate")))
                rows.append(("their ratio", _plus_minus(spread, "perplexity_ratio")))
                mean, rms = spread["chosen_probability_change_mean"], spread["chosen_probability_change_rms"]
                rows.append(("chosen token's probability", f"{100 * mean:+.3g} points on average, {100 * rms:.3g} RMS"))
            self.table(("logits", ""), rows)

    # -- progress ------------------------------------------------------------------------------------------------------

    @contextmanager
    def progress(self, total_bytes: int, label: str) -> Iterator[Bar]:
        """A bar in bytes: rate, time left, the tensor at hand; now and then a line where stderr is no terminal."""
        if self.quiet:
            yield _NoBar()
        elif self._console(True).is_terminal:
            with _rich_bar(self._console(True), total_bytes, label) as bar:
                yield bar
        else:
            plain = _PlainBar(self, total_bytes, label)
            yield plain
            plain.finish()

    # -- rich ----------------------------------------------------------------------------------------------------------

    def _console(self, err: bool) -> rich.console.Console:
        if err not in self._rich:
            from rich.console import Console as _Console

            class RichConsole(_Console):
                def on_broken_pipe(self) -> None:
                    raise BrokenPipeError  # the command line decides what that means, not rich

            stream = self._stderr if err else self._stdout
            console = RichConsole(
                file=stream, stderr=err, markup=False, highlight=False, emoji=False, legacy_windows=False
            )
            if not console.is_terminal:
                console.width = _PLAIN_WIDTH
            self._rich[err] = console
        return self._rich[err]

    def _text(self, err: bool, *spans: tuple[str, str]) -> Text:
        """Styled text, with escapes for what the stream's encoding cannot write."""
        from rich.text import Text

        encoding = self._encoding(err)
        return Text.assemble(
            *((text.encode(encoding, "backslashreplace").decode(encoding), style) for text, style in spans)
        )

    def _line(self, err: bool, *spans: tuple[str, str]) -> None:
        self._console(err).print(self._text(err, *spans), soft_wrap=True, markup=False, highlight=False)

    def _encoding(self, err: bool) -> str:
        return getattr(self._console(err).file, "encoding", None) or "utf-8"

    def _can_show(self, mark: str) -> bool:
        try:
            mark.encode(self._encoding(False))
        except UnicodeEncodeError:
            return False
        return True

    def _traceback(self, error: BaseException) -> None:
        """Every line behind a bar, so that no message can pass for a line of ours."""
        for block in traceback.format_exception(error):
            for line in block.splitlines():
                self._line(True, (f"| {safe(line)}", "dim"))

    def _emit_error(self, id: str, message: str, hint: str, exit_code: int) -> None:
        if self.json:
            self.emit_json({"error": {"id": id, "message": message, "hint": hint, "exit_code": exit_code}})


def _errors(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{row['relative_rmse']:.3g}", f"{row['snr_db']:.1f}", f"{row['max_abs_error']:.3g}"


def _plus_minus(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.5g} \u00b1 {row[name + '_se']:.2g}"


class _NoBar:
    def advance(self, nbytes: int, name: str = "") -> None:
        pass


class _PlainBar:
    """Progress as lines of text, for logs."""

    def __init__(self, console: Console, total: int, label: str) -> None:
        self.console, self.total, self.label = console, total, label
        self.done = 0
        self.began = self.spoke = time.monotonic()
        self.lock = threading.Lock()

    def advance(self, nbytes: int, name: str = "") -> None:
        with self.lock:
            self.done += nbytes
            now = time.monotonic()
            if now - self.spoke < _PLAIN_SECONDS:
                return
            self.spoke = now
            rate = self.done / (now - self.began)
            share = f" of {human_bytes(self.total)} ({min(self.done / self.total, 1):.0%})" if self.total else ""
            left = f", {human_seconds(max(self.total - self.done, 0) / rate)} left" if rate else ""
            at = f": {name}" if name else ""
            self.console.note(f"{self.label}: {human_bytes(self.done)}{share}, {human_bytes(rate)}/s{left}{at}")

    def finish(self) -> None:
        seconds = time.monotonic() - self.began
        if seconds >= _PLAIN_SECONDS:
            rate = human_bytes(self.done / seconds)
            self.console.note(f"{self.label}: {human_bytes(self.done)} in {human_seconds(seconds)} ({rate}/s)")


@contextmanager
def _rich_bar(console: rich.console.Console, total: int, label: str) -> Iterator[Bar]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Name(ProgressColumn):
        """Shown as it is: rich's own text column would read markup in it."""

        def __init__(self, field: str, style: str) -> None:
            super().__init__()
            self.field, self.style = field, style

        def render(self, task: Any) -> Text:
            return Text(task.fields[self.field], style=self.style, no_wrap=True, overflow="ellipsis")

    sizes = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (Name("label", "bold"), *sizes, Name("at", "dim"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total or None, label=safe(label), at="")

        class Shown:
            def advance(self, nbytes: int, name: str = "") -> None:
                progress.update(task, advance=nbytes, at=safe(name))

        yield Shown()
