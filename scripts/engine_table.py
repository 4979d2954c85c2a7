"""Make docs/engines.md's table: the trained fixture in every format and type that an engine loads, each verified with
``verify --engine``.

    python scripts/engine_table.py             # writes the table into docs/engines.md
    python scripts/engine_table.py --print     # prints it
    python scripts/engine_table.py --only keras-hub,nf4  # these engines, formats or types; other rows are kept

Takes some minutes. The rows of engines that are not installed are kept.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import gemma2tool
from gemma2tool.engines.run import ENGINES, engine_for
from gemma2tool.errors import ToolError, UsageError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "engines.md"
FIXTURE = ROOT / "fixtures" / "tiny-gemma2"
TOKENS = 72
"""Past the fixture's sliding window of 64."""

GGUF = [
    *("q8_0", "q6_k", "q5_k_m", "q5_0", "q5_1", "q4_k_m", "q4_0", "q4_1", "q3_k_m", "q2_k"),
    *("iq4_nl", "iq4_xs", "iq3_s", "tq1_0", "tq2_0", "mxfp4_moe", "mxfp4", "nvfp4", "q1_0", "q2_0"),
]
FOLDERS = ["nf4", "fp4", "int8", "w4a16", "w8a16", "w8a8-int8", "fp8-dynamic", "fp8-block", "torchao-int8"]

MLX = ["mlx-8", "mlx-6", "mlx-5", "mlx-4", "mlx-3", "mlx-2", "mlx-mxfp8", "mlx-mxfp4", "mlx-nvfp4"]

BEGIN, END = "<!-- table: scripts/engine_table.py -->", "<!-- end of table -->"
HEADER = (
    "| engine | format | type | logits: KL | largest difference | same likeliest token | tokens | template | stops |"
)
SEPARATOR = "|---|---|---|---:|---:|---:|---|---|---|"


def pairs() -> Iterator[tuple[str, str, str]]:
    """Engine, format, type."""
    for dtype in ("f32", "f16", "bf16"):
        yield "llama.cpp", "gguf", dtype
    yield from (("llama.cpp", "gguf", type_name) for type_name in GGUF)
    for format_name in ("hf", "hf-bin"):
        yield "transformers", format_name, "bf16"
    yield from (("transformers", "hf", type_name) for type_name in FOLDERS)
    yield "mlx-lm", "mlx", "bf16"
    yield "mlx-lm", "hf", "bf16"
    yield from (("mlx-lm", "mlx", type_name) for type_name in MLX)
    for dtype in ("f32", "bf16"):
        yield "keras-hub", "keras", dtype


def write(folder: Path, format_name: str, type_name: str) -> Path:
    """The fixture in a format and type, written once."""
    path = folder / f"{format_name}-{type_name}{'.gguf' if format_name == 'gguf' else ''}"
    if not path.exists():
        source = FIXTURE / "model.ckpt"
        if type_name in ("f32", "f16", "bf16"):
            gemma2tool.convert(source, path, to=format_name, dtype=type_name, verify=False)
        else:
            gemma2tool.quantize(source, path, to=format_name, type=type_name, verify=False)
    return path


def row(engine: str, format_name: str, type_name: str, folder: Path) -> str:
    """A line of the table."""
    start = f"| {engine} | {format_name} | {type_name} |"
    try:
        result = gemma2tool.verify(
            write(folder, format_name, type_name), engines=[engine], tokens=folder / "ids.npy", threads=2
        )
    except ToolError as error:
        return f"{start} {error.message} | | | | | |"
    gates = {gate.name.removeprefix(f"{engine} "): gate for gate in result.gates}
    if gates["loading"].status != "passed":
        return f"{start} {gates['loading'].status}: {gates['loading'].summary.replace('|', '/')[:160]} | | | | | |"
    metrics = {**gates["logits"].metrics, **gates["distribution"].metrics}
    texts = [gates[name].status if name in gates else "not stated" for name in ("tokens", "template", "stops")]
    words = ["same" if text == "passed" else text for text in texts]
    failed = "" if result.passed else " (failed)"
    return (
        f"{start} {metrics['kl_mean']:.1e}{failed} | {metrics['max_abs_difference']:.1e} |"
        f" {metrics['top1_agreement']:.1%} | {' | '.join(words)} |"
    )


def rows_of(text: str) -> dict[tuple[str, ...], str]:
    """The rows of the page's table, by engine, format and type."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    return {tuple(key): line for key, line in zip(cells, lines, strict=True) if len(key) == 3}


def main(words: list[str]) -> None:
    """Write or print the table."""
    only = words[words.index("--only") + 1].split(",") if "--only" in words else []
    text = PAGE.read_text()
    rows = rows_of(text)
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
            rows[engine, format_name, type_name] = row(engine, format_name, type_name, folder)
            print(rows[engine, format_name, type_name], file=sys.stderr, flush=True)
    table = "\n".join([HEADER, SEPARATOR, *(rows[pair] for pair in pairs() if pair in rows)])
    if "--print" in words:
        print(table)
        return
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    assert set(ENGINES) == {engine for engine, _, _ in pairs()}
    main(sys.argv[1:])
