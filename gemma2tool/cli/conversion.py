"""What ``convert`` and ``quantize`` share: from options to a request, and from its results to the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.outcome import MORE, show_results
from gemma2tool.cli.progress import ProgressDisplay
from gemma2tool.cli.reports import Reports
from gemma2tool.cli.sharding import rank_of_torchrun
from gemma2tool.cli.terminal import Console
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError
from gemma2tool.formats.option_info import parse_size
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_budget import Budget

if TYPE_CHECKING:
    from gemma2tool.api import ConversionRequest, PlanSummary


def carry_out(
    src: str,
    dst: Path,
    output: o.OutputOptions,
    reports: Reports,
    options: WriteOptions,
    types: Sequence[str] = (),
    budget: Budget = Budget(),
) -> None:
    """Carry out one conversion or quantization from the command line."""
    from gemma2tool import api

    rank = rank_of_torchrun()
    console = Console(quiet=output.quiet or rank > 0, json=output.json_output)
    _refuse_unused(output, reports)
    request = replace(_request(src, dst, output, reports, options, types), budget=budget)
    request = replace(request, run=replace(request.run, together=rank >= 0))
    if output.dry_run:
        show_plans(api.plan(request), console, tensors=output.tensors)
        return
    results = api.run(request, progress=ProgressDisplay(console))
    if rank > 0:
        return
    if output.json_output:
        contents = [result.to_json() for result in results]
        console.emit_json(contents[0] if len(contents) == 1 else {"outputs": contents})
    show_results(results, console, verbose=output.verbose)
    if not output.verbose and any(result.verification is not None for result in results):
        console.note(MORE)
    for result in results:
        if result.budget is not None:
            for line in (*result.budget.choice.lines(), result.budget.sentence()):
                console.print(line)
    reports.print_card([result.verification for result in results if result.verification is not None], console)
    if not all(result.written for result in results):
        from gemma2tool.verify.reports.annotations import annotate

        annotate(str(dst), "verification failed", "the output was not written")
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _request(
    src: str, dst: Path, output: o.OutputOptions, reports: Reports, options: WriteOptions, types: Sequence[str]
) -> ConversionRequest:
    from gemma2tool import api

    checks = None
    if not output.no_verify:
        checks = api.Checks(
            tokens=output.tokens,
            text=output.text,
            gates=api.parse_gates(output.gate or ()),
            sample=output.sample or 0,
        )
    return api.ConversionRequest(
        source=src,
        destination=dst,
        types=tuple(types),
        to=output.to,
        options=replace(
            options,
            max_shard_size=parse_size(output.max_shard_size),
            allow_mismatch=output.allow_mismatch,
            adapters=tuple(o.parse_lora(text) for text in output.lora or ()),
        ),
        config=output.config,
        checks=checks,
        run=api.RunOptions(
            force=output.force,
            restart=output.restart,
            keep_download=output.keep_download,
            allow_nonfinite=output.allow_nonfinite,
            clip_f16=output.clip_f16,
            allow_unsafe_template=output.allow_unsafe_template,
            receipt=not output.no_receipt,
            readers=not output.no_readers,
            modelfile=output.modelfile,
            threads=output.threads or api.default_threads(),
            memory=parse_size(output.memory),
            device=output.device,
        ),
        reports=reports.files,
    )


def _refuse_unused(output: o.OutputOptions, reports: Reports) -> None:
    """Refuse options that ``--no-verify`` would ignore: they were given by mistake."""
    if not output.no_verify:
        return
    checks = {"--gate": output.gate, "--tokens": output.tokens, "--text": output.text, "--sample": output.sample}
    given = {**checks, **reports.given}
    for option, value in given.items():
        if value:
            raise UsageError(
                "option.ignored", f"{option} has no effect with --no-verify", hint="leave out one of the two"
            )


def show_plans(plans: Sequence[PlanSummary], console: Console, *, tensors: bool) -> None:
    """Show what would be written."""
    contents = [plan.to_json() for plan in plans]
    if console.json:
        console.emit_json(contents[0] if len(contents) == 1 else {"outputs": contents})
    for number, plan in enumerate(plans):
        if plan.needs is not None and (number == 0 or plan.needs is not plans[number - 1].needs):
            for line in plan.needs.lines():
                console.print(line)
        console.print(f"{plan.destination} ({plan.format}), {plan.nbytes:,} bytes")
        if tensors:
            rows = [(item.name, "x".join(map(str, item.shape)), item.source_type, item.type) for item in plan.tensors]
            console.table(("tensor", "shape", "from", "to"), rows)
        console.table(
            ("type", "tensors#", "bytes#"), [(name, str(count), f"{size:,}") for name, count, size in plan.types]
        )
        files = [(name, f"{size:,}") for name, size in (*plan.files, *plan.assets)]
        if len(files) > 1:
            console.table(("file", "bytes#"), files)
        if plan.budget is not None:
            header, *types = plan.budget.rows()
            console.table(header, types)
            for line in plan.budget.lines():
                console.print(line)
        if plan.cost is not None:
            console.print(plan.cost.sentence())
