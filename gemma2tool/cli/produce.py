"""What ``convert`` and ``quantize`` share: open, plan, write, verify, report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2tool.cli import options as o
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, UsageError

if TYPE_CHECKING:
    from gemma2tool.console import Console
    from gemma2tool.pipeline.plan import Plan

FLOAT_DTYPES = ("f32", "f16", "bf16")
GGUF_DTYPES = (*FLOAT_DTYPES, "auto", "q8_0", "tq1_0", "tq2_0")


def produce(
    src: Path,
    dst: Path,
    *,
    to: str | None,
    dtype: str | None,
    type: str | None,
    extra: Mapping[str, object],
    config: Path | None,
    force: bool,
    no_verify: bool,
    tokens: Path | None,
    gate: Sequence[str] | None,
    max_shard_size: str,
    allow_nonfinite: bool,
    allow_mismatch: bool,
    threads: int | None,
    memory: str,
    dry_run: bool,
    quiet: bool,
    json_output: bool,
) -> None:
    """Carry out one conversion or quantization from the command line."""
    from gemma2tool.console import Console
    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions
    from gemma2tool.pipeline.evaluate import read_tokens
    from gemma2tool.pipeline.plan import make_plan
    from gemma2tool.pipeline.run import Checks, run
    from gemma2tool.verify.gates import parse_gates

    console = Console(quiet=quiet, json=json_output)
    target = registry.for_destination(dst, to)
    _check_dtype(dtype, target)
    options = WriteOptions(
        dtype=dtype,
        type=type,
        max_shard_size=o.parse_size(max_shard_size),
        name=dst.name,
        extra={**extra, "allow_mismatch": allow_mismatch, "single_file": dst.suffix.lower() in (".ckpt", ".gguf")},
    )
    budget = o.parse_size(memory)
    gates = parse_gates(gate or ())
    with registry.open_checkpoint(src, config=o.load_config(config)) as source:
        plan = make_plan(source, dst, to=to, options=options)
        _remarks(plan, console)
        if dry_run:
            _show_plan(plan, console, json_output)
            return
        checks = None
        if not no_verify:
            checks = Checks(read_tokens(tokens, source.config) if tokens else None, gates)
        result = run(
            plan,
            checks,
            force=force,
            threads=threads or o.default_threads(),
            memory=budget,
            allow_nonfinite=allow_nonfinite,
            console=console,
        )
    if json_output:
        console.emit_json(result.to_json())
    else:
        if result.verification is not None:
            console.verification(result.verification)
        console.print(result.sentence())
    if result.verification is not None and not result.verification.passed:
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _check_dtype(dtype: str | None, target: str) -> None:
    allowed = GGUF_DTYPES if target == "gguf" else FLOAT_DTYPES + ("auto",)
    if dtype is not None and dtype not in allowed:
        raise UsageError(
            "option.dtype",
            f"--dtype {dtype} is not a stored type of {target}",
            hint=f"choose one of {', '.join(allowed)}",
        )


def _remarks(plan: Plan, console: Console) -> None:
    source = plan.source
    for warning in (*source.warnings, *source.config.warnings, *plan.output.warnings):
        console.warn(warning)
    for line in loss_lines(plan.output.losses):
        console.warn(f"{plan.output.format} stores w + 1 of a norm w: {line}")


def loss_lines(losses: Sequence[tuple[str, float]]) -> list[str]:
    """The tensors that lose low bits, a line for each kind: ``model.layers.{0-3,7}.input_layernorm.weight loses up to 3e-08``."""
    layers: dict[str, list[int]] = {}
    largest: dict[str, float] = {}
    for name, loss in losses:
        pattern = re.sub(r"(?<=\.layers\.)\d+", "{}", name)
        layers.setdefault(pattern, []).extend(int(number) for number in re.findall(r"\.layers\.(\d+)\.", name))
        largest[pattern] = max(loss, largest.get(pattern, 0.0))
    return [
        f"{pattern.replace('{}', '{' + _ranges(sorted(layers[pattern])) + '}')} loses up to {loss:.3g}"
        for pattern, loss in largest.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _show_plan(plan: Plan, console: Console, json_output: bool) -> None:
    if json_output:
        console.emit_json(plan.to_json())
        return
    rows = [
        (item.name, "x".join(map(str, item.source.shape)), item.source.stored, item.encoder.name)
        for item in plan.output.tensors
    ]
    console.table(("tensor", "shape", "from", "to"), rows)
    console.table(("type", "tensors", "bytes"), [(name, str(count), f"{size:,}") for name, count, size in plan.types()])
    files = [(file.name, f"{file.size:,}") for file in plan.output.files]
    files += [(name, f"{len(data):,}") for name, data in sorted(plan.output.assets.items())]
    console.table(("file", "bytes"), files)
