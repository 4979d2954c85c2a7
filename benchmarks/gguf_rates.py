"""GGUF against its peers: kernels against ggml's, and the whole way from a 2B-shaped Hugging Face folder to q4_k_m and bf16.

    python benchmarks/gguf_rates.py                         # kernels alone: benchmarks/kernels.py, every type, one core
    python benchmarks/gguf_rates.py --end-to-end /tmp/bench # and the whole way; needs about 20 GB of disk

The whole way is measured against copying the source file (cp, then sync) plus the kernels' own time on as many cores, both in the same
run: goals are 1.5 times their sum for q4_k_m and cp / 0.7 for bf16, and 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

import end_to_end

HERE = Path(__file__).resolve().parent
TOOL = [sys.executable, "-m", "gemma2tool"]


def kernel_seconds(source: Path, threads: int) -> float:
    """Processor time of quantizing every tensor of ``source`` to q4_k_m, over ``threads``, from rates measured now."""
    import kernels

    from gemma2tool.formats import registry
    from gemma2tool.formats.base import WriteOptions

    values: Counter[str] = Counter()
    with registry.open_checkpoint(source) as checkpoint:
        for item in registry.by_name("gguf").layout(checkpoint, WriteOptions(type="q4_k_m")).tensors:
            values[item.encoder.name.upper()] += item.source.size
    million = {kind: count / 1e6 for kind, count in values.items() if kind not in ("F32", "F16", "BF16")}
    return sum(count / kernels.measure(kind, False).ours for kind, count in million.items()) / threads


def whole_way(folder: Path, threads: int) -> None:
    """Print the table of the whole way; the numbers are seconds, a ratio and MiB."""
    source = folder / "2b-hf"
    if not source.exists():
        subprocess.run([sys.executable, HERE / "synthesize.py", "2b", source], check=True)
    weights = source / "model.safetensors"
    with weights.open("rb") as file:
        while file.read(1 << 20):
            pass
    copy = folder / "copy"
    copied, _, _ = end_to_end.measure(["sh", "-c", f'cp "{weights}" "{copy}"'])
    end_to_end.remove(copy)
    synced, _, _ = end_to_end.measure(["sh", "-c", f'cp "{weights}" "{copy}" && sync "{copy}"'])
    end_to_end.remove(copy)
    options = ["--no-verify", "--quiet", "--force", "--threads", str(threads)]
    print(f"\ncp {copied:.1f} s, cp and sync {synced:.1f} s, {threads} threads")
    results = {}
    for name, words in {
        "bf16": ["convert", str(source), str(folder / "out-bf16.gguf")],
        "q4_k_m": ["quantize", str(source), str(folder / "out-q4_k_m.gguf"), "--type", "q4_k_m"],
    }.items():
        results[name] = end_to_end.measure([*TOOL, *words, *options])
        end_to_end.remove(Path(words[2]))
    kernel_time = kernel_seconds(source, threads)  # after the measurements: this process must stay small for them
    seconds, peak, code = results["bf16"]
    print(
        f"bf16:   {seconds:5.1f} s, {copied / seconds:.2f} of cp's rate ({synced / seconds:.2f} of cp and sync's), peak {peak / 2**20:.0f} MiB, exit {code}"
    )
    seconds, peak, code = results["q4_k_m"]
    ratio = seconds / (copied + kernel_time)
    print(
        f"q4_k_m: {seconds:5.1f} s, {ratio:.2f} times cp plus {kernel_time:.1f} s of kernels, peak {peak / 2**20:.0f} MiB, exit {code}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end-to-end", type=Path, metavar="FOLDER")
    parser.add_argument("--only-end-to-end", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.end_to_end:
        arguments.end_to_end.mkdir(parents=True, exist_ok=True)
        whole_way(arguments.end_to_end, arguments.threads)
    if not arguments.only_end_to_end:
        subprocess.run([sys.executable, HERE / "kernels.py"], check=False)


if __name__ == "__main__":
    main()
