"""The command line: one file a command; this one puts them together and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemma2tool.cli import interrupts
from gemma2tool.cli.failures import options_of, report_failure
from gemma2tool.cli.groups import expanded
from gemma2tool.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, InputRefused, ResourceError, ToolError
from gemma2tool.errors.memory import is_out_of_memory
from gemma2tool.version import __version__

if TYPE_CHECKING:
    from gemma2tool.cli.terminal import Console


class _Group(TyperGroup):
    """The program: a command line that cannot be read gives a JSON object and reports too, if it asks for them."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            _show_usage_error(error, words)
            code = EXIT_USAGE
        sys.exit(code if isinstance(code, int) else 0)


def _show_usage_error(error: Any, words: Sequence[str]) -> None:
    """What the parser says, as it shows it; and as JSON and in reports, where the command line asks for these."""
    from gemma2tool.cli.terminal import Console

    error.show()
    hint = "run the command with --help for its arguments and options"
    Console(json="--json" in words).emit_failure("usage", error.format_message(), hint, EXIT_USAGE)
    report_failure(next(iter(words), ""), options_of(words), ("usage", error.format_message(), hint, EXIT_USAGE))


app = typer.Typer(
    name="gemma2tool",
    cls=_Group,
    help="Convert, quantize and verify Gemma 2 checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Command(TyperCommand):
    """A command that refuses a second value for an option that takes one: click would silently keep the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, options = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(options).items():
            takes_one = not (getattr(option, "multiple", True) or getattr(option, "is_flag", False))
            if count > 1 and takes_one and not ctx.resilient_parsing:
                ctx.fail(f"{option.opts[0]} is given twice and takes one value")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options under their headings, in the order in which the headings first occur."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_argument = param.param_type_name == "argument"
                heading = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _version(is_given: bool) -> None:
    if is_given:
        print(f"gemma2tool {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert, quantize and verify Gemma 2 checkpoints."""


@app.command("version", hidden=True)
def version_command() -> None:
    """Print the version."""
    _version(True)


@app.command("help", hidden=True)
def help_command(
    ctx: typer.Context, command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="A command.")] = None
) -> None:
    """Show the help of gemma2tool, or of one command."""
    parent: Any = ctx.parent
    if command is None:
        print(parent.get_help())
        return
    name, known, _ = parent.command.resolve_command(parent, [command])
    print(known.get_help(typer.Context(known, info_name=name, parent=parent)))


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command so that every failure is one line and a documented exit code; ``GEMMA2TOOL_DEBUG=1`` adds the
    traceback.
    """

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        from gemma2tool.cli.log import shown_on
        from gemma2tool.cli.terminal import Console

        def report(error: ToolError) -> None:
            report_failure(command.__name__, kwargs, (error.id, error.message, error.hint, error.exit_code))

        debug = os.environ.get("GEMMA2TOOL_DEBUG") == "1"
        console = Console(quiet=bool(kwargs.get("quiet")), json=bool(kwargs.get("json_output")), debug=debug)
        try:
            with shown_on(console):
                command(*args, **kwargs)
        except ToolError as error:
            console.error(error)
            _notes(error, console)
            report(error)
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, interrupts.Terminated) as stop:
            has_destination = not kwargs.keys().isdisjoint(("dst", "out", "folder"))
            says_all = _notes(stop, console) or not has_destination
            console.warn("interrupted" if says_all else "interrupted; nothing was written at the destination")
            error_of_stop = ("interrupted", "the run was interrupted", "run it again", EXIT_INTERRUPTED)
            report_failure(command.__name__, kwargs, error_of_stop)
            console.emit_failure("interrupted", "the run was interrupted", "", EXIT_INTERRUPTED)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # the reader closed the pipe, as head does
            _silence_stdout()
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            known = _resources(error)
            if known is not None:
                console.error(known)
                report(known)
                _silence_stdout()
                raise typer.Exit(known.exit_code) from None
            console.bug(error)
            bug = ("bug", f"{type(error).__name__}: {error}", "this is a bug in gemma2tool", EXIT_BUG)
            report_failure(command.__name__, kwargs, bug)
            raise typer.Exit(EXIT_BUG) from None

    return run


def _notes(error: BaseException, console: Console) -> list[str]:
    """Shows and returns the notes on an exception: where staged output is, and what to do with it."""
    notes = getattr(error, "__notes__", [])
    for note in notes:
        console.warn(note)
    return notes


def _silence_stdout() -> None:
    """Redirects stdout to the null device, so that the interpreter does not fail when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _resources(error: Exception) -> ToolError | None:
    """The resource that ran out, or the path that no file can have, if the exception shows one."""
    if is_out_of_memory(error):
        return ResourceError(
            "memory.exhausted", "not enough memory", hint="close other programs, or lower --memory and --threads"
        )
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return ResourceError("threads.exhausted", "the system refused to start more threads", hint="lower --threads")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        hint = "check the path; a text was perhaps given where a path is expected"
        return InputRefused("file.missing", f"{error.filename}: the name is too long for a file's", hint=hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        place = error.filename or "standard output"
        return ResourceError(
            "output.unwritable", f"{place}: {error.strerror}", hint="free some space, or write elsewhere"
        )
    return None


def _register() -> None:
    from gemma2tool.cli import (
        calibrate,
        check,
        clean,
        convert,
        diff,
        doctor,
        formats,
        generate,
        hash,
        imatrix,
        inspect,
        logits,
        merge,
        publish,
        quality,
        quantize,
        release,
        run,
        scan,
        sensitivity,
        sign,
        verify,
    )

    commands: tuple[Callable[..., None], ...] = (
        convert.convert,
        quantize.quantize,
        run.run,
        release.release,
        publish.publish,
        verify.verify,
        check.check,
        scan.scan,
        sign.sign,
        diff.diff,
        logits.logits,
        generate.generate,
        imatrix.imatrix,
        calibrate.calibrate,
        sensitivity.sensitivity,
        quality.quality,
        merge.merge,
        inspect.inspect,
        hash.hash,
        clean.clean,
        formats.formats,
        doctor.doctor,
    )
    for command in commands:
        app.command(command.__name__, cls=_Command)(guarded(expanded(command)))


_register()


def main() -> None:
    """Entry point of the ``gemma2tool`` command."""
    interrupts.install()
    app()


if __name__ == "__main__":
    main()
