"""The pre-commit hook: verifies every checkpoint in a commit that has a receipt.

python -m gemma2tool.cli.precommit FILE...
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def main(files: Iterable[str]) -> int:
    """Verify each checkpoint that has a receipt; return the first exit code that is not 0, or 0."""
    from gemma2tool import api
    from gemma2tool.cli.main import app

    outputs = api.outputs_with_receipts(map(Path, files))
    codes = [app(["verify", "--quiet", "--", str(path)], standalone_mode=False) or 0 for path in outputs]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
