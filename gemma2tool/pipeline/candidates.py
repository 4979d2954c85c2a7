"""Several checkpoints to verify in one run: those that are named, and those in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma2tool.errors import EXIT_VERIFICATION_FAILED, InputRefused, ToolError, UsageError
from gemma2tool.formats import registry
from gemma2tool.model.progress import Progress
from gemma2tool.pipeline.opening import is_remote
from gemma2tool.pipeline.report_files import ReportFiles
from gemma2tool.pipeline.verification import VerifyRequest, verify
from gemma2tool.receipt.document import SUFFIX, receipt_path
from gemma2tool.verify.result import Failure, Result, Verification

PathLike = Path | str


@dataclass(frozen=True)
class CandidateResult:
    """What became of a candidate: its verification, or the reason why there is none."""

    candidate: PathLike
    result: Result

    @property
    def verification(self) -> Verification | None:
        """The verification; None if the candidate was refused or could not be read completely."""
        return self.result if isinstance(self.result, Verification) else None

    @property
    def passed(self) -> bool:
        return self.result.passed

    @property
    def exit_code(self) -> int:
        """The exit code with which a verification of this candidate alone would end."""
        if isinstance(self.result, Failure):
            return self.result.exit_code
        return 0 if self.result.passed else EXIT_VERIFICATION_FAILED

    def to_json(self) -> dict[str, Any]:
        """Return the candidate's entry in the list that ``--json`` prints."""
        content: dict[str, Any] = {"verification": None, "error": None}
        content["error" if isinstance(self.result, Failure) else "verification"] = self.result.to_json()
        return {"candidate": str(self.candidate), "exit_code": self.exit_code, **content}


def candidates(paths: Iterable[PathLike]) -> list[PathLike]:
    """What ``paths`` name, each once: a folder that is not a checkpoint stands for the checkpoints directly in it.

    These are the files and folders that a format detects, that end like a checkpoint or that have a receipt, also where
    only the receipt is there: what was to be verified and cannot be is a failure. A split checkpoint counts once.
    """
    paths_inside: dict[PathLike, None] = {}
    for path in paths:
        inside: list[PathLike] = [*_inside(path)]
        paths_inside.update(dict.fromkeys(inside or [path]))
    return list(paths_inside)


def _inside(path: PathLike) -> list[Path]:
    """The candidates directly in a folder that is not one itself, sorted by name."""
    folder = Path(path)
    if is_remote(str(path)) or not folder.is_dir() or receipt_path(folder).exists():
        return []
    is_checkpoint = _is_checkpoint(folder)
    if is_checkpoint and not _is_of_outputs(folder):
        return []
    try:
        names = {entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if not entry.name.startswith(".")}
    except OSError:  # the folder is refused as it would be alone
        return []
    inside, seen = [], set[Path]()
    for place in (folder / name for name in sorted(names)):
        if place.suffix.lower() in registry.FILE_SUFFIXES or receipt_path(place).exists() or _is_checkpoint(place):
            files = _files(place)
            if not files or not files <= seen:
                inside.append(place)
            seen |= files
    return [] if is_checkpoint and len(inside) == 1 else inside


def _is_of_outputs(folder: Path) -> bool:
    """Whether what the folder would be read as is an output of its own beside others, as a .ckpt with its receipt."""
    files = _files(folder) if any(folder.glob(f"*{SUFFIX}")) else ()
    return bool(files) and all(receipt_path(file).exists() for file in files)


def verify_several(
    request: VerifyRequest, candidates: Sequence[PathLike], progress: Progress | None = None
) -> tuple[CandidateResult, ...]:
    """Verify each candidate as ``request`` says of its own, and write one report of all.

    What is refused does not stop the others. Raises ``UsageError`` for a request that can be of one candidate only.
    """
    of_one = {
        "--against": request.receipt,
        "--logits": request.logits,
        "--signature": request.signature,
        "--bom": request.reports.bom,
    }
    for option, value in of_one.items():
        if value is not None:
            message = f"{option} is of one file, and {len(candidates)} are to be verified"
            raise UsageError("option.pair", message, hint="verify each of them alone")
    given = [*candidates, *([] if request.reference is None else [request.reference])]
    local = [Path(path) for path in given if not is_remote(str(path))]
    request.reports.check((*request.checks.files, *local, *map(receipt_path, local)))
    alone = replace(request, reports=ReportFiles())
    results = [CandidateResult(candidate, _verified(alone, candidate, progress)) for candidate in candidates]
    request.reports.write([result.result for result in results])
    return tuple(results)


def _verified(request: VerifyRequest, candidate: PathLike, progress: Progress | None) -> Result:
    try:
        return verify(replace(request, candidate=candidate), progress)
    except ToolError as error:
        return Failure("verify", str(candidate), error.id, error.message, error.hint, error.exit_code)


def _is_checkpoint(path: Path) -> bool:
    try:
        registry.detect(path)
    except InputRefused:
        return False
    return True


def _files(path: Path) -> set[Path]:
    """The files of a checkpoint; none where it cannot be opened."""
    try:
        with registry.open_checkpoint(path) as checkpoint:
            return set(checkpoint.files)
    except ToolError:
        return set()
