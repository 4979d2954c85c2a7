"""Time and memory of calibrated quantization on layers of a released shape, beside llm-compressor on the same layers.

    python benchmarks/calibration_cost.py FOLDER                       # two layers of the 2B, 128 x 512 tokens
    python benchmarks/calibration_cost.py FOLDER --samples 16 --peer ENV/bin/python

A model of a few layers with random weights and a small vocabulary is written to FOLDER, and quantized by each program
in a process of its own: q4_k_m and w4a16 by gemma2tool, w4a16 (GPTQ, groups of 128) by llm-compressor. Prints processor
seconds, peak memory, what the plan says of both, and, from runs with one layer and with all of ``--layers``, the time
of a layer and of all layers of the shape.

llm-compressor needs an environment of its own:

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from processes import HERE, TOOL, Measurement, argument_parser, measure, remove

VOCABULARY = 2048
"""Of the models that are written: the layers are what is measured."""
RUNS: dict[str, tuple[str, ...]] = {
    "q4_k_m": ("--type", "q4_k_m"),
    "q4_k_m, --hessian layer": ("--type", "q4_k_m", "--hessian", "layer"),
    "w4a16": ("--type", "w4a16"),
    "w4a16, textbook": ("--type", "w4a16", "--calibration-method", "textbook"),
}
PEER = "llm-compressor, W4A16"


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default=";".join(RUNS), help="of gemma2tool's, with semicolons")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="of an environment with llm-compressor")
    parser.add_argument("--write", type=int, metavar="LAYERS", help="write the model and nothing else")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.write:
        write_model(folder / f"layers-{arguments.write}", arguments.size, arguments.write)
        return 0
    counts = sorted({1, arguments.layers})
    for count in counts:
        if not (folder / f"layers-{count}").exists():
            command = [sys.executable, __file__, folder, "--size", arguments.size, "--write", str(count)]
            subprocess.run(command, check=True)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (arguments.samples, arguments.length))
    np.save(folder / "ids.npy", ids)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    layers = f"{arguments.layers} layer{'s' if arguments.layers > 1 else ''}"
    print(f"{layers} of the {arguments.size} shape, {arguments.samples} x {arguments.length} tokens")
    print("| program | processor time | a layer | all layers | peak memory | planned |")
    print("|---|---:|---:|---:|---:|---|")
    for name in filter(None, arguments.runs.split(";")):
        options = (*RUNS[name], "--threads", str(arguments.threads), "--calibration-length", str(arguments.length))
        commands = [quantize(folder, count, options) for count in counts]
        print_row(name, arguments.layers, arguments.size, commands, plan=planned(commands[-1]))
    if arguments.peer:
        script = HERE / "calibration_peer.py"
        # -P: transformers imports a library named kernels, which must not be the script beside this one
        commands = [
            (arguments.peer, "-P", script, folder / f"layers-{count}", folder / "ids.npy", folder / "out-peer")
            for count in counts
        ]
        print_row(PEER, arguments.layers, arguments.size, commands)
    return 0


def write_model(path: Path, size: str, layers: int) -> None:
    """A Hugging Face folder of that many layers of a shape, bfloat16."""
    from synthesize import CONFIGS, PoolTensor, random_pool

    from gemma2tool.formats.options import WriteOptions
    from gemma2tool.model.checkpoint import Checkpoint
    from gemma2tool.model.format_facts import FormatFacts
    from gemma2tool.model.tensors import tensor_specs
    from gemma2tool.pipeline.conversion import save

    config = dataclasses.replace(CONFIGS[size], num_hidden_layers=layers, layer_types=(), vocab_size=VOCABULARY)
    pool = random_pool()
    specs = tensor_specs(config).items()
    tensors = {name: PoolTensor(name, spec.shape, pool) for name, spec in specs if spec.required}
    save(Checkpoint(Path("random"), FormatFacts("random"), config, tensors), path, WriteOptions(), to="hf")


def quantize(folder: Path, layers: int, options: Sequence[str]) -> tuple[str | Path, ...]:
    """The command; its output replaces an earlier one."""
    out = folder / ("out.gguf" if "q4_k_m" in options else "out")
    remove(out)
    model, text = folder / f"layers-{layers}", folder / "ids.npy"
    return (*TOOL, "quantize", model, out, "--calibration", text, "--no-verify", "--force", *options)


def planned(command: Sequence[str | Path]) -> str:
    """What the plan says of time and memory."""
    result = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    plan = json.loads(result.stdout)
    cost = next(value for value in values(plan) if isinstance(value, dict) and "estimated_seconds" in value)
    return f"{cost['estimated_seconds']:.0f} s, {cost['estimated_peak_bytes'] / 2**30:.1f} GiB"


def values(document: object) -> list[object]:
    """A JSON value and all that it holds."""
    inner = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return [document, *(value for part in inner for value in values(part))]


def print_row(name: str, layers: int, size: str, commands: Sequence[Sequence[str | Path]], plan: str = "") -> None:
    """The measurements of the commands, the first with one layer and the last with ``layers``."""
    from gemma2tool.model.config import SIZES as CONFIGS

    measured = [checked(command) for command in commands]
    first, last = measured[0], measured[-1]
    cells = [f"{last.processor_seconds:.0f} s", "", ""]
    if layers > 1:
        layer = (last.processor_seconds - first.processor_seconds) / (layers - 1)
        cells[1] = f"{layer:.1f} s"
        if size in CONFIGS:
            whole = first.processor_seconds + layer * (CONFIGS[size].num_hidden_layers - 1)
            cells[2] = f"{whole / 60:.0f} min"
    print(f"| {name} | {' | '.join(cells)} | {last.peak_bytes / 2**30:.2f} GiB | {plan} |", flush=True)


def checked(command: Sequence[str | Path]) -> Measurement:
    """What a command cost. Raises ``RuntimeError`` if it failed."""
    measurement = measure(command)
    if measurement.exit_code:
        raise RuntimeError(f"exit code {measurement.exit_code}: {' '.join(map(str, command))}")
    return measurement


if __name__ == "__main__":
    sys.exit(main())
