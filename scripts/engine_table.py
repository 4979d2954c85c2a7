"""Make docs/engines.md's table: the trained fixture in every format and type that an engine loads, each verified with
``verify --engine``.

    python scripts/engine_table.py             # writes the table into docs/engines.md
    python scripts/engine_table.py --print     # prints it
    python scripts/engine_table.py --only keras-hub,nf4  # these engines, formats or types; other rows are kept

Takes some minutes, of which most would be imports: engines run in forks of this process, which imports torch and
transformers once. The rows of engines that are not installed are kept, as are those of types whose library is not:
install GPTQModel for GPTQ and AWQ (tests/gptqmodel.txt).
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers  # noqa: F401  for the forks

import gemma2tool
from gemma2tool.engines import run
from gemma2tool.engines.messages import Message, Unable, sentence
from gemma2tool.engines.run import engine_for
from gemma2tool.errors import ToolError, UsageError
from gemma2tool.formats.option_info import FOLDERS_QUANTIZED
from gemma2tool.pipeline import engines
from gemma2tool.quantizers.mixtures import FILE_TYPES, FLOATS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "engines.md"
FIXTURE = ROOT / "fixtures" / "tiny-gemma2"
TOKENS = 72
"""Past the fixture's sliding window of 64."""

MIXED = "w4a16 + w8a16"
"""Attention in one of compressed-tensors' types, the rest in another."""
BEGIN, END = "<!-- table: scripts/engine_table.py -->", "<!-- end of table -->"
COLUMNS = (
    *("engine", "format", "type", "logits: KL", "largest difference", "same likeliest token", "generated", "tokens"),
    *("template", "stops", "verdict"),
)
HEADER = f"| {' | '.join(COLUMNS)} |"
SEPARATOR = "|---|---|---|---:|---:|---:|---:|---|---|---|---|"
SHORT = {"passed": "same", "reported": "warning", "failed": "differs"}


class Fork:
    """Takes the place of ``engines.process.Witness``."""

    def __init__(self, module: str, request: Mapping[str, Any], limits: object, threads: int = 1) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_answer, args=(module, request, sender))
        self._process.start()
        sender.close()

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.join()

    def answer(self) -> tuple[list[Message], str | None]:
        messages: list[Message] = []
        with closing(self._receiver) as receiver:
            try:
                while (message := receiver.recv()) is not None:
                    messages.append(message)
            except EOFError:
                return messages, "died"
        broken = [message.content["message"] for message in messages if message.content["kind"] == "broken"]
        return messages, f"broke off: {broken[0]}" if broken else None


def _answer(module: str, request: Mapping[str, Any], sender: Connection) -> None:
    """In the fork: what ``messages.serve`` does."""
    try:
        for message in importlib.import_module(module).answer(request):
            sender.send(message)
    except Unable as error:
        sender.send(Message({"kind": "unable", "message": str(error)}))
    except Exception as error:
        sender.send(Message({"kind": "broken", "message": sentence(error)}))
    sender.send(None)


def pairs() -> Iterator[tuple[str, str, str]]:
    """Engine, format, type."""
    floats = ("f32", "f16", "bf16")
    yield from (("llama.cpp", "gguf", type_name) for type_name in FILE_TYPES)
    folders = [name for name in FOLDERS_QUANTIZED if not name.startswith("mlx-")]
    yield from (("transformers", format_name, dtype) for dtype in floats for format_name in ("hf", "hf-bin"))
    yield from (("transformers", "hf", type_name) for type_name in (*folders, MIXED))
    yield from (("mlx-lm", format_name, dtype) for dtype in floats for format_name in ("mlx", "hf"))
    yield from (("mlx-lm", "mlx", type_name) for type_name in FOLDERS_QUANTIZED if type_name.startswith("mlx-"))
    yield from (("mlx-lm", "hf", type_name) for type_name in (*folders, MIXED))
    for dtype in ("f32", "bf16"):
        yield "keras-hub", "keras", dtype
    for dtype in ("f32", "bf16"):
        yield "gemma", "flax", dtype


def write(folder: Path, format_name: str, type_name: str) -> Path:
    """The fixture in a format and type, written once."""
    path = folder / f"{format_name}-{type_name.replace(' ', '')}{'.gguf' if format_name == 'gguf' else ''}"
    if path.exists():
        return path
    source = FIXTURE / "model.ckpt"
    if type_name in FLOATS:
        gemma2tool.convert(source, path, to=format_name, dtype=type_name, verify=False)
    elif type_name == MIXED:
        first, second = MIXED.split(" + ")
        packing = gemma2tool.PackingOptions(module_types=(("self_attn", second),))
        gemma2tool.quantize(source, path, to=format_name, type=first, packing=packing, verify=False)
    else:
        gguf = gemma2tool.GGUFOptions(imatrix=matrix(folder) if format_name == "gguf" else None)
        gemma2tool.quantize(source, path, to=format_name, type=type_name, gguf=gguf, verify=False)
    return path


def matrix(folder: Path) -> Path:
    """An importance matrix, without which some types cannot be written."""
    path = folder / "imatrix.gguf"
    if not path.exists():
        text = folder / "text.txt"
        text.write_text((FIXTURE / "heldout.txt").read_text()[:3_000])
        gemma2tool.imatrix(FIXTURE / "model.ckpt", path, text=text)
    return path


def row(engine: str, format_name: str, type_name: str, folder: Path) -> str | None:
    """A line of the table; None if the engine lacks a library for the type."""
    start = f"| {engine} | {format_name} | {type_name} |"
    nothing = " |" * (len(COLUMNS) - 4)
    try:
        result = gemma2tool.verify(
            write(folder, format_name, type_name), engines=[engine], tokens=folder / "ids.npy", threads=1
        )
    except ToolError as error:
        return f"{start}{nothing} {error.message} |"
    gates = {gate.name.removeprefix(f"{engine} "): gate for gate in result.gates}
    loading = gates["loading"]
    if loading.status == "skipped":
        print(f"{start} {loading.summary}", file=sys.stderr)
        return None
    if "distribution" not in gates:
        return f"{start}{nothing} {loading.summary.replace('|', '/')[:200]} |"
    metrics = {**gates["logits"].metrics, **gates["distribution"].metrics}
    words = [SHORT[gates[name].status] if name in gates else "not stated" for name in ("tokens", "template", "stops")]
    counts = gates["continuation"].metrics if "continuation" in gates else {}
    generated = f"{counts['same']} of {counts['tokens']}" if counts else ""
    verdict = next((gate.summary for gate in result.gates if gate.failed), "passed")
    return (
        f"{start} {metrics['kl_mean']:.1e} | {metrics.get('max_abs_difference', np.nan):.1e} |"
        f" {metrics['top1_agreement']:.1%} | {generated} |"
        f" {' | '.join(words)} | {verdict.replace('|', '/')[:200]} |"
    )


def rows_of(text: str) -> dict[tuple[str, ...], str]:
    """The rows of the page's table, by engine, format and type."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    return {tuple(key): line for key, line in zip(cells, lines, strict=True) if len(key) == 3}


def save(text: str, rows: dict[tuple[str, ...], str]) -> str:
    """The page with these rows."""
    table = "\n".join([HEADER, SEPARATOR, *(rows[pair] for pair in pairs() if pair in rows)])
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(words: list[str]) -> None:
    """Write or print the table."""
    only = words[words.index("--only") + 1].split(",") if "--only" in words else []
    torch.set_num_threads(1)  # threads do not survive a fork
    run.Witness = Fork  # type: ignore[assignment, misc]
    engines.THOROUGH_PARAMETERS = 0  # mistakes are looked for where a limit is exceeded
    text = PAGE.read_text()
    rows = rows_of(text)
    try:
        add_rows(rows, only)
    finally:  # those that are there when it is interrupted, too
        page = save(text, rows)
        if "--print" in words:
            print(page.partition(BEGIN)[2].partition(END)[0].strip())
        else:
            PAGE.write_text(page)


def add_rows(rows: dict[tuple[str, ...], str], only: list[str]) -> None:
    """Add the rows that are asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "ids.npy", np.load(FIXTURE / "heldout.npy")[0, :TOKENS].astype(np.int64))
        for engine, format_name, type_name in pairs():
            if only and not {engine, format_name, type_name} & set(only):
                continue
            try:
                engine_for(engine, format_name)
            except UsageError as error:
                print(error.message, file=sys.stderr)
                continue
            if line := row(engine, format_name, type_name, folder):
                rows[engine, format_name, type_name] = line
                print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
