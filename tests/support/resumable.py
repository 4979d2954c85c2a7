"""A small staged output that can be continued, and runs of it that are stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma2tool.storage.staging.staged_output import Staging

PIECES = {f"tensor {i}": (i * 1000, bytes([65 + i]) * 1000) for i in range(10)}
WHOLE = b"".join(data for _, data in PIECES.values())
PRINT = {"tool": "1", "type": "q8_0", "plan": "abc"}
PLACE = ".out.gemma2tool-staging"


class Stop(BaseException):
    """Ends a run as a signal would."""


def work(path: Path, *, upto: int = 10, fingerprint: dict[str, str] | None = None, **options: object) -> list[str]:
    """Writes the pieces that are not complete yet, up to piece ``upto``. Returns which those were."""
    written = []
    with Staging(path, expected_bytes=len(WHOLE), fingerprint=fingerprint or PRINT, **options) as staging:
        if not staging.finished:
            file = staging.file(path.name, len(WHOLE))
            for name, (offset, data) in list(PIECES.items())[:upto]:
                if name not in staging.completed:
                    file.pwrite(offset, data)
                    written.append(name)
                    staging.complete(name, [path.name], {"crc": len(written)}, len(data))
            if upto < len(PIECES):
                staging._recorder.close()
                raise Stop
        staging.commit()
    return written


def stopped(path: Path, upto: int, **options: object) -> Stop:
    with pytest.raises(Stop) as caught:
        work(path, upto=upto, **options)
    return caught.value
