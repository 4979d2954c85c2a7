"""Files that a program acts on by their names, although no config of the model names them: Python, debuggers, editors,
git, pip, Ollama, the desktop.

Sources: Python's site module; pdb; VS Code's tasks and the specification of development containers; pip's requirements
files; Ollama's page in the Hugging Face hub's documentation; Windows' shortcuts, which load icons from where they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath

from gemma2tool.pipeline.scan import git
from gemma2tool.pipeline.scan.archives import Content
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.finding import ScanFinding
from gemma2tool.pipeline.scan.modelfile import NAME as MODELFILE
from gemma2tool.pipeline.scan.modelfile import scan_modelfile
from gemma2tool.pipeline.scan.text import scan_text
from gemma2tool.storage.quoting import quoted

MAX_BYTES = 1 << 20
"""Of a file that is read."""
_ScanText = Callable[[str, Place], Iterator[ScanFinding]]

_LIBRARIES = re.compile(
    r"(?:torch|numpy|transformers|safetensors|tokenizers|accelerate|peft|gguf|keras|keras_hub|tensorflow|jax|flax|"
    r"orbax|mlx|mlx_lm|vllm|llama_cpp|bitsandbytes|sentencepiece|huggingface_hub|requests|httpx|tqdm|yaml|jinja2|"
    r"regex|filelock|packaging|typing_extensions|scipy|pandas)"
)
_STANDARD = re.compile(
    r"(?:random|json|re|logging|pathlib|typing|collections|functools|struct|copy|enum|inspect|socket|ssl|threading|"
    r"queue|tempfile|shutil|time|datetime|hashlib|uuid|platform|warnings|contextlib|dataclasses|importlib|pickle|"
    r"zipfile|urllib|http|string|secrets|subprocess|argparse|ast|base64|bisect|concurrent|ctypes|decimal|fractions|"
    r"gzip|heapq|hmac|itertools|locale|math|mmap|multiprocessing|numbers|operator|traceback|unicodedata|weakref)"
)
"""Modules of the standard library that programs import after the start, when a file of the same name in the folder
comes first; without those that honest files are called after.
"""
_STARTUP = ("sitecustomize.py", "usercustomize.py")
_PTH_CODE = re.compile(r"^import[ \t].*", re.M)
_EDITORS = re.compile(r"(?:^|/)(?:\.pdbrc|\.gdbinit|\.lldbinit|\.exrc|\.vimrc|\.nvimrc|\.nvim\.lua)$")
_SHORTCUTS = (".lnk", ".scf", ".library-ms", ".searchconnector-ms", ".url", ".desktop")
_ON_OPENING = re.compile(r'"runOn"\s*:\s*"folderOpen"|"initializeCommand"\s*:')
_ASSISTANTS = re.compile(
    r"(?:^|/)(?:\.mcp\.json|\.(?:cursor|vscode|kiro)/mcp\.json|\.claude/settings(?:\.local)?\.json)$"
)
_UNICODE_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_OPENED = re.compile(
    r"(?:^|/)(?:\.vscode/tasks\.json|\.devcontainer(?:/.*)?/?(?:devcontainer)?\.json|[^/]*\.code-workspace)$"
)
_REQUIREMENTS = re.compile(
    r"(?:^|/)(?:requirements[^/]*\.txt|constraints[^/]*\.txt|environment\.ya?ml|pip\.(?:conf|ini))$"
)
_COMMENT = re.compile(r"(?:^|\s)#.*")
_TRUSTED_HOST = re.compile(r"trusted-host\b[ \t=]*\S*")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:[^/@\s]*@)?([^/:\s\"';]*)[^\s\"';]*")
_SECURE = ("https", "ssh", "git+https", "git+ssh", "file")
_KNOWN_HOSTS = re.compile(
    r"(?:.*\.)?(?:pypi\.org|pythonhosted\.org|pytorch\.org|nvidia\.com|github\.com|github\.io|githubusercontent\.com"
    r"|gitlab\.com|huggingface\.co|hf\.co|googleapis\.com|pkg\.dev|vllm\.ai|flashinfer\.ai|anaconda\.org|pyg\.org)"
)
_ON_THE_HUB = ("template", "params", "system")


def scan_acted_on(content: Content, place: Place) -> Iterator[ScanFinding]:
    """The findings of a file that a program acts on because of its name."""
    location = content.name if content.depth else place.file
    if scan := _scan_of(location.replace("\\", "/")):
        text = content.head(MAX_BYTES)
        if content.nbytes > MAX_BYTES and b"\0" not in text:  # not weights, as torch.save's .pth is
            message = f"of its {content.nbytes:,} bytes only {MAX_BYTES:,} were looked at"
            yield place.finding("files.unread", message, severity="odd")
        yield from scan(text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "replace"), place)
    if content.depth and git.is_member(content.name):
        yield from git.scan_member(content.name, content.head(git.MAX_BYTES), place)
    if content.path is not None and location in _ON_THE_HUB and any(content.path.parent.glob("*.gguf")):
        yield place.finding(
            "files.loaded-too", "Ollama uses it when it pulls the repository from the hub", severity="note"
        )
    if _shadows(location, content):
        yield place.finding("code.startup", "Python started in its folder imports it in place of the library")


def _scan_of(location: str) -> _ScanText | None:
    """What looks at a file of this name."""
    lower = location.lower()
    name = PurePosixPath(lower).name
    by_name: dict[str, _ScanText] = {
        ".gitmodules": git.scan_modules,
        ".lfsconfig": git.scan_lfs,
        ".gitattributes": git.scan_attributes,
        **dict.fromkeys(_STARTUP, partial(_always, "code.startup", "Python runs it when it starts with this folder")),
    }
    by_form: tuple[tuple[bool, _ScanText], ...] = (
        (MODELFILE.fullmatch(name) is not None, _modelfile),
        (name.endswith(".pth"), _path_file),
        (_OPENED.search(lower) is not None, _opened),
        (_REQUIREMENTS.search(lower) is not None, _requirements),
        (
            _EDITORS.search(lower) is not None,
            partial(_always, "code.editor", "a program started in its folder runs it"),
        ),
        (_ASSISTANTS.search(lower) is not None, _assistant),
        (name.endswith(_SHORTCUTS), partial(_always, "files.shortcut", "it is a shortcut")),
        (name == "desktop.ini", _desktop),
    )
    return by_name.get(name) or next((scan for matches, scan in by_form if matches), None)


def _always(id: str, message: str, text: str, place: Place) -> Iterator[ScanFinding]:
    if text.strip():
        yield place.finding(id, message)


def _modelfile(text: str, place: Place) -> Iterator[ScanFinding]:
    yield from scan_modelfile(text, place)
    yield from scan_text(text, place, located=not place.where)


def _path_file(text: str, place: Place) -> Iterator[ScanFinding]:
    """A .pth file that is not torch's: Python runs its lines that begin with "import"."""
    if "\0" not in text and "\ufffd" not in text and (match := _PTH_CODE.search(text)):
        yield place.finding(
            "code.startup",
            f"Python runs {quoted(match[0], 200)} if it is in a folder of packages",
            line=text.count("\n", 0, match.start()) + 1,
        )


def _opened(text: str, place: Place) -> Iterator[ScanFinding]:
    plain = _UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    if match := _ON_OPENING.search(plain):
        yield place.finding("code.editor", f"it has {quoted(match[0])}: an editor that opens the folder runs it")


def _assistant(text: str, place: Place) -> Iterator[ScanFinding]:
    yield place.finding("code.editor", "a coding assistant started here may run the programs it names", severity="note")


def _desktop(text: str, place: Place) -> Iterator[ScanFinding]:
    if "\\\\" in text:
        yield place.finding("files.shortcut", "Windows loads its icon from another machine")


def _requirements(text: str, place: Place) -> Iterator[ScanFinding]:
    """Packages that pip takes from places other than the public indexes."""
    for number, line in enumerate(text.splitlines(), start=1):
        words = _COMMENT.sub("", line)
        named = [match[0] for match in _URL.finditer(words) if not _is_public(match[1].lower(), match[2].lower())]
        for address in named + _TRUSTED_HOST.findall(words):
            yield place.finding("code.packages", f"it names {quoted(address, 200)}", line=number)


def _is_public(scheme: str, host: str) -> bool:
    return scheme in _SECURE and (scheme == "file" or _KNOWN_HOSTS.fullmatch(host) is not None)


def _shadows(location: str, content: Content) -> bool:
    """Whether Python, started in the file's folder, takes it for a library. Not in a package, whose modules have the
    package's name before their own.
    """
    path = PurePosixPath(location.replace("\\", "/"))
    if path.suffix not in (".py", ".pyc"):
        return False
    is_package = path.stem == "__init__"
    name = path.parent.name if is_package else path.stem
    if not (_LIBRARIES.fullmatch(name) or _STANDARD.fullmatch(name)):
        return False
    if content.path is None:
        return len(path.parts) == 1 + is_package
    folder = content.path.parent.parent if is_package else content.path.parent
    return not (folder / "__init__.py").exists() and folder.name not in ("src", "site-packages", "dist-packages")
