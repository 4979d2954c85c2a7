"""The exit codes of the command line."""

from __future__ import annotations

EXIT_OK = 0
EXIT_VERIFICATION_FAILED = 1
EXIT_USAGE = 2
EXIT_INPUT_REFUSED = 3
EXIT_RESOURCES = 4
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

EXIT_CODES = {
    EXIT_OK: "success; the output is verified unless `--no-verify` was given",
    EXIT_VERIFICATION_FAILED: "verification failed, or `diff` found a difference; the destination is unchanged",
    EXIT_USAGE: "the command cannot work as it was called (`UsageError`)",
    EXIT_INPUT_REFUSED: "an input is damaged, hostile, incomplete or not Gemma 2 (`InputRefused`)",
    EXIT_RESOURCES: "the machine lacks disk space, memory, a lock or a device (`ResourceError`)",
    EXIT_BUG: "a bug in gemma2tool; `GEMMA2TOOL_DEBUG=1` prints the traceback",
    EXIT_INTERRUPTED: "interrupted by SIGINT or SIGTERM",
}
"""Every exit code and its meaning, as the documentation says it."""
