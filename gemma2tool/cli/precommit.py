"""The pre-commit hook: every checkpoint among the files of a commit that has a receipt must be what its receipt says.

python -m gemma2tool.cli.precommit FILE...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def outputs(files: Iterable[str]) -> list[Path]:
    """The checkpoints that ``files`` are, belong to, or are receipts of; each once, only those that have a receipt."""
    from gemma2tool.receipt.document import SUFFIX, receipt_path

    found: dict[Path, None] = {}
    for name in files:
        path = Path(name)
        if path.name.endswith(SUFFIX):
            found[path.with_name(path.name.removesuffix(SUFFIX))] = None
        else:
            places = [path, *path.parents][:-1]  # not the folder that the hook runs in
            found.update((place, None) for place in places if receipt_path(place).exists())
    return list(found)


def main(files: Iterable[str]) -> int:
    """Verify each; the first exit code that is not 0, or 0."""
    from gemma2tool.cli.main import app

    codes = [app(["verify", "--quiet", "--", str(path)], standalone_mode=False) or 0 for path in outputs(files)]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
