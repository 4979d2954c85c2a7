"""Compare what gemma2tool computes on a GPU with the CPU's answers, path by path, and measure it. See scripts/gpu.sh.

``--device cpu`` compares the CPU with itself, to try the script where there is no GPU. The float32 limit is that of two
float32 implementations on equal weights; narrower types are held to the KL divergence of the CPU's own float32 logits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from calibrations import calibration_paths, importance_paths, peer_paths, time_calibration  # noqa: E402
from forwards import command_line, generation_paths, logits_paths, transformers_paths  # noqa: E402
from table import Table  # noqa: E402
from verifications import library_paths, time_verification, verification_paths  # noqa: E402

SECTIONS = {
    "forward": logits_paths,
    "generate": generation_paths,
    "command": command_line,
    "imatrix": importance_paths,
    "calibration": calibration_paths,
    "verification": verification_paths,
    "bitsandbytes": library_paths,
    "transformers": transformers_paths,
    "llm-compressor": peer_paths,
    "calibration-time": time_calibration,
    "verification-time": time_verification,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "2b"), default="2b", help="the shape that is timed")
    parser.add_argument("--device", default="cuda", help="what is compared with the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--folder", type=Path, help="where large files are written (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was compared")
        return 1
    if arguments.device != "cpu":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TF32 {tf32}")
    table = Table(arguments.device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.only.split(","):
            with table.section(name):
                SECTIONS[name](table, arguments.size, Path(folder))
    print(f"\n{table.failures} failed" if table.failures else "\nall within their limits")
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
