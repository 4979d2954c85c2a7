"""What was tried and is not in gemma2tool: calibrated GGUF types with one thing changed, their KL beside the default's.

    python benchmarks/freedoms.py q3_k_s
    python benchmarks/freedoms.py q4_k_m --changes channels,rotation --samples 64

A source that computes the same with other values (the freedoms of Gemma 2 that cost nothing):

- channels: intermediate channels sorted by the mean square of down_proj's inputs, the largest first
- importance: down_proj's columns times the mean square to the power 0.25, up_proj's rows divided by it
- flat: down_proj's columns scaled to one RMS, up_proj's rows divided
- rotation: v_proj's rows and o_proj's columns rotated per key-value head, by a Hadamard matrix with random signs

And, with the processor time of the run and the part of it that a file of Hessians would save:

- collected: Hessians of the unquantized model's inputs, which are the same for every type
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from processes import argument_parser
from quality import FIXTURE, Run, ratio
from saved_hessians import write_with_collected

from gemma2tool.formats import registry
from gemma2tool.formats.gguf.imatrix import read_imatrix
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import ArrayTensor

Floats = NDArray[np.float64]
Layer = dict[str, Floats]
UP, GATE, DOWN = (f"mlp.{name}_proj.weight" for name in ("up", "gate", "down"))
VALUE, OUTPUT = (f"self_attn.{name}_proj.weight" for name in "vo")


def channels(layer: Layer, squares: Floats, head_dim: int) -> Layer:
    order = np.argsort(-squares, kind="stable")
    return {GATE: layer[GATE][order], UP: layer[UP][order], DOWN: layer[DOWN][:, order]}


def importance(layer: Layer, squares: Floats, head_dim: int) -> Layer:
    return _scaled(layer, (squares / _typical(squares)).clip(1e-3, 1e3) ** 0.25)


def flat(layer: Layer, squares: Floats, head_dim: int) -> Layer:
    rms = np.sqrt((layer[DOWN] ** 2).mean(0))
    return _scaled(layer, _typical(rms) / rms)


def rotation(layer: Layer, squares: Floats, head_dim: int) -> Layer:
    matrix = np.ones((1, 1))
    while len(matrix) < head_dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    matrix = matrix * np.random.default_rng(0).choice([-1.0, 1.0], head_dim)
    value, output = layer[VALUE], layer[OUTPUT]
    heads = value.reshape(-1, head_dim, value.shape[1])
    columns = output.reshape(len(output), -1, head_dim)
    return {VALUE: (matrix @ heads).reshape(value.shape), OUTPUT: (columns @ matrix.T).reshape(output.shape)}


CHANGES: dict[str, Callable[[Layer, Floats, int], Layer]] = {
    "channels": channels,
    "importance": importance,
    "flat": flat,
    "rotation": rotation,
}
COLLECTED = "collected"


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("types", help="GGUF types, with commas")
    parser.add_argument("--changes", default=",".join((*CHANGES, COLLECTED)))
    parser.add_argument("--model", type=Path, default=FIXTURE, help="a folder with model.ckpt and heldout.npy")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--every", type=int, default=3, help="use every N-th held-out window")
    arguments = parser.parse_args()
    ids = np.load(arguments.model / "heldout.npy").astype(np.int64)[:: arguments.every]
    print("| type | change | KL | ratio, 95 % interval |\n|---|---|---:|---|")
    with registry.open_checkpoint(arguments.model / "model.ckpt") as source, tempfile.TemporaryDirectory() as folder:
        run = Run(source, Path(folder), ids, arguments.samples)
        for type in arguments.types.split(","):
            first = run.window_kl(run.write_calibrated(type))
            print(f"| {type} | none | {first.mean():.5f} | |", flush=True)
            for name in arguments.changes.split(","):
                if name == COLLECTED:
                    path, seconds, saved = write_with_collected(run, type)
                    name = f"{name}: {seconds:.0f} s, {saved:.0f} s of them saved"
                else:
                    path = replace(run, source=changed_source(run, CHANGES[name])).write_calibrated(type)
                kl = run.window_kl(path)
                print(f"| {type} | {name} | {kl.mean():.5f} | {ratio(first, kl)} |", flush=True)
    return 0


def changed_source(run: Run, change: Callable[[Layer, Floats, int], Layer]) -> Checkpoint:
    """The source with each layer changed."""
    source, matrix = run.source, read_imatrix(run.importance_matrix)
    config, tensors = source.config, dict(source.tensors)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = {name: tensors[prefix + name].load().astype(np.float64) for name in (GATE, UP, DOWN, VALUE, OUTPUT)}
        squares = matrix.column_weights(f"blk.{index}.ffn_down.weight", config.intermediate_size, "Q4_K")
        for name, values in change(layer, np.asarray(squares, np.float64), config.head_dim).items():
            tensors[prefix + name] = ArrayTensor(values.astype(np.float32))
    return replace(source, tensors=tensors, closers=[])


def _scaled(layer: Layer, scales: Floats) -> Layer:
    return {UP: layer[UP] / scales[:, None], DOWN: layer[DOWN] * scales}


def _typical(values: Floats) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(values + 1e-12).mean()))


if __name__ == "__main__":
    raise SystemExit(main())
