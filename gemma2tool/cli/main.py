"""The command line: one file a command; this one puts them together and turns errors into exit codes."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from gemma2tool import __version__
from gemma2tool.errors import EXIT_BUG, EXIT_INTERRUPTED, ToolError

app = typer.Typer(
    name="gemma2tool",
    help="Convert, quantize and verify Gemma 2 checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gemma2tool {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Convert, quantize and verify Gemma 2 checkpoints."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command so that every failure is one line and a documented exit code; ``GEMMA2TOOL_DEBUG=1`` adds the traceback."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        from gemma2tool.console import Console

        debug = os.environ.get("GEMMA2TOOL_DEBUG") == "1"
        console = Console(quiet=bool(kwargs.get("quiet")), json=bool(kwargs.get("json_output")), debug=debug)
        try:
            command(*args, **kwargs)
        except ToolError as error:
            console.error(error)
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, _Terminated):
            console.warn("interrupted; nothing was written at the destination")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # a bug of ours: say so, in one line
            console.bug(error)
            raise typer.Exit(EXIT_BUG) from None

    return run


class _Terminated(BaseException):
    """SIGTERM arrived: unwind like an interrupt, so that nothing half-written stays behind."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


def _register() -> None:
    from gemma2tool.cli import convert, formats, generate, imatrix, inspect, logits, quantize, verify

    app.command("convert")(guarded(convert.convert))
    app.command("quantize")(guarded(quantize.quantize))
    app.command("verify")(guarded(verify.verify))
    app.command("logits")(guarded(logits.logits))
    app.command("generate")(guarded(generate.generate))
    app.command("imatrix")(guarded(imatrix.imatrix))
    app.command("inspect")(guarded(inspect.inspect))
    app.command("formats")(guarded(formats.formats))


_register()


def main() -> None:
    """Entry point of the ``gemma2tool`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()
