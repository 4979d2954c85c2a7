"""Fuzzes every reader. It can be interrupted at any time and continues when started again.

    nice -n 10 python tests/campaigns/fuzz.py --state build/fuzz --seconds 3600
    python tests/campaigns/fuzz.py --state build/fuzz --report

The state folder contains ``state.json`` (executions, seconds and findings of each reader), inputs with new outcomes,
and for each finding a file with the input and one with the traceback. A finding does not stop the campaign: the next
slice has another seed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz import worker
from tests.fuzz.base import Target, remove_folders
from tests.fuzz.targets import all_targets

SLICE = 20.0
MAX_FINDINGS = 25  # per reader and run; then the reader is skipped until they are fixed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--executions", type=int, default=10**12, help="stop after this many runs of all readers together"
    )
    parser.add_argument("--turn", type=int, default=10**12, help="run every reader this many times, then stop")
    parser.add_argument("--readers", nargs="*", help="only these")
    parser.add_argument("--slice", type=float, default=SLICE, help="seconds a reader before the next one's turn")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--replay", nargs=2, metavar=("READER", "FILE"), help="run one input and let it raise")
    options = parser.parse_args()
    targets = all_targets()
    if options.replay:
        target = targets[options.replay[0]]
        target.prepare()
        print(worker.outcome(target, Path(options.replay[1]).read_bytes()))
        return 0
    options.state.mkdir(parents=True, exist_ok=True)
    lock = (options.state / "lock").open("w")
    if not options.report:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"a campaign is running with the state {options.state}")
    state = State(options.state / "state.json")
    if not options.report:
        try:
            run(
                options,
                {name: target for name, target in targets.items() if not options.readers or name in options.readers},
                state,
            )
        finally:
            remove_folders()
    print(state.table())
    return 0


class State:
    """Executions, seconds and findings by reader, in a file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readers: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name: str) -> dict:
        return self.readers.setdefault(name, {"executions": 0, "seconds": 0.0, "slices": 0, "findings": []})

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.readers, indent=1, sort_keys=True))
        new.replace(self.path)

    @property
    def executions(self) -> int:
        return sum(reader["executions"] for reader in self.readers.values())

    def table(self) -> str:
        lines = ["| reader | executions | seconds | a second | findings |", "|---|--:|--:|--:|--:|"]
        rows = [
            (name, reader["executions"], reader["seconds"], len(reader["findings"]))
            for name, reader in sorted(self.readers.items())
        ]
        rows.append(("all", self.executions, sum(row[2] for row in rows), sum(row[3] for row in rows)))
        lines += [
            f"| {name} | {n:,} | {seconds:,.0f} | {n / max(seconds, 1e-9):,.0f} | {findings} |"
            for name, n, seconds, findings in rows
        ]
        return "\n".join(lines)


def run(options: argparse.Namespace, targets: dict[str, Target], state: State) -> None:
    """Runs slice after slice, each reader in turn."""
    interrupted: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(True))
    end, fresh = time.monotonic() + options.seconds, dict.fromkeys(targets, 0)
    while not interrupted:
        for name, target in targets.items():
            if interrupted or time.monotonic() >= end or state.executions >= options.executions:
                return
            if fresh[name] < MAX_FINDINGS:
                fresh[name] += one_slice(
                    name, target, state, options, min(options.slice, end - time.monotonic()), interrupted
                )
        if options.turn < 10**12 or all(count >= MAX_FINDINGS for count in fresh.values()):
            return


def one_slice(
    name: str, target: Target, state: State, options: argparse.Namespace, seconds: float, interrupted: list[bool]
) -> int:
    row, shared, log = state.of(name), worker.Shared(), options.state / f"{name}.log"
    log.unlink(missing_ok=True)
    seed = int.from_bytes(hashlib.sha256(f"{name} {row['slices']}".encode()).digest()[:4])
    began = time.monotonic()
    pid = worker.spawn(target, shared, seed, max(seconds, 1.0), options.turn, options.state / "pool" / name, log)
    count, finding = worker.watch(pid, shared, log, interrupted)
    row["executions"] += count
    row["seconds"] = round(row["seconds"] + time.monotonic() - began, 1)
    row["slices"] += 1
    if (
        finding is not None and not count
    ):  # it could not read even its seeds: the tree is being edited, or a library is missing
        print(f"{name}: did not start: {finding.kind}", flush=True)
        return 0
    if finding is not None:
        digest = hashlib.sha256(finding.data).hexdigest()[:16]
        place = options.state / "findings" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / digest).write_bytes(finding.data)
        (place / f"{digest}.txt").write_text(log.read_text() if log.exists() else finding.kind)
        row["findings"].append({"kind": finding.kind, "input": digest, "seed": seed, "execution": count})
        print(f"{name}: {finding.kind} ({digest})", flush=True)
    state.save()
    return finding is not None


if __name__ == "__main__":
    sys.exit(main())
