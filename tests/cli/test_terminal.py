"""What reaches the terminal: results and messages apart, nothing from a file taken for more than text."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gemma2tool.api import ProgressEvent
from gemma2tool.cli import terminal as subject
from gemma2tool.cli.log import shown_on
from gemma2tool.cli.outcome import show_warnings
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import InputRefused
from gemma2tool.storage.quoting import one_line
from gemma2tool.storage.units import human_bytes, human_seconds
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.reports.terminal import render_verification
from gemma2tool.verify.result import Side, Verification

HOSTILE = [
    "\x1b[2Jcleared",
    "\x1b]8;;https://evil\x1b\\link\x1b]8;;\x1b\\",
    "x\nOK: verified",
    "x\r\nPASSED",
    "a\x00b",
    "bell\x07\x08\x7f",
    "\u202egnp.exe",
    "\u2066hidden\u2069",
    "zero\u200bwidth\ufeff",
    "line\u2028separator",
    "\x9b31mC1",
    "lone \udcff surrogate",
    "[red]markup[/red]",
    "[/x]",
    "[link=https://evil]x[/link]",
    "[bold",
    "\\[x]",
    ":smiley:",
    "tab\there",
]
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(**options: bool) -> tuple[Console, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(stdout=out, stderr=err, **options), out, err


def verification(name: str = "model.norm.weight", status: str = "failed") -> Verification:
    error = Finding("tensors", "error", name, "1 of 9 values is not the source's")
    row = {"tensors": 1, "values": 9, "rmse": 0.1, "relative_rmse": 0.1, "snr_db": 20.0, "max_abs_error": 0.2}
    row |= {"candidate_type": name}
    gates = (
        GateResult("completeness", "passed", f"all there: {name}"),
        GateResult("tokenizer", "skipped", "none there"),
        GateResult(
            "tensors", status, f"{name}: wrong", {"by_type": {name: row}, "tensors": {name: row}}, (error,) * 20
        ),
        GateResult("logits", "reported", "largest difference 1"),
        GateResult(
            "distribution",
            "passed",
            "fine",
            {
                "kl_mean": 0.1,
                "kl_median": 0.1,
                "kl_p99": 0.1,
                "kl_max": 0.1,
                "top1_agreement": 0.9,
                "positions": 64,
            },
        ),
    )
    return Verification(Side(name, "hf", {"f32": 1}), Side(f"{name}.gguf", "gguf", {name: 1}), "q8_0", gates)


# -- untrusted text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    assert not FORBIDDEN.search(one_line(text)) and "\n" not in one_line(text)
    terminal, out, err = console(debug=True)
    terminal.print(text)
    terminal.note(text)
    terminal.warn(text)
    terminal.error(InputRefused(text, text, hint=text))
    terminal.bug(RuntimeError(text))
    terminal.table((text, "n#"), [(text, text)], title=text)
    render_verification(verification(text), terminal)
    for stream in (out, err):
        assert not FORBIDDEN.search(stream.getvalue())
    lines = (out.getvalue() + err.getvalue()).splitlines()
    assert not any(line.startswith(("OK", "PASSED")) for line in lines)
    assert one_line(text) in out.getvalue(), "shown whole, markup and all"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_cannot_control_a_terminal(text: str) -> None:
    out, err = Terminal(), Terminal()
    terminal = Console(stdout=out, stderr=err)
    render_verification(verification(text), terminal)
    terminal.error(InputRefused("id", text))
    with terminal.progress(100, text) as bar:
        bar.advance(100, text)
    own_sequences = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # colours, and the bar redrawing itself
    written = own_sequences.sub("", out.getvalue() + err.getvalue())
    assert not FORBIDDEN.search(written) and "evil\x1b" not in written
    assert "\x1b]8" not in out.getvalue() + err.getvalue(), "no hyperlinks"
    assert "\x1b[2J" not in out.getvalue() + err.getvalue(), "no clearing"


def test_ordinary_names_stay_as_they_are() -> None:
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "/home/j\u00f6rg/mod\u00e8les/\u6a21\u578b.gguf",
        "a b",
        "C:\\models",
    ):
        assert one_line(name) == name


def test_json_cannot_steer_a_terminal_either() -> None:
    terminal, out, _ = console(json=True)
    terminal.emit_json({"names": HOSTILE})
    assert re.fullmatch("[\n -~]*", out.getvalue())
    assert json.loads(out.getvalue())["names"] == HOSTILE


def test_a_line_is_no_command_for_githubs_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scripts/action.sh does not fence what is printed: names of files reach the log of the step."""
    texts = ("::set-output name=a::b", "  ::error::x", "a ##[add-mask]b", "a::b")
    for value, expected in (("", texts), ("true", (r"\x3a:set-output name=a::b", r"  \x3a:error::x", None, "a::b"))):
        monkeypatch.setenv("GITHUB_ACTIONS", value)
        stdout, stderr = io.StringIO(), io.StringIO()
        console = Console(stdout=stdout, stderr=stderr)
        for text in texts:
            console.print(text)
            console.note(text)
        for stream in (stdout, stderr):
            lines = stream.getvalue().splitlines()
            assert [line for line, text in zip(lines, expected, strict=True) if line != text and text] == []
            assert value == "" or "##[" not in stream.getvalue()
    Console(json=True, stdout=stdout).emit_json({"a": "##[error]"})
    assert r"##\u005berror]" in stdout.getvalue()


def test_a_terminal_without_the_letters_gets_escapes() -> None:
    raw = io.BytesIO()
    latin = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    terminal = Console(stdout=latin, stderr=latin)
    terminal.print("mod\u00e8le")
    render_verification(verification("mod\u00e8le"), terminal)
    latin.flush()
    assert b"mod\\xe8le" in raw.getvalue() and b"FAIL" in raw.getvalue()


# -- where what goes ---------------------------------------------------------------------------------------------------


def test_results_to_stdout_messages_to_stderr() -> None:
    terminal, out, err = console()
    terminal.print("result")
    terminal.table(("a",), [("row",)])
    terminal.note("note")
    terminal.warn("careful")
    assert "result" in out.getvalue() and "row" in out.getvalue()
    assert err.getvalue().splitlines() == ["note", "warning: careful"]


def test_errors_are_two_lines_and_long_ones_are_not_broken() -> None:
    terminal, out, err = console()
    terminal.error(InputRefused("a.b", "long " * 100, hint="do " * 100))
    lines = err.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("error[a.b]: long") and lines[1].startswith("hint: do")
    assert out.getvalue() == ""
    terminal.error(InputRefused("a.b", "short"))
    assert err.getvalue().splitlines()[2:] == ["error[a.b]: short"]


def test_quiet_keeps_warnings_errors_and_results() -> None:
    terminal, out, err = console(quiet=True)
    terminal.note("note")
    with terminal.progress(10, "work") as bar:
        bar.advance(10, "t")
    terminal.warn("careful")
    terminal.print("result")
    assert err.getvalue() == "warning: careful\n" and out.getvalue() == "result\n"


def test_json_mode_keeps_stdout_for_one_object() -> None:
    terminal, out, err = console(json=True)
    terminal.print("result")
    terminal.table(("a",), [("row",)])
    render_verification(verification(), terminal)
    assert out.getvalue() == ""
    terminal.error(InputRefused("a.b", "broken", hint="mend it"))
    assert json.loads(out.getvalue()) == {
        "error": {"id": "a.b", "message": "broken", "hint": "mend it", "exit_code": 3}
    }
    assert "error[a.b]: broken" in err.getvalue()


def test_debug_adds_the_traceback() -> None:
    def fail(terminal: Console) -> None:
        try:
            raise ValueError("inner")
        except ValueError as cause:
            try:
                raise InputRefused("a.b", "outer") from cause
            except InputRefused as error:
                terminal.error(error)

    plain, _, quiet = console()
    fail(plain)
    assert "Traceback" not in quiet.getvalue()
    terminal, _, err = console(debug=True)
    fail(terminal)
    assert "Traceback" in err.getvalue() and "ValueError: inner" in err.getvalue()


def test_a_bug_is_reported_as_one() -> None:
    terminal, out, err = console(json=True)
    terminal.bug(ZeroDivisionError("x"))
    assert "error[bug]: ZeroDivisionError: x" in err.getvalue() and "this is a bug" in err.getvalue()
    assert json.loads(out.getvalue())["error"]["exit_code"] == 70


# -- a verification ----------------------------------------------------------------------------------------------------


def test_verification_begins_with_the_verdict_and_names_every_gate() -> None:
    terminal, out, _ = console()
    render_verification(verification(), terminal, verbose=True)
    lines = out.getvalue().splitlines()
    for gate in ("completeness", "tokenizer", "tensors", "logits", "distribution"):
        assert sum(bool(re.match(rf"(\S|ok|FAIL|skip|--) {gate} ", line)) for line in lines) == 1
    assert "and 8 more" in out.getvalue(), "findings beyond the limit are counted"
    assert lines[0] == "FAILED: not the same model, 20 findings (not compared: tokenizer)"
    terminal, out, _ = console()
    render_verification(verification(status="passed"), terminal)
    assert out.getvalue().splitlines()[0].startswith("PASSED: the same model, within q8_0 tolerance")


def test_a_failure_is_short_and_begins_with_its_cause() -> None:
    """Its findings and measurements come with ``verbose``; the same tensor of several layers is named once."""
    names = tuple(f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 2, 5))
    failed = replace(verification(), causes=(Cause("norm.plus-one", "all norms are larger by 1", names),))
    terminal, out, _ = console()
    render_verification(failed, terminal)
    lines = out.getvalue().splitlines()
    assert len(lines) <= 12 and lines[1].startswith("cause: all norms are larger by 1")
    assert lines[2].strip() == "model.layers.{0-2,5}.mlp.up_proj.weight"
    assert "KL divergence, nats" not in out.getvalue() and "1 of 9 values" not in out.getvalue()
    terminal, out, _ = console()
    render_verification(failed, terminal, verbose=True)
    assert "KL divergence, nats" in out.getvalue() and "1 of 9 values" in out.getvalue()


def test_a_receipts_verdict_is_not_that_of_a_comparison() -> None:
    for kind in ("lossless", "q4_k"):
        terminal, out, _ = console()
        gate = GateResult("tensors", "passed", "digests are equal")
        render_verification(
            Verification(Side("r.json", "receipt"), Side("m.gguf", "gguf", {"q4_k": 1}), kind, (gate,)), terminal
        )
        assert (
            out.getvalue().splitlines()[0]
            == f"PASSED: matches its receipt (unsigned: it says that it was verified as {kind})"
        )


# -- progress ----------------------------------------------------------------------------------------------------------


def test_plain_progress_prints_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    terminal, out, err = console()
    with terminal.progress(1_000_000_000, "tensors") as bar:
        for step in range(100):
            clock[0] += 0.2
            bar.advance(10_000_000, f"model.layers.{step}\x1b[2J")
    lines = err.getvalue().splitlines()
    assert out.getvalue() == "" and 4 <= len(lines) <= 6
    assert re.fullmatch(r"tensors: 250 MB of 1 GB \(25%\), 50 MB/s, 15 s left: model\.layers\.24\\x1b\[2J", lines[0]), (
        lines[0]
    )
    assert lines[-1] == "tensors: 1 GB in 20 s (50 MB/s)"


def test_progress_says_when_all_steps_will_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    terminal, _, err = console()
    display = ProgressDisplay(terminal)
    expected = (1.0, 1.0, 2.0)
    for number, step in enumerate(("writing", "tensors", "forward passes")):
        display(ProgressEvent(step, 0, 100, "files", expected=expected[number:]))
        clock[0] += 10
        display(ProgressEvent(step, 50, 100, "files"))
        clock[0] += 10
        display(ProgressEvent(step, 100, 100, "files", ended=True))
    lines = err.getvalue().splitlines()
    assert "10 s left (all steps: about 1 min 10 s)" in lines[0]
    assert "tensors (2 of 3): 50 files" in lines[2] and "10 s left (all steps: about 50 s)" in lines[2]
    assert lines[4].endswith("files/s, 10 s left")


def test_a_log_of_hours_has_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    terminal, _, err = console()
    with terminal.progress(7200, "tensors") as bar:
        for _ in range(7200):
            clock[0] += 1
            bar.advance(1)
    assert 30 < len(err.getvalue().splitlines()) < 80


def test_short_steps_show_no_progress() -> None:
    terminal, _, err = console()
    with terminal.progress(0, "nothing") as bar:
        bar.advance(0)
    assert err.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_any_thread_may_advance(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_PLAIN_SECONDS", 0.0)
    err = stream()
    terminal = Console(stdout=io.StringIO(), stderr=err)
    with terminal.progress(800, "work") as bar:
        threads = [threading.Thread(target=lambda: [bar.advance(1, "t") for _ in range(100)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "800" in err.getvalue()


def test_a_failure_inside_passes_through_and_leaves_the_terminal_whole() -> None:
    err = Terminal()
    with pytest.raises(KeyError), Console(stderr=err).progress(10, "work") as bar:
        bar.advance(5, "t")
        raise KeyError
    assert err.getvalue().count("\x1b[?25l") == err.getvalue().count("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (5_230_000_000, "5.23 GB"), (1e13, "10 TB"), (1536, "1.54 kB")]
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_importing_it_brings_in_nothing_heavy() -> None:
    code = "import sys, gemma2tool.cli.terminal; print([m for m in ('rich', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bars_of_a_narrow_terminal_keep_their_numbers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    out, err = io.StringIO(), Terminal()
    display = ProgressDisplay(Console(stdout=out, stderr=err))
    display(ProgressEvent("forward passes", 0, 20_000_000_000, "bytes", expected=(1.0, 1.0, 1.0)))
    display(
        ProgressEvent("forward passes", 10_000_000_000, 20_000_000_000, "bytes", "model.layers.0.mlp.down_proj.weight")
    )
    display(ProgressEvent("forward passes", 10_000_000_000, 20_000_000_000, "bytes", ended=True))
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    assert "forward passes (1 of 3)" in screen and "10.0/20.0 GB" in screen


def test_warnings_of_a_verification_that_passed_are_shown_once_when_quiet() -> None:
    errors = io.StringIO()
    findings = [Finding("tokenizer", "warning", None, "it is lost"), Finding("tokenizer", "note", None, "it is kept")]
    with shown_on(Console(quiet=True, stderr=errors)):
        logging.getLogger("gemma2tool").warning("it is lost")
        show_warnings(SimpleNamespace(findings=findings))
        show_warnings(None)
    assert errors.getvalue() == "warning: it is lost\n"


def test_tables_and_paragraphs_of_a_narrow_terminal_keep_numbers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    console = Console(stdout=out)
    name = "model.layers.2.self_attn.v_proj.weight"
    console.table(("tensor", "values#", "RMSE / RMS#", "largest error#"), [(name, "6,428,928", "0.0738", "0.0209")])
    console.paragraph(("    error: ", "red"), (f"{name}: 6,428,928 of 6,428,928 values are not the source's", ""))
    console.command("next", "llama-cli -m " + "x" * 60)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert f"{name}\n    values 6,428,928, RMSE / RMS 0.0738" in text, "too narrow for a table"
    lines = [line for line in text.splitlines() if "values are" in line or "source's" in line]
    assert all(line.startswith("        ") and len(line) <= 60 for line in lines) and lines
    assert f"next           llama-cli -m {'x' * 60}" in text
