"""What a conversion wrote, and how good it is, as one screen: the verdict first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma2tool.cli.terminal import Console
from gemma2tool.storage.units import human_bytes

if TYPE_CHECKING:
    from gemma2tool.api import ConversionResult, Verification

_logger = logging.getLogger("gemma2tool")
MORE = "every gate and measurement: -v, or --html report.html"
"""What is not on the screen."""
_RATE_BYTES = 100 << 20
"""Size of a source from which on a rate says something."""


def show_results(results: Sequence[ConversionResult], console: Console, *, verbose: bool) -> None:
    """Show the results of one run: a screen for one output, a table for several; when quiet, a line for each. A failure
    is always shown in full.
    """
    if console.quiet:
        for result in results:
            if result.written:
                console.print(_one_line(result))
                show_warnings(result.verification)
            else:
                _show(result, console)
    elif len(results) == 1 or verbose:
        for result in results:
            _show(result, console, verbose=verbose)
    else:
        _show_table(results, console)


def show_warnings(result: Verification | None) -> None:
    """Show on stderr what a verification that passed warns of, where its screen is left out; not again what was logged
    before.
    """
    for finding in () if result is None else result.findings:
        if finding.severity == "warning":
            _logger.warning("%s", finding.sentence)


def _show(result: ConversionResult, console: Console, *, verbose: bool = False) -> None:
    from gemma2tool.verify.reports.terminal import render_verification

    if result.verification is None:
        console.line(("not verified", "bold yellow"), (": nothing is claimed about the output (--no-verify)", ""))
    else:
        render_verification(result.verification, console, verbose=verbose)
    if not result.written:
        console.item(("output", "bold"), (f"{result.destination}: NOT written, the verification failed", ""))
        return
    console.item(("output", "bold"), (f"{result.destination}: {', '.join(_sizes(result))}", ""))
    if result.norm_tuning is not None:
        console.item(("norms", "bold"), (result.norm_tuning.sentence(), ""))
    console.item(("time", "bold"), (_times([result]), ""))
    _show_next(result, console)


def _show_table(results: Sequence[ConversionResult], console: Console) -> None:
    """The outputs in one table; below it what their gates say, each sentence once, and failures in full."""
    console.table(
        ("", "output", "size#", "bits/weight#", "of source#", "KL#", "same top#"), [_row(result) for result in results]
    )
    warnings: dict[str, list[str]] = {}
    for result in results:
        for finding in result.verification.findings if result.verification and result.written else ():
            if finding.severity == "warning":
                warnings.setdefault(finding.sentence, []).append(result.destination.name)
    for sentence, names in warnings.items():
        where = "" if len(names) == len(results) else f" ({', '.join(names)})"
        console.item(("warning", "yellow"), (sentence + where, ""))
    for result in results:
        if not result.written:
            _show(result, console)
    written = [result for result in results if result.written]
    for result in written:
        if result.norm_tuning is not None:
            console.item(("norms", "bold"), (f"{result.destination.name}: {result.norm_tuning.sentence()}", ""))
    if written:
        console.item(("time", "bold"), (_times(written), ""))
        _show_next(written[0], console)


def _row(result: ConversionResult) -> tuple[str, ...]:
    metrics = _metrics(result)
    kl, top1 = metrics.get("kl_mean"), metrics.get("top1_agreement")
    bits, ratio = _bits_per_weight(result), _ratio(result)
    return (
        _verdict(result),
        str(result.destination),
        human_bytes(result.nbytes),
        "" if bits is None else f"{bits:.2f}",
        "" if ratio is None else f"{ratio:.0%}",
        "" if kl is None else f"{kl:.2g}",
        "" if top1 is None else f"{top1:.1%}",
    )


def _verdict(result: ConversionResult) -> str:
    if result.verification is None:
        return "not verified"
    return "PASSED" if result.written else "FAILED"


def _one_line(result: ConversionResult) -> str:
    parts = [f"{_verdict(result)}: {result.destination}"]
    if result.verification is not None:
        skipped = result.verification.skipped
        parts.append(result.verification.verdict + (f" (not compared: {', '.join(skipped)})" if skipped else ""))
        kl = _metrics(result).get("kl_mean")
        parts += [f"KL {kl:.2g}"] if kl else []
    return "; ".join([*parts, human_bytes(result.nbytes)])


def _metrics(result: ConversionResult) -> Mapping[str, Any]:
    """What the distribution gate measured, if it ran."""
    return {} if result.verification is None else result.verification.metrics("distribution")


def _sizes(result: ConversionResult) -> list[str]:
    sizes = [human_bytes(result.nbytes)]
    bits, ratio = _bits_per_weight(result), _ratio(result)
    if bits is not None and ratio is not None:
        sizes += [f"{bits:.2f} bits per weight", f"{ratio:.0%} of the source"]
    return sizes


def _bits_per_weight(result: ConversionResult) -> float | None:
    return None if result.verification is None else result.verification.candidate.bits_per_weight


def _ratio(result: ConversionResult) -> float | None:
    source_bytes = result.verification.source.nbytes if result.verification is not None else 0
    return result.nbytes / source_bytes if source_bytes else None


def _times(results: Sequence[ConversionResult]) -> str:
    """How long a run took: its outputs are written in one pass, and verified one after another."""
    first, receipts = results[0], [result.receipt.name for result in results if result.receipt is not None]
    times = f"written in {first.seconds:.1f} s"
    if first.source_bytes > _RATE_BYTES:
        times += f" ({first.source_bytes / max(first.seconds, 1e-9) / 1e6:,.0f} MB/s of source)"
    if first.resumed_tensors:
        times += f", {first.resumed_tensors} of {first.tensors} tensors by an earlier run"
    verifications = [result.verification for result in results if result.verification is not None]
    if verifications:
        times += f", verified in {sum(sum(one.seconds.values()) for one in verifications):.1f} s"
    if receipts:
        times += f"; receipt {receipts[0]}" if len(receipts) == 1 else f"; {len(receipts)} receipts beside the outputs"
    return times


def _show_next(result: ConversionResult, console: Console) -> None:
    """What people usually type next."""
    if result.run_command:
        console.command("next", result.run_command)
