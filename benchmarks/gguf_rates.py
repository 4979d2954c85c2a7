"""GGUF against its peers: kernels against ggml's, and end to end from a Hugging Face folder to q4_k_m and bf16.

    python benchmarks/gguf_rates.py                         # kernels alone: benchmarks/kernels.py, every type, one core
    python benchmarks/gguf_rates.py --end-to-end /tmp/bench # and end to end on a 2B shape; needs about 20 GB of disk

Other options are those of kernels.py.

End to end is measured against copying the source file (cp, then sync) plus the kernels' own time on as many cores, both
in the same run. The goals are 1.5 times their sum for q4_k_m, cp / 0.7 for bf16, and 1 GiB of memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from processes import HERE, TOOL, argument_parser, fill_page_cache, measure, remove, synthesize


def kernel_seconds(source: Path, threads: int, values: int) -> float:
    """Processor time of quantizing every tensor of ``source`` to q4_k_m, divided by ``threads``; each rate is measured
    on ``values`` weights.
    """
    import kernels

    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions

    weights: Counter[str] = Counter()
    with registry.open_checkpoint(source) as checkpoint:
        for tensor in registry.by_name("gguf").layout(checkpoint, WriteOptions(type="q4_k_m")).tensors:
            weights[tensor.encoder.name.upper()] += tensor.source.size
    millions = {type: count / 1e6 for type, count in weights.items() if type not in ("F32", "F16", "BF16")}
    return sum(count / kernels.measure(type, False, values).gemma2tool for type, count in millions.items()) / threads


def end_to_end(folder: Path, size: str, threads: int, values: int) -> int:
    """Print seconds, ratios and MiB of both conversions; returns the first exit code that is not 0."""
    source = folder / f"{size}-hf"
    synthesize(size, source)
    fill_page_cache(source)
    weights, copy = source / "model.safetensors", folder / "copy"
    copied = measure(["cp", weights, copy]).seconds
    remove(copy)
    synced = measure(["sh", "-c", 'cp "$0" "$1" && sync "$1"', weights, copy]).seconds
    remove(copy)
    print(f"\ncp {copied:.1f} s, cp and sync {synced:.1f} s, {threads} threads")
    options = ["--no-verify", "--quiet", "--force", "--threads", str(threads)]
    outputs = folder / "out-bf16.gguf", folder / "out-q4_k_m.gguf"
    bf16 = measure([*TOOL, "convert", source, outputs[0], *options])
    q4_k_m = measure([*TOOL, "quantize", source, outputs[1], "--type", "q4_k_m", *options])
    for output in outputs:
        remove(output)
    kernel_time = kernel_seconds(source, threads, values)  # imports much: after everything whose peak is measured
    print(
        f"bf16:   {bf16.seconds:5.1f} s, {copied / bf16.seconds:.2f} of cp's rate"
        f" ({synced / bf16.seconds:.2f} of cp and sync's),"
        f" peak {bf16.peak_bytes / 2**20:.0f} MiB, exit {bf16.exit_code}"
    )
    print(
        f"q4_k_m: {q4_k_m.seconds:5.1f} s, {q4_k_m.seconds / (copied + kernel_time):.2f} times cp plus"
        f" {kernel_time:.1f} s of kernels, peak {q4_k_m.peak_bytes / 2**20:.0f} MiB, exit {q4_k_m.exit_code}"
    )
    return bf16.exit_code or q4_k_m.exit_code


def main() -> int:
    parser = argument_parser(__doc__, size="2b")
    parser.add_argument("--end-to-end", type=Path, metavar="FOLDER")
    parser.add_argument("--only-end-to-end", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--values", type=float, default=2e6, help="weights per measurement of a kernel")
    arguments, for_kernels = parser.parse_known_args()
    exit_code = 0
    if arguments.end_to_end:
        arguments.end_to_end.mkdir(parents=True, exist_ok=True)
        exit_code = end_to_end(arguments.end_to_end, arguments.size, arguments.threads, int(arguments.values))
    if not arguments.only_end_to_end:
        words = [sys.executable, HERE / "kernels.py", "--values", str(arguments.values), *for_kernels]
        exit_code = exit_code or subprocess.run(words, check=False).returncode
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
