"""How child processes of the tests receive signals."""

from __future__ import annotations

import signal


def accept_interrupts() -> None:
    """A ``preexec_fn`` for a child that will be sent SIGINT.

    A script's background jobs ignore the signal, and their children inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
