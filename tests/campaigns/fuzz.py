"""Fuzzes every reader for as long as you like; interrupt it at any time and start it again, it goes on where it was.

    nice -n 10 python tests/campaigns/fuzz.py --state build/fuzz --seconds 3600
    python tests/campaigns/fuzz.py --state build/fuzz --report

The state folder holds ``state.json`` (executions, seconds and findings of each reader), inputs of new outcomes, and a
file for each finding with the input beside its traceback. A finding stays in the way of nothing: the next slice has
another seed.
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

TESTS = Path(__file__).resolve().parent.parent
sys.path[0] = str(TESTS.parent)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz import worker
from tests.fuzz.base import Target, remove_folders
from tests.fuzz.targets import all_targets

SLICE = 20.0
MAX_FINDINGS = 25  # of one reader in a run: then it is not fuzzed any more until they are fixed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--executions", type=int, default=10**12, help="stop when all readers together have had so many"
    )
    parser.add_argument(
        "--each", type=int, default=10**12, help="give every reader one turn of so many executions, and stop"
    )
    parser.add_argument("--readers", nargs="*", help="only these")
    parser.add_argument("--slice", type=float, default=SLICE, help="seconds a reader before the next one's turn")
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--replay", nargs=2, metavar=("READER", "FILE"), help="run one input and let it raise")
    asked = parser.parse_args()
    targets = all_targets()
    if asked.replay:
        target = targets[asked.replay[0]]
        target.prepare()
        print(worker.outcome(target, Path(asked.replay[1]).read_bytes()))
        return 0
    asked.state.mkdir(parents=True, exist_ok=True)
    lock = (asked.state / "lock").open("w")
    if not asked.report:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"a campaign is running with the state {asked.state}")
    state = State(asked.state / "state.json")
    if not asked.report:
        try:
            run(
                asked,
                {name: each for name, each in targets.items() if not asked.readers or name in asked.readers},
                state,
            )
        finally:
            remove_folders()
    print(state.table())
    return 0


class State:
    """Executions, seconds and findings by reader, kept in a file that is replaced as a whole."""

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
        return sum(each["executions"] for each in self.readers.values())

    def table(self) -> str:
        lines = ["| reader | executions | seconds | a second | findings |", "|---|--:|--:|--:|--:|"]
        rows = [
            (name, each["executions"], each["seconds"], len(each["findings"]))
            for name, each in sorted(self.readers.items())
        ]
        rows.append(("all", self.executions, sum(row[2] for row in rows), sum(row[3] for row in rows)))
        lines += [
            f"| {name} | {n:,} | {seconds:,.0f} | {n / max(seconds, 1e-9):,.0f} | {found} |"
            for name, n, seconds, found in rows
        ]
        return "\n".join(lines)


def run(asked: argparse.Namespace, targets: dict[str, Target], state: State) -> None:
    """Slice after slice, each reader in its turn."""
    interrupted: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(True))
    end, fresh = time.monotonic() + asked.seconds, dict.fromkeys(targets, 0)
    while not interrupted:
        for name, target in targets.items():
            if interrupted or time.monotonic() >= end or state.executions >= asked.executions:
                return
            if fresh[name] < MAX_FINDINGS:
                fresh[name] += one_slice(
                    name, target, state, asked, min(asked.slice, end - time.monotonic()), interrupted
                )
        if asked.each < 10**12 or all(count >= MAX_FINDINGS for count in fresh.values()):
            return


def one_slice(
    name: str, target: Target, state: State, asked: argparse.Namespace, seconds: float, interrupted: list[bool]
) -> int:
    row, shared, log = state.of(name), worker.Shared(), asked.state / f"{name}.log"
    log.unlink(missing_ok=True)
    seed = int.from_bytes(hashlib.sha256(f"{name} {row['slices']}".encode()).digest()[:4])
    began = time.monotonic()
    pid = worker.spawn(target, shared, seed, max(seconds, 1.0), asked.each, asked.state / "pool" / name, log)
    count, finding = worker.watch(pid, shared, log, interrupted)
    row["executions"] += count
    row["seconds"] = round(row["seconds"] + time.monotonic() - began, 1)
    row["slices"] += 1
    if (
        finding is not None and not count
    ):  # it could not even read its seeds: the tree is being edited, or a library is missing
        print(f"{name}: did not start: {finding.kind}", flush=True)
        return 0
    if finding is not None:
        digest = hashlib.sha256(finding.data).hexdigest()[:16]
        place = asked.state / "findings" / name
        place.mkdir(parents=True, exist_ok=True)
        (place / digest).write_bytes(finding.data)
        (place / f"{digest}.txt").write_text(log.read_text() if log.exists() else finding.kind)
        row["findings"].append({"kind": finding.kind, "input": digest, "seed": seed, "execution": count})
        print(f"{name}: {finding.kind} ({digest})", flush=True)
    state.save()
    return finding is not None


if __name__ == "__main__":
    sys.exit(main())
