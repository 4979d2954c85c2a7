"""Count what model scanners say of the same files: ``gemma2tool scan``, modelscan, picklescan, fickling, modelaudit.

    python tests/campaigns/scanners.py FOLDER... [--peers PYTHON] [--suffix .pkl,.bin]
    python tests/campaigns/scanners.py --fetch FOLDER --peers PYTHON

Prints, for each folder and scanner, how many files it reports, cannot read, or passes. ``--peers`` names the Python of
an environment that has the other scanners (pip install modelscan picklescan fickling modelaudit); what it has not is
left out. ``--fetch`` clones the scanners' repositories into a folder first, or takes those that are there, and goes
through their own test files (``scanner_sets.py``), which are not part of this repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns.scanner_sets import fetch

PEERS = r"""
import contextlib, importlib, io, json, logging, sys
logging.disable(logging.CRITICAL)

def picklescan(path):
    from picklescan.scanner import SafetyLevel, scan_file_path
    result = scan_file_path(path)
    bad = any(found.safety in (SafetyLevel.Dangerous, SafetyLevel.Suspicious) for found in result.globals)
    return "reported" if bad or result.issues_count else "unread" if result.scan_err else "passed"

def modelscan(path):
    from modelscan.modelscan import ModelScan
    result = ModelScan().scan(path)
    return "reported" if result["issues"] else "unread" if result["errors"] else "passed"

def fickling(path):
    from fickling.analysis import Severity, check_safety
    from fickling.fickle import StackedPickle
    with open(path, "rb") as file:
        stacked = StackedPickle.load(file)
    bad = any(check_safety(part).severity > Severity.LIKELY_SAFE for part in stacked)
    return "reported" if bad else "passed"

def modelaudit(path):
    from modelaudit.core import scan_model_directory_or_file
    result = scan_model_directory_or_file(path)
    severities = {str(getattr(issue.severity, "value", issue.severity)) for issue in result.issues}
    return "reported" if severities & {"critical", "warning"} else "passed"

for line in sys.stdin:
    path, verdicts = line.rstrip("\n"), {}
    for scanner in (picklescan, modelscan, fickling, modelaudit):
        try:
            importlib.import_module(scanner.__name__)
        except ImportError:
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                verdicts[scanner.__name__] = scanner(path)
            except BaseException:
                verdicts[scanner.__name__] = "unread"
    print(json.dumps(verdicts), flush=True)
"""
"""Runs in the other environment: a path a line in, a JSON object of verdicts a line out."""


def own(path: Path) -> str:
    """What gemma2tool says of a file: a danger or something odd is a report."""
    from gemma2tool import api
    from gemma2tool.errors import ToolError

    try:
        result = api.scan(path)
    except ToolError:
        return "unread"
    return "passed" if result.clean else "reported"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--fetch", type=Path, metavar="FOLDER", help="clone the scanners' test files to this folder")
    parser.add_argument("--peers", default="", help="the Python of the environment with the other scanners")
    parser.add_argument("--suffix", default="", help="only files of these suffixes, with commas")
    parser.add_argument("--list", action="store_true", help="also print each file's verdicts")
    words = parser.parse_args()
    suffixes = tuple(words.suffix.split(",")) if words.suffix else ("",)
    folders = [*words.folders, *([] if words.fetch is None else sorted(fetch(words.fetch).iterdir()))]
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))
        counts: dict[str, Counter[str]] = {"gemma2tool": Counter(own(path) for path in files)}
        if words.peers:
            text = "".join(f"{path}\n" for path in files)
            done = subprocess.run([words.peers, "-c", PEERS], input=text, capture_output=True, text=True, check=True)
            for path, line in zip(files, done.stdout.splitlines(), strict=True):
                verdicts = json.loads(line)
                if words.list:
                    print(path.relative_to(folder), {"gemma2tool": own(path)} | verdicts)
                for name, verdict in verdicts.items():
                    counts.setdefault(name, Counter())[verdict] += 1
        print(f"{folder}: {len(files)} files")
        for name, count in counts.items():
            reported, unread, passed = (count[verdict] for verdict in ("reported", "unread", "passed"))
            print(f"  {name:<12} {reported:>4} reported {unread:>4} unread {passed:>4} passed")


if __name__ == "__main__":
    main()
