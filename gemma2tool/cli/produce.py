"""What ``convert`` and ``quantize`` share: open, plan, write, verify, report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import typer

from gemma2tool.cli import options as o
from gemma2tool.cli.reports import Reports
from gemma2tool.errors import EXIT_VERIFICATION_FAILED, InputRefused, UsageError

if TYPE_CHECKING:
    from gemma2tool.cli.terminal import Console
    from gemma2tool.pipeline.plan import Plan

FILE_SUFFIXES = (".ckpt", ".gguf", ".sbs")
FLOAT_DTYPES = ("f32", "f16", "bf16")
GGUF_DTYPES = (*FLOAT_DTYPES, "auto", "q8_0", "tq1_0", "tq2_0")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a user may ask of ``convert`` and ``quantize`` alike; the fields are the options, see ``groups``."""

    to: o.To = None
    config: o.ConfigFile = None
    lora: o.Lora = None
    force: o.Force = False
    no_verify: o.NoVerify = False
    no_receipt: o.NoReceipt = False
    tokens: o.Tokens = None
    text: o.Text = None
    gate: o.Gate = None
    max_shard_size: o.MaxShardSize = "50GB"
    split_max_size: o.SplitMaxSize = None
    split_max_tensors: o.SplitMaxTensors = None
    allow_nonfinite: o.AllowNonfinite = False
    clip_f16: o.ClipFloat16 = False
    allow_mismatch: o.AllowMismatch = False
    restart: o.Restart = False
    threads: o.Threads = None
    memory: o.Memory = "256MiB"
    dry_run: o.DryRun = False
    quiet: o.Quiet = False
    json_output: o.Json = False


def produce(
    src: Path,
    dst: Path,
    shared: Shared,
    reports: Reports,
    *,
    dtype: str | None,
    type: str | None = None,
    extra: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Carry out one conversion or quantization from the command line."""
    from gemma2tool.cli.terminal import Console
    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions
    from gemma2tool.formats.lora import merge
    from gemma2tool.pipeline.evaluate import read_prompts
    from gemma2tool.pipeline.plan import make_plan
    from gemma2tool.pipeline.plan import shared as one_pass
    from gemma2tool.pipeline.run import Checks, run
    from gemma2tool.storage.paths import refuse_existing, refuse_same
    from gemma2tool.storage.staging import place as staging_place
    from gemma2tool.verify.gates import parse_gates
    from gemma2tool.verify.reports.terminal import render_verification

    console = Console(quiet=shared.quiet, json=shared.json_output)
    splits = {
        "split_max_size": o.optional_size(shared.split_max_size),
        "split_max_tensors": shared.split_max_tensors,
    }
    extra = {**extra, **splits, "allow_mismatch": shared.allow_mismatch, "lora": tuple(shared.lora or ())}
    to = shared.to
    if dst.suffix.lower() == ".gguf" and any(splits.values()):
        dst, to = dst.with_suffix(""), "gguf"
        console.note(f"{dst}: a folder for the files of the split")
    wanted = _destinations(dst, to, type)
    _check_parent(dst)
    _check_unused(shared, reports)
    for path, format_name, name in wanted:
        _check_dtype(dtype, format_name)
        _check_type(name, format_name, extra)
        if not staging_place.exists(path):  # else what is staged decides
            refuse_existing(path, force=shared.force, folder=path.suffix.lower() not in FILE_SUFFIXES)
        refuse_same(
            [each for each in (shared.config, shared.tokens, shared.text, *extra.values()) if _is_file(each)], path
        )
        _refuse_strangers(path)
    shard_size = o.parse_size(shared.max_shard_size)
    budget = o.parse_size(shared.memory)
    threads = shared.threads or o.default_threads()
    gates = parse_gates(shared.gate or ())
    adapters = [o.parse_lora(text) for text in shared.lora or ()]
    with registry.open_checkpoint(src, config=o.load_config(shared.config)) as source:
        for adapter, scale in adapters:
            source = merge(source, adapter, scale)
        read = source if len(wanted) == 1 else one_pass(source)
        plans = []
        for path, format_name, name in wanted:
            single = path.suffix.lower() in FILE_SUFFIXES
            options = WriteOptions(
                dtype=dtype,
                type=name,
                max_shard_size=shard_size,
                name=path.name,
                extra={**extra, "single_file": single},
            )
            plan = make_plan(read, path, to=format_name, options=options, threads=threads)
            plans.append(replace(plan, source=source))
        reports.check((*source.files, *(path for plan in plans for path in _written(plan))))
        _remarks(plans, console)
        if shared.dry_run:
            _show_plans(plans, console, shared.json_output)
            return
        for plan in plans:
            if plan.cost is not None:
                console.note(plan.cost.sentence())
        checks = None
        if not shared.no_verify:
            checks = Checks(read_prompts(shared.tokens, shared.text, source), gates)
        with _folder_of_several([path for path, _, _ in wanted]):
            results = run(
                plans,
                checks,
                force=shared.force,
                threads=threads,
                memory=budget,
                allow_nonfinite=shared.allow_nonfinite,
                clip_float16=shared.clip_f16,
                restart=shared.restart,
                receipt=not shared.no_receipt,
                console=console,
            )
    if shared.json_output:
        content = [result.to_json() for result in results]
        console.emit_json(content[0] if len(content) == 1 else {"outputs": content})
    for result in results:
        if result.verification is not None:
            render_verification(result.verification, console)
        console.print(result.sentence())
    reports.write([result.verification for result in results if result.verification is not None], console)
    if not all(result.written for result in results):
        raise typer.Exit(EXIT_VERIFICATION_FAILED)


def _check_parent(dst: Path) -> None:
    if not dst.absolute().parent.is_dir():
        hint = f"create it first: mkdir -p {shlex.quote(str(dst.parent))}"
        raise UsageError("output.no-parent", f"{dst.parent}: no such folder", hint=hint)


def _check_unused(shared: Shared, reports: Reports) -> None:
    """Refuse what would change nothing: it is a mistake, or a name misremembered."""
    if not shared.no_verify:
        return
    given = {"--gate": shared.gate, "--tokens": shared.tokens, "--text": shared.text, **reports.asked}
    for option, value in given.items():
        if value:
            raise UsageError(
                "option.ignored", f"{option} means nothing with --no-verify", hint="leave out one of the two"
            )


def _refuse_strangers(destination: Path) -> None:
    """``--force`` replaces checkpoints; a folder of anything else is somebody's, and not to be lost by a slip."""
    from gemma2tool.formats import registry

    if not destination.is_dir() or not any(destination.iterdir()):
        return
    try:
        registry.detect(destination)
    except InputRefused:
        raise UsageError(
            "output.not-a-checkpoint",
            f"{destination}: a folder that holds no checkpoint is not replaced, even with --force",
            hint="choose another name, or remove it yourself",
        ) from None


def _is_file(value: object) -> bool:
    return isinstance(value, Path) and value.exists()


@contextmanager
def _folder_of_several(destinations: Sequence[Path]) -> Iterator[None]:
    """The folder that several outputs go into; one that was made for them goes again where nothing came of it."""
    from gemma2tool.storage.staging import place as staging_place
    from gemma2tool.storage.syscalls import told

    if len(destinations) == 1:
        yield
        return
    folder = destinations[0].parent
    ours = not folder.exists() or any(staging_place.exists(path) for path in destinations)
    with told(folder, "creating the folder"):
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            _check_parent(folder)
            raise
    try:
        yield
    finally:
        if ours:
            with suppress(OSError):  # only an empty one goes
                folder.rmdir()


def _written(plan: Plan) -> list[Path]:
    """The output, the files that a folder will have, and the receipt."""
    from gemma2tool.receipt.document import receipt_path

    inside = () if plan.output.single_file else (*(file.name for file in plan.output.files), *plan.output.assets)
    return [plan.destination, receipt_path(plan.destination), *(plan.destination / name for name in inside)]


def _destinations(dst: Path, to: str | None, types: str | None) -> list[tuple[Path, str, str | None]]:
    """(path, format, type) of each output: DST itself, or, for several types, ``DST/NAME-TYPE.gguf`` and folders ``DST/NAME-TYPE``."""
    from gemma2tool.formats import packings, registry

    names = list(dict.fromkeys(name.strip() for name in (types or "").split(",") if name.strip()))
    if types is not None and not names:
        raise UsageError("type.missing", "--type names no type", hint="'gemma2tool formats' lists them")
    if len(names) <= 1:
        name = names[0] if names else None
        return [(dst, registry.for_destination(dst, to, name), name)]
    if dst.suffix.lower() in FILE_SUFFIXES or (dst.exists() and not dst.is_dir()):
        raise UsageError(
            "output.kind", f"{dst}: several types need a folder to put their files into", hint="name a folder as DST"
        )
    found = []
    for name in names:
        format_name = registry.for_destination(dst, to, name) if to or name in packings.TYPES else "gguf"
        suffix = ".gguf" if format_name == "gguf" else ""
        found.append((dst / f"{dst.resolve().name}-{name}{suffix}", format_name, name))
    return found


def _check_dtype(dtype: str | None, target: str) -> None:
    from gemma2tool.formats import registry

    floats = next(each.floats for each in registry.LISTINGS if each.name == target)
    allowed = GGUF_DTYPES if target == "gguf" else (*floats, "auto")
    if dtype is None or dtype in allowed:
        return
    hint = f"choose one of {', '.join(allowed)}"
    if target == "gemma-cpp" and dtype == "sfp":
        hint += "; sfp is a quantization: 'gemma2tool quantize --type sfp'"
    raise UsageError("option.dtype", f"--dtype {dtype} is not a stored type of {target}", hint=hint)


GGUF_OPTIONS = (
    "imatrix",
    "pure",
    "token_embedding_type",
    "output_tensor_type",
    "tensor_types",
    "include_weights",
    "exclude_weights",
    "override_kv",
    "split_max_size",
    "split_max_tensors",
)
FOLDERS = ("hf", "mlx")
FOLDER_OPTIONS = ("double_quant", "group_size", "symmetric", "gptq_format", "skip", "only")


def _check_type(name: str | None, target: str, extra: Mapping[str, object]) -> None:
    """Refuse a type that belongs elsewhere, and options that the target would ignore."""
    from gemma2tool.formats import packings
    from gemma2tool.formats.packings.settings import TYPES_WITH, listed_types
    from gemma2tool.quantizers.mixtures import FILE_TYPES

    if target != "gguf" and name in FLOAT_DTYPES:
        raise UsageError(
            "type.unknown", f"{name} is no quantization of {target}", hint=f"use 'gemma2tool convert --dtype {name}'"
        )
    if target != "gguf" and name in FILE_TYPES:
        raise UsageError("type.unknown", f"{name} is a type of GGUF, the output is {target}", hint="name it NAME.gguf")
    if target != "gguf":
        for option in GGUF_OPTIONS:
            if extra.get(option):
                flag = "--" + option.replace("_", "-").removesuffix("s" if option == "tensor_types" else "")
                raise UsageError("option.ignored", f"{flag} means nothing for {target}", hint="it is for GGUF outputs")
    if target in FOLDERS and name is not None:
        packings.Settings.of(name, extra)
        return
    for option in FOLDER_OPTIONS:
        given = extra.get(option)
        if given or (option == "symmetric" and given is not None):
            flag = "--sym/--asym" if option == "symmetric" else "--" + option.replace("_", "-")
            takers = listed_types(option) if option in TYPES_WITH else "all types"
            raise UsageError(
                "option.ignored", f"{flag} means nothing for {target}", hint=f"it is for {takers} of quantized folders"
            )


def _remarks(plans: Sequence[Plan], console: Console) -> None:
    source = plans[0].source
    remarks = [*source.warnings, *source.config.warnings]
    for plan in plans:
        remarks += plan.output.warnings
        remarks += [] if plan.cost is None else plan.cost.remarks()
        remarks += [f"{plan.output.format} stores w + 1 of a norm w: {line}" for line in loss_lines(plan.output.losses)]
    for remark in dict.fromkeys(remarks):
        console.warn(remark)


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


def _show_plans(plans: Sequence[Plan], console: Console, json_output: bool) -> None:
    if json_output:
        content = [plan.to_json() for plan in plans]
        console.emit_json(content[0] if len(content) == 1 else {"outputs": content})
    for plan in plans:
        _show_plan(plan, console)


def _show_plan(plan: Plan, console: Console) -> None:
    console.print(f"{plan.destination} ({plan.output.format}), {plan.output.nbytes:,} bytes")
    rows = [
        (item.name, "x".join(map(str, item.source.shape)), item.source.stored, item.encoder.name)
        for item in plan.output.tensors
    ]
    console.table(("tensor", "shape", "from", "to"), rows)
    console.table(("type", "tensors", "bytes"), [(name, str(count), f"{size:,}") for name, count, size in plan.types()])
    files = [(file.name, f"{file.size:,}") for file in plan.output.files]
    files += [(name, f"{len(data):,}") for name, data in sorted(plan.output.assets.items())]
    console.table(("file", "bytes"), files)
    if plan.cost is not None:
        console.print(plan.cost.sentence())
