"""What git does in a folder because of files that came with it: hooks, and settings that name programs.

An archive can hold a ``.git`` folder, and git, a shell's prompt and editors read its settings as soon as they are used
there. A folder of any name with HEAD, objects and refs is a repository, too. What clones of hubs hold is not reported:
git-lfs's filters and hooks, the transfer agents of huggingface_hub. Sources: git-config(1), githooks(5),
gitattributes(5), gitmodules(5), git's config.c; git-lfs's lfs/hook.go and git-lfs-config(5); CVE-2018-17456,
CVE-2022-24765.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.storage.quoting import quoted

FOLDER = ".git"
MAX_BYTES = 1 << 20
"""Of a file of settings that is read."""
MAX_FILES = 1000
"""Of a repository that are looked at."""

_SECTION = re.compile(r'\[\s*([A-Za-z0-9.-]+)(?:[ \t]+"((?:\\.|[^"\\\n])*)")?\s*\]')
_KEY = re.compile(r'([A-Za-z][A-Za-z0-9-]*)[ \t]*(?:=((?:"(?:\\[\s\S]|[^"\\])*"|\\[\s\S]|[^"\\\n#;])*))?')
_SKIPPED = re.compile(r"\s+|[#;][^\n]*")
_ESCAPES = re.compile(r'\\(\r?\n|[\s\S])|"')

_NAMES_PROGRAM = re.compile(
    r"core\.(?:fsmonitor|sshcommand|gitproxy|askpass|pager|editor|hookspath|alternaterefscommand)|sequence\.editor"
    r"|diff\.external|diff\..*\.(?:command|textconv)|merge\..*\.driver|filter\..*\.(?:clean|smudge|process)"
    r"|interactive\.difffilter|gpg\.(?:.*\.)?(?:program|defaultkeycommand)|credential\.(?:.*\.)?helper|pager\..*"
    r"|uploadpack\.packobjectshook|remote\..*\.(?:uploadpack|receivepack|vcs)|hook\..*\.command|tar\..*\.command"
    r"|(?:difftool|mergetool|browser|man|guitool)\..*\.(?:cmd|path)|trailer\..*\.(?:command|cmd)|web\.browser"
    r"|lfs\.customtransfer\..*\.path|lfs\.extension\..*\.(?:clean|smudge)|imap\.tunnel|sendemail\..*cmd"
)
_LEADS_ELSEWHERE = re.compile(r"include\.path|includeif\..*\.path|init\.templatedir")
_HARMLESS = (
    (re.compile(r"core\.fsmonitor"), re.compile(r"true|false|yes|no|on|off|\d*", re.I)),
    (re.compile(r"filter\.lfs\.\w+"), re.compile(r"git-lfs (?:clean|smudge|filter-process)(?: --skip)?(?: -- %f)?")),
    (re.compile(r"lfs\.customtransfer\.\w+\.path"), re.compile(r"huggingface-cli|hf|git-xet")),
    (re.compile(r"credential\..*helper"), re.compile(r"|store|cache|osxkeychain|libsecret|manager(?:-core)?|wincred")),
    (re.compile(r"(?:core\.|sequence\.)editor"), re.compile(r"vim?|nvim|nano|emacs|code(?: --wait| -w)?")),
    (re.compile(r"core\.pager|pager\.\w+"), re.compile(r"less(?: -[A-Za-z]+)?|more|cat|delta|true|false")),
    (re.compile(r"gpg\..*program"), re.compile(r"gpg2?|ssh-keygen|gpgsm")),
)  # fmt: skip
"""Keys and values that name what git itself, git-lfs or a hub's client put there."""
_HOOKS = re.compile(
    r"(?:applypatch-msg|pre-applypatch|post-applypatch|pre-commit|pre-merge-commit|prepare-commit-msg|commit-msg|"
    r"post-commit|pre-rebase|post-checkout|post-merge|pre-push|pre-receive|update|proc-receive|post-receive|"
    r"post-update|reference-transaction|push-to-checkout|pre-auto-gc|post-rewrite|sendemail-validate|"
    r"fsmonitor-watchman|post-index-change|p4-changelist|p4-prepare-changelist|p4-post-changelist|p4-pre-submit)",
    re.I,
)
_LFS_HOOK = re.compile(
    r"#!/bin/sh\n(?:command -v git-lfs >/dev/null 2>&1 \|\| "
    r"\{ (?:echo|printf) >&2 (?:\"[^\"`$]*\" ?){1,2}; exit \d; \}\n)?"
    r"\s*git lfs (?:pre-push|post-checkout|post-commit|post-merge|push --stdin) (?:\"\$@\"|\$\*)\s*"
)
_MEMBER = re.compile(r"(?:^|.*/)\.git(?:/modules/.+|/worktrees/[^/]+)?/(?:(config(?:\.worktree)?)|hooks/([^/]+))", re.I)


def is_repository(name: str, folders: Collection[str], names: Collection[str]) -> bool:
    """Whether git takes a folder with these contents for a repository's own."""
    shaped = "HEAD" in names and ("commondir" in names or {"objects", "refs"} <= set(folders))
    return shaped or name.lower() == FOLDER


def scan_repository(folder: Path, place: Place) -> Iterator[ScanFinding]:
    """The findings of a repository's own folder and of those of its submodules. Its objects are not looked at."""
    for count, path in enumerate(sorted(folder.rglob("config*")) + sorted(folder.rglob("hooks/*"))):
        inside = path.relative_to(folder)
        if count >= MAX_FILES:
            yield place.finding("archive.too-many", f"only {MAX_FILES} of its settings and hooks were looked at")
            return
        if inside.parts[0] in ("objects", "refs", "logs", "lfs") or not path.is_file():
            continue
        part = Place(f"{place.file}/{inside.as_posix()}")
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve().parent):
            yield part.finding("files.escape", f"it is a link to {quoted(str(path.readlink()), 200)}")
            continue
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
            if file.read(1):
                yield part.finding("files.unread", f"only its first {MAX_BYTES:,} bytes were looked at", severity="odd")
        if path.name in ("config", "config.worktree"):
            yield from scan_settings(data.decode("utf-8", "replace"), part)
        elif path.parent.name == "hooks":
            yield from scan_hook(path.name, data, part, executable=path.stat().st_mode & 0o111 != 0)


def is_member(name: str) -> bool:
    """Whether a member of an archive would be a repository's settings or one of its hooks."""
    return _MEMBER.fullmatch(name.replace("\\", "/")) is not None


def scan_member(name: str, data: bytes, place: Place) -> Iterator[ScanFinding]:
    """The findings of a member of an archive that would be part of a repository's own folder."""
    if match := _MEMBER.fullmatch(name.replace("\\", "/")):
        if match[1]:
            yield from scan_settings(data[:MAX_BYTES].decode("utf-8", "replace"), place)
        else:
            yield from scan_hook(match[2], data, place, executable=True)


def scan_hook(name: str, data: bytes, place: Place, *, executable: bool) -> Iterator[ScanFinding]:
    """The finding of a file in the folder of hooks, if git runs it and git-lfs did not install it."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    if not _HOOKS.fullmatch(name) or not data.strip() or _LFS_HOOK.fullmatch(text):
        return
    if executable:
        yield place.finding("git.hook", f"git runs it as {name}")
    else:
        yield place.finding("git.hook", f"git would run it as {name} if it were executable", severity="note")


def scan_settings(text: str, place: Place) -> Iterator[ScanFinding]:
    """The settings that name programs, or other files of settings."""
    for key, value, line in settings(text):
        if _runs(key, value):
            yield place.finding("git.program", f"{key} is {quoted(value, 200)}", line=line)


def scan_modules(text: str, place: Place) -> Iterator[ScanFinding]:
    """The findings of .gitmodules: addresses that git takes for options or commands, and paths out of the folder."""
    for key, value, line in settings(text):
        leads_out = key.endswith(".path") and (value.startswith(("/", "-")) or ".." in value.split("/"))
        if leads_out or (key.endswith(".url") and value.startswith("-")) or _runs(key, value):
            yield place.finding("git.program", f"{key} is {quoted(value, 200)}", line=line)


def scan_lfs(text: str, place: Place) -> Iterator[ScanFinding]:
    """The findings of .lfsconfig, which says where the large files come from."""
    for key, value, line in settings(text):
        if key in ("lfs.url", "lfs.pushurl") or re.fullmatch(r"remote\..*\.lfs(?:push)?url", key):
            yield place.finding("files.elsewhere", f"{key} is {quoted(value, 200)}", line=line, severity="odd")


def scan_attributes(text: str, place: Place) -> Iterator[ScanFinding]:
    """Filters in .gitattributes other than git-lfs's."""
    for number, line in enumerate(text.splitlines(), start=1):
        names = [] if line.startswith("#") else re.findall(r"\sfilter=(\S+)", line)
        if others := [name for name in names if name != "lfs"]:
            yield place.finding("git.attributes", f"it names the filter {quoted(others[0])}", line=number)
            return


def settings(text: str) -> Iterator[tuple[str, str, int]]:
    """The keys (in lower case but for subsections), values and lines of a file in git's format, as far as git reads
    it.
    """
    section, at = "", 1 if text.startswith("\ufeff") else 0
    line, counted = 1, 0
    while at < len(text):
        if skipped := _SKIPPED.match(text, at):
            at = skipped.end()
        elif header := _SECTION.match(text, at):
            name, sub = header[1].lower(), header[2]
            section, at = f"{name}.{_ESCAPES.sub(_unescaped, sub)}" if sub is not None else name, header.end()
        elif key := _KEY.match(text, at):
            value = "true" if key[2] is None else _ESCAPES.sub(_unescaped, key[2].strip()).strip()
            line, counted = line + text.count("\n", counted, at), at
            yield f"{section}.{key[1].lower()}", value, line
            at = key.end()
        else:
            at = text.find("\n", at) + 1 or len(text)  # git stops here


def _unescaped(match: re.Match[str]) -> str:
    character = match[1]
    if character is None or character.endswith("\n"):
        return ""
    return {"n": "\n", "t": "\t", "b": "\b"}.get(character, character)


def _runs(key: str, value: str) -> bool:
    """Whether a setting makes git run something, or read more settings that may."""
    if any(keys.fullmatch(key) and values.fullmatch(value) for keys, values in _HARMLESS):
        return False
    lower = key.lower()
    if lower.startswith("alias.") or (lower.startswith("submodule.") and lower.endswith(".update")):
        return value.startswith("!")
    if lower.endswith((".url", ".pushurl", ".insteadof", ".pushinsteadof")) or lower.startswith("url."):
        return value.startswith("ext::") or key[4:].startswith("ext::")
    if lower == "protocol.ext.allow":
        return value != "never"
    return bool(_NAMES_PROGRAM.fullmatch(lower) or _LEADS_ELSEWHERE.fullmatch(lower))
