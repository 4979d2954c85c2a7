"""Everything beside its peers, in one run on one machine: ratios with their median and range, memory from 2B to 27B.

    python benchmarks/summary.py /tmp/bench                       # 2B shape: 25 GB of disk, 15 GB of memory, an hour
    python benchmarks/summary.py /tmp/bench --only kernels,memory
    python benchmarks/summary.py /tmp/bench --plots docs          # and docs/benchmarks-*.svg

Groups: kernels (ggml, bitsandbytes, compressed-tensors, mlx), commands (cp, transformers, transformers with
bitsandbytes), memory (the shapes of 2B, 9B and 27B, from sparse files). Both sides run in turn,
--repeats times; a ratio is the peer's cost over gemma2tool's in one turn: above 1, gemma2tool is faster. Kernels are
timed by processor time on one thread, commands by wall time. A peer that is not installed is left out, with a word.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import HERE, TOOL, Measurement, argument_parser, fill_page_cache, measure, remove, synthesize

GROUPS = ("kernels", "commands", "memory")
GGUF_KERNELS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS")
FOLDER_KERNELS = ("nf4", "int8", "w4a16", "mlx-4")


@dataclass(frozen=True)
class Row:
    """What was compared, with what, and the ratio in each turn; ``memory``: the peaks of both sides in MiB."""

    name: str
    peer: str
    ratios: Sequence[float]
    memory: tuple[float, float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def markdown(self) -> str:
        ours, theirs = (f"{peak:,.0f}" for peak in self.memory) if self.memory else ("", "")
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}" if len(self.ratios) > 1 else ""
        return f"| {self.name} | {self.peer} | {self.median:.2f} | {spread} | {ours} | {theirs} |"


def kernel_rows(folder: Path, values: int, repeats: int) -> Iterator[Row]:
    """Kernels beside the libraries', by the scripts that measure them; a turn is a run of a script."""
    scripts = {
        "kernels.py": ("ggml", ["--types", ",".join(GGUF_KERNELS)]),
        "int.py": ("its library", ["--repeats", "3"]),
    }
    for script, (peer, options) in scripts.items():
        ratios: dict[str, list[float]] = {}
        for _ in range(repeats):
            file = folder / "kernels.json"
            words = [sys.executable, HERE / script, *options, "--values", str(values), "--no-goals", "--json", file]
            if measure(words).exit_code:
                print(f"{script} failed", file=sys.stderr)
                break
            for line in json.loads(file.read_text()):
                ratios.setdefault(name_of(line), []).append(line["ratio"])
        for name, turns in ratios.items():
            if name in FOLDER_KERNELS or peer == "ggml":
                yield Row(name, peer, turns)


def name_of(line: dict[str, str]) -> str:
    """The type of a line of a script's JSON."""
    return line["name"] if "name" in line else line["type"].lower() + " by importance" * bool(line["importance"])


def command_rows(folder: Path, size: str, threads: int, repeats: int) -> Iterator[Row]:
    """Whole commands beside what does the same."""
    source, out = folder / f"{size}-hf", folder / "out"
    synthesize(size, source)
    fill_page_cache(source)
    weights, gguf = source / "model.safetensors", folder / "source.gguf"
    options = ["--no-verify", "--no-receipt", "--quiet", "--force", "--threads", str(threads)]
    copy = ["sh", "-c", 'cp "$0" "$1" && sync "$1"', weights, folder / "copy"]
    convert = [*TOOL, "convert", source, gguf, *options]
    yield in_turns("convert a folder to GGUF, bf16", "cp and sync", convert, copy, repeats)
    remove(folder / "copy")
    remove(gguf)
    quantize = [*TOOL, "quantize", source, out, "--type", "nf4", *options]
    peer = [sys.executable, __file__, folder, "--run", "bitsandbytes", "--size", size]
    yield in_turns("quantize a folder to nf4", "transformers, bitsandbytes", quantize, peer, repeats)
    remove(out)
    remove(folder / "peer")
    passes = ([sys.executable, HERE / "forward.py", folder, "--size", size, "--threads", str(threads),
               "--run", name] for name in ("gemma2tool", "transformers"))  # fmt: skip
    dense = folder / f"{size}-dense"
    if not dense.exists():
        dense.symlink_to(source.name)
    yield in_turns("logits of 64 tokens", "transformers", *passes, repeats)
    dense.unlink()


def in_turns(
    name: str, peer: str, command: Sequence[str | Path], peer_command: Sequence[str | Path], repeats: int
) -> Row:
    """Both commands, ``repeats`` times in turn. Exits if one fails."""
    turns: list[tuple[Measurement, Measurement]] = []
    for _ in range(repeats):
        turns.append((measure(command), measure(peer_command)))
        for side, words in zip(turns[-1], (command, peer_command), strict=True):
            if side.exit_code:
                sys.exit(f"exit code {side.exit_code} of {' '.join(map(str, words))}")
    peaks = tuple(max(turn[side].peak_bytes for turn in turns) / 2**20 for side in (0, 1))
    return Row(name, peer, [theirs.seconds / ours.seconds for ours, theirs in turns], (peaks[0], peaks[1]))


def memory_lines(folder: Path, sizes: Sequence[str], threads: int) -> Iterator[tuple[str, str, float]]:
    """Size, command and peak in MiB, from sparse files."""
    for size in sizes:
        source, out = folder / f"{size}-sparse", folder / "out.gguf"
        synthesize(size, source, "--sparse")
        quantize = [*TOOL, "quantize", source, out, "--type", "q4_k_m", "--no-verify", "--quiet", "--force"]
        forward = [sys.executable, HERE / "forward.py", folder, "--size", size, "--sparse", "--run",
                   "gemma2tool"]  # fmt: skip
        for name, command in (("quantize to q4_k_m", quantize), ("logits of 64 tokens", forward)):
            cost = measure([*command, "--threads", str(threads)])
            if cost.exit_code:
                sys.exit(f"exit code {cost.exit_code} of {name}, {size}")
            yield size, name, cost.peak_bytes / 2**20
        remove(out)
        remove(source)


def run_bitsandbytes(folder: Path, size: str) -> None:
    """transformers loads the model with its matrices quantized by bitsandbytes, and saves it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / f"{size}-hf", dtype=torch.bfloat16, quantization_config=how)
    model.save_pretrained(folder / "peer")


def print_rows(title: str, rows: Iterator[Row]) -> list[Row]:
    """The table, a line as soon as it is measured."""
    print(f"\n{title}\n\n| | peer | ratio | range | MiB | peer's MiB |\n|---|---|---:|---|---:|---:|")
    printed = []
    for row in rows:
        print(row.markdown(), flush=True)
        printed.append(row)
    return printed


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("folder", type=Path, help="a folder with enough free space")
    parser.add_argument("--only", default=",".join(GROUPS))
    parser.add_argument("--sizes", default="2b,9b,27b", help="shapes whose memory is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--values", type=float, default=2e6, help="weights per measurement of a kernel")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the tables here")
    parser.add_argument("--run", choices=("bitsandbytes",), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        run_bitsandbytes(folder, arguments.size)
        return 0
    chosen = arguments.only.split(",")
    drawn: dict[str, list[Row]] = {}
    memory: list[tuple[str, str, float]] = []
    if "commands" in chosen:  # first: a child's peak starts at this process's
        rows = command_rows(folder, arguments.size, arguments.threads, arguments.repeats)
        drawn["commands"] = print_rows(f"Commands, {arguments.size} shape, {arguments.threads} threads", rows)
    if "memory" in chosen:
        print("\nMemory\n\n| shape | command | MiB |\n|---|---|---:|")
        for line in memory_lines(folder, arguments.sizes.split(","), arguments.threads):
            memory.append(line)
            print(f"| {line[0]} | {line[1]} | {line[2]:,.0f} |", flush=True)
    if "kernels" in chosen:
        rows = kernel_rows(folder, int(arguments.values), arguments.repeats)
        drawn["kernels"] = print_rows("Kernels, one thread", rows)
    if arguments.plots:
        import plots

        plots.write(arguments.plots, drawn, memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
