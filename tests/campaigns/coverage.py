"""Fuzzes readers by coverage, with atheris. It can be interrupted at any time and continues when started again.

    python tests/campaigns/coverage.py --state build/coverage --seconds 600 [--readers gguf pickle-scan ...]
    python tests/campaigns/coverage.py --state build/coverage --report

Readers, corpora and what counts as a finding are those of tests/fuzz; every mutation is either atheris's own or the
reader's, in turn, and inputs that reach new code stay in the state folder. atheris must be importable: install it into
an environment of its own, and name its packages in PYTHONPATH. Each reader runs in its own process for its share of the
time; executions are counted in shared memory, so that what a crash interrupts is counted, too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import mmap
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MAX_BYTES = 1 << 16
_COUNT = struct.Struct("<Q")


def fuzz_one(name: str, corpus: Path, seconds: int, seed: int) -> None:
    """The process of one reader. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["gemma2tool"]):
        target = importlib.import_module("tests.fuzz.targets").all_targets()[name]
        target.prepare()
        worker = importlib.import_module("tests.fuzz.worker")
    seeds = target.seeds()
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    with open(corpus.parent / "count", "r+b") as file:
        memory = mmap.mmap(file.fileno(), _COUNT.size)

    def run(data: bytes) -> None:
        _COUNT.pack_into(memory, 0, _COUNT.unpack_from(memory)[0] + 1)
        worker.outcome(target, data, watched=False)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        changed = target.mutate(rng, bytes(data), seeds) if rng.random() < 0.5 else atheris.Mutate(data, most)
        return changed[:most]

    words = [sys.argv[0], f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=2048"]
    words += [
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={corpus.parent}/finding-",
        "-print_final_stats=0",
        str(corpus),
    ]
    atheris.Setup(words, run, custom_mutator=mutate)
    atheris.Fuzz()


class State:
    """Executions, seconds, inputs kept and findings by reader."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.json"
        self.readers: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name: str, executions: int, seconds: float, place: Path) -> None:
        row = self.readers.setdefault(name, {"executions": 0, "seconds": 0.0, "slices": 0})
        row["executions"] += executions
        row["seconds"] = round(row["seconds"] + seconds, 1)
        row["slices"] += 1
        row["inputs"] = len(list((place / "corpus").iterdir()))
        row["findings"] = sorted(path.name for path in place.glob("finding-*"))
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.readers, indent=1, sort_keys=True))
        new.replace(self.path)

    def table(self) -> str:
        lines = ["| reader | executions | seconds | inputs kept | findings |", "|---|--:|--:|--:|--:|"]
        for name, row in sorted(self.readers.items()):
            numbers = f"{row['executions']:,} | {row['seconds']:,.0f} | {row['inputs']:,} | {len(row['findings'])}"
            lines.append(f"| {name} | {numbers} |")
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("build/coverage"))
    parser.add_argument("--seconds", type=int, default=600, help="for all readers together")
    parser.add_argument("--readers", nargs="*", help="only these")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = options.state / (options.one or "")
    if options.one:
        fuzz_one(options.one, place / "corpus", options.seconds, int(os.environ["FUZZ_SEED"]))
    state = State(options.state)
    if not options.report:
        from tests.fuzz.targets import all_targets

        names = options.readers or sorted(all_targets())
        for name in names:
            place = options.state / name
            (place / "corpus").mkdir(parents=True, exist_ok=True)
            (place / "count").write_bytes(_COUNT.pack(0))
            seed = int.from_bytes(
                hashlib.sha256(f"{name} {state.readers.get(name, {}).get('slices', 0)}".encode()).digest()[:3]
            )
            words = [sys.executable, __file__, "--one", name, "--state", str(options.state)]
            words += ["--seconds", str(max(1, options.seconds // len(names)))]
            began = time.monotonic()
            with open(place / "log", "wb") as log:
                subprocess.run(
                    words, stdout=log, stderr=log, check=False, env=os.environ | {"FUZZ_SEED": str(seed + 1)}
                )
            executions = _COUNT.unpack((place / "count").read_bytes())[0]
            state.add(name, executions, time.monotonic() - began, place)
            print(f"{name}: {executions:,} executions, {len(state.readers[name]['findings'])} findings", flush=True)
    print(state.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
