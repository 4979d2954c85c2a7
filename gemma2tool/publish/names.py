"""Names of a release: of its files, as publishers name them (``Gemma-2-9b-it-Q4_K_M.gguf``), types, repositories."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gemma2tool.errors import UsageError, choices
from gemma2tool.formats import packings, registry
from gemma2tool.formats.other_files import MODEL_SUFFIXES
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.pipeline.output_names import check_type
from gemma2tool.quantizers.mixtures import ALIASES, FILE_TYPES
from gemma2tool.receipt.document import SUFFIX as RECEIPT
from gemma2tool.sources.archive import SUFFIXES

CARD, CHECKSUMS, IMATRIX = "README.md", "SHA256SUMS", ".imatrix.gguf"

_FIELD = re.compile(r"\{([^{}]*)\}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
_REPOSITORY = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
FIELDS = ("model", "type")


def model_name(source: Checkpoint) -> str:
    """The name of a model for the names of its files: that of its repository, folder or file, with a capital."""
    if source.address is not None and source.address.startswith("hf://"):
        name = source.address.split("/")[3].partition("@")[0]
    else:
        path = Path(str(source.known_as)) if source.address else source.path.absolute()
        name = path.name
        for suffix in (*SUFFIXES, *MODEL_SUFFIXES):
            if name.lower().endswith(suffix):
                name = name[: -len(suffix)]
        if name.lower() in ("model", "pytorch_model", "consolidated"):  # the folder tells more
            name = path.parent.name
    name = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII).strip("-.") or "model"
    return name[:1].upper() + name[1:]


def check_model_name(name: str) -> None:
    """Raises ``UsageError`` (``release.name``) for a model's name that files and the card cannot have."""
    if not _PLAIN.fullmatch(name):
        raise UsageError("release.name", f"--name {name!r}: is not a plain file name")


def repository_name(text: str, option: str) -> str:
    """ORG/NAME from "ORG/NAME" or "hf://ORG/NAME"; raises ``UsageError`` (``publish.name``) for anything else."""
    match = _REPOSITORY.fullmatch(text)
    if match is None:
        raise UsageError("publish.name", f"{option} {text!r} is not the name of a repository", hint="write ORG/NAME")
    return match[1]


def check_types(types: Iterable[str]) -> None:
    """Raises ``UsageError`` for a type that no release can have."""
    for type in types:
        if type not in packings.TYPES and ALIASES.get(type, type) not in FILE_TYPES:
            hint = choices.hint(type, (*FILE_TYPES, *packings.TYPES))
            raise UsageError("type.unknown", f"--types {type}: no such type", hint=hint)
        check_type(format_of(type), type)


def check_template(template: str, types: tuple[str, ...]) -> None:
    """Raises ``UsageError`` (``release.template``) for a template of names that cannot serve."""
    names = _FIELD.findall(template)
    for name in names:
        if name not in FIELDS:
            hint = choices.hint(name, FIELDS)
            raise UsageError("release.template", f"--name-template {template!r}: {{{name}}} is not known", hint=hint)
    if "type" not in names and len(types) > 1:
        raise UsageError("release.template", f"--name-template {template!r}: has no {{type}}, and there are several")
    plain = _FIELD.sub("x", template)
    if not _PLAIN.fullmatch(plain):
        raise UsageError("release.template", f"--name-template {template!r}: is not a plain file name")


def check_names(names: Iterable[str], template: str, model: str) -> None:
    """Raises ``UsageError`` (``release.template``) for outputs with the name of another file of the release, also where
    case does not count.
    """
    taken = {name.lower() for name in (CARD, CHECKSUMS, f"{model}{IMATRIX}")}
    for name in names:
        if name.lower() in taken or name.lower().endswith(RECEIPT):
            raise UsageError("release.template", f"--name-template {template!r}: {name} is another file of the release")
        taken.add(name.lower())


def output_name(template: str, model: str, type: str) -> str:
    """The name of the output of a type: GGUF's in capitals and with their suffix, folders' as they are typed."""
    is_gguf = format_of(type) == "gguf"
    values = {"model": model, "type": type.upper() if is_gguf else type}
    name = _FIELD.sub(lambda match: values[match[1]], template)
    return f"{name}.gguf" if is_gguf else name


def format_of(type: str) -> str:
    """The format that a type is released in: GGUF, or a quantized folder."""
    return registry.for_destination(Path("folder"), None, type) if type in packings.TYPES else "gguf"
