"""A scan of a file or a folder: every file by what it is, and what loaders of the checkpoint act on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.errors import InputRefused, ToolError
from gemma2tool.formats import other_files, registry
from gemma2tool.model.loaders import CUSTOM_GENERATE, changes_weights
from gemma2tool.pipeline.report_files import check_reports, replace_report
from gemma2tool.pipeline.scan import git
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.contents import scan_file
from gemma2tool.pipeline.scan.finding import AS_CHECKPOINT, SEVERITIES, ScanFinding, ScanResult, Severity
from gemma2tool.pipeline.scan.sarif import sarif
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.storage.paths import path_within_folder, workspace_path

MAX_FILES = 20_000


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """What to scan: a file, or a folder with all that is in it. ``sarif``: where to write the result as SARIF."""

    path: Path
    sarif: Path | None = None


def scan(request: ScanRequest) -> ScanResult:
    """Scan without loading, unpacking or running anything.

    It need not be a Gemma 2 checkpoint. Raises ``InputRefused`` if there is nothing at the path.
    """
    path = request.path
    named = {} if request.sarif is None else {"--sarif": request.sarif}
    check_reports(named, (path,) if path.is_file() else ())
    result = _scanned(path)
    if request.sarif is not None:
        base = workspace_path(path if path.is_dir() else path.parent)
        replace_report(request.sarif, sarif(result, "" if base == "." else base))
    return result


def _scanned(path: Path) -> ScanResult:
    if not path.exists():
        raise other_files.missing(path)
    if not path.is_file() and not path.is_dir():
        raise InputRefused("input.kind", f"{path}: neither a file nor a folder", hint="pass the path of a checkpoint")
    skipped: dict[str, str] = {}
    findings: list[ScanFinding] = []
    files = [path] if path.is_file() else list(_files(path, skipped))
    for file in files:
        if file.is_dir() and not file.is_symlink():
            findings += git.scan_repository(file, Place(file.relative_to(path).as_posix()))
        else:
            findings += _scan_file(file, path, skipped)
    if path.is_dir():
        findings += _code(path, files, findings)
        findings += _loaded_too(path, skipped)
    merged = sorted(_merged(findings), key=lambda finding: SEVERITIES.index(finding.severity))
    return ScanResult(path, len(files), tuple(merged), skipped)


def _files(folder: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """The files in a folder; in place of the folder of a git repository's own files, the folder; links to folders."""
    count = 0

    def unread(error: OSError) -> None:
        skipped[os.path.relpath(error.filename, folder)] = f"cannot be listed: {error.strerror}"

    for root, folders, names in os.walk(folder, onerror=unread):
        if git.is_repository(Path(root).name, folders, names):
            yield Path(root)
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        folders.sort()
        for name in sorted(names + links):
            count += 1
            if count > MAX_FILES:
                skipped["more files"] = f"more than {MAX_FILES} files"
                return
            yield Path(root) / name


def _scan_file(file: Path, root: Path, skipped: dict[str, str]) -> Iterator[ScanFinding]:
    name = file.name if file == root else file.relative_to(root).as_posix()
    place = Place(name)
    for finding in scan_text(name, place, one_line=True):
        yield replace(finding, where="name")
    try:
        path_within_folder(file)
    except InputRefused as error:
        yield place.finding("files.escape", error.message)
        return
    except OSError as error:
        skipped[name] = f"cannot be read: {error.strerror}"
        return
    if not file.is_file():
        if not file.is_dir():  # a link to a folder of what is scanned
            skipped[name] = "not a regular file"
        return
    try:
        yield from scan_file(file, place)
    except ToolError as error:
        skipped[name] = error.message
    except OSError as error:
        skipped[name] = f"cannot be read: {error.strerror}"


def _code(folder: Path, files: list[Path], findings: list[ScanFinding]) -> Iterator[ScanFinding]:
    """Python files: what transformers generates with, whatever the config says; the others are notes where no config
    names any.
    """
    if (folder / CUSTOM_GENERATE).is_file():
        yield Place(CUSTOM_GENERATE).finding("code.remote", "transformers generates with it if it trusts remote code")
    if any(finding.id == "code.remote" for finding in findings):
        return
    for name in sorted(path.relative_to(folder).as_posix() for path in files):
        if name.endswith(".py") and name != CUSTOM_GENERATE:
            yield Place(name).finding("code.python", "no config names it")


def _loaded_too(folder: Path, skipped: dict[str, str]) -> Iterator[ScanFinding]:
    """What loaders act on besides the files that the checkpoint's reader uses."""
    try:
        with registry.open_checkpoint(folder) as checkpoint:
            loader_files = checkpoint.loader_files
    except ToolError as error:
        skipped[AS_CHECKPOINT] = error.message
        return
    for files in loader_files:
        severity: Severity = "odd" if changes_weights(files) else "note"
        for name in files.names:
            message = f"{files.sentence}; this format's reader does not use it"
            yield Place(name).finding("files.loaded-too", message, severity=severity, remedy=files.remedy)


def _merged(findings: list[ScanFinding]) -> list[ScanFinding]:
    """One finding for each id, file and part: the first, which says how many more there are."""
    groups: dict[tuple[str, str, str], list[ScanFinding]] = {}
    for finding in findings:
        groups.setdefault((finding.id, finding.file, finding.where), []).append(finding)
    return [
        group[0] if len(group) == 1 else replace(group[0], message=f"{group[0].message} (and {len(group) - 1} more)")
        for group in groups.values()
    ]
