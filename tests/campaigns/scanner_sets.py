"""Which of the model scanners' own public test files are hostile, and where they are fetched from.

The files belong to those projects and are not part of this repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDRESS = "https://github.com/{}.git"
PICKLESCAN, MODELAUDIT, GLYPHHOUND = "mmaitre314/picklescan", "promptfoo/modelaudit", "ydarwish1/glyphhound"
FICKLING, MODELSCAN = "trailofbits/fickling", "protectai/modelscan"
REPOSITORIES = (PICKLESCAN, MODELAUDIT, GLYPHHOUND, FICKLING, MODELSCAN)
"""fickling and modelscan make their files while their tests run; what they hold is taken, too."""

_PICKLES, _ASSETS = "tests/data*/*", "tests/assets"
_SAFE = (
    "benign*", "bad_pytorch.pt", "int_array*", "object_array*", "new_pytorch_model.bin", "not_a_pickle.bin",
    "pytorch_model.bin", "safe_*", "*_benign_*",
)  # fmt: skip
_OTHER = ("*.py", "*.md", "*.7z", "simple_nested.pkl")
"""No models, an archive that nothing here unpacks, and a pickle in a pickle that does nothing."""

SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "picklescan's hostile files": ((PICKLESCAN, _PICKLES),),
    "modelaudit's hostile files": tuple(
        (MODELAUDIT, f"{_ASSETS}/{pattern}")
        for pattern in (
            "exploits/*.pkl", "pickles/*.pkl", "samples/pickles/*.p*kl*", "samples/keras/malicious*",
            "samples/pytorch/malicious*", "samples/archives/path_traversal.zip",
        )
    ),
    "modelscan's hostile files": ((MODELSCAN, "tests/data/unsafe*"),),
    "fickling's hostile files": ((FICKLING, "test*/**/*.pkl"), (FICKLING, "example/*.pt*")),
    "GlyphHound's hostile chat templates": tuple(
        (GLYPHHOUND, pattern)
        for pattern in ("fixtures/malicious/*.jinja", "fixtures/sandbox/*.jinja", "benchmark/payloads/*.jinja")
    ),
    "modelaudit's hostile chat templates": tuple(
        (MODELAUDIT, f"{_ASSETS}/samples/jinja2/{pattern}")
        for pattern in ("malicious*", "malicious/*", "obfuscated/*", "standalone/malicious*")
    ),
    "honest files": (
        (PICKLESCAN, _PICKLES),
        *((MODELAUDIT, f"{_ASSETS}/samples/{kind}/safe_*") for kind in ("pickles", "keras", "pytorch", "archives")),
    ),
    "honest chat templates": (
        (GLYPHHOUND, "corpus/templates/*.jinja"),
        (GLYPHHOUND, "fixtures/benign/*.jinja"),
        (GLYPHHOUND, "benchmark/payloads/*_benign_*.jinja"),
        *((MODELAUDIT, f"{_ASSETS}/samples/jinja2/{pattern}") for pattern in ("benign*", "benign/*")),
    ),
}  # fmt: skip
"""Name of a set: repositories and patterns of files in them."""


def fetch(folder: Path) -> Path:
    """Clone the repositories that are not in ``folder`` yet, each without its history; the folder of the sets."""
    for repository in REPOSITORIES:
        place = folder / repository.replace("/", "+")
        if not place.exists():
            words = ["git", "clone", "--quiet", "--depth", "1", ADDRESS.format(repository), str(place)]
            subprocess.run(words, check=True)
    return arrange(folder)


def arrange(folder: Path) -> Path:
    """Copy the files of every set into a folder of its own. Chat templates become a tokenizer_config.json each, because
    that is where scanners look for them.
    """
    sets = folder / "sets"
    shutil.rmtree(sets, ignore_errors=True)
    for name in SETS:
        for number, file in enumerate(_files(folder, name)):
            place = sets / name / f"{number:03}"
            place.mkdir(parents=True)
            if name.endswith("chat templates"):
                (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": _template(file)}))
            else:
                shutil.copyfile(file, place / file.name)
    return sets


def _files(folder: Path, name: str) -> Iterator[Path]:
    """The files of a set. picklescan has honest and hostile ones in the same folders."""
    for repository, pattern in SETS[name]:
        for file in sorted((folder / repository.replace("/", "+")).glob(pattern)):
            safe = any(file.match(other) for other in _SAFE)
            belongs = (safe or pattern != _PICKLES) if name.startswith("honest") else not safe
            if belongs and file.is_file() and not any(file.match(other) for other in _OTHER):
                yield file


def _template(file: Path) -> str:
    """A chat template: the text of a file, or the field of a JSON file."""
    text = file.read_text("utf-8")
    return str(json.loads(text)["chat_template"]) if file.suffix == ".json" else text
