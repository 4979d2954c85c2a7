"""The registry: one line a format, facts that cost nothing to import, and the config that a checkpoint is read with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma2tool.errors import ToolError
from gemma2tool.formats import registry
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.formats import suffix_of, write_as

MADE_UP = {
    "__init__.py": """
from gemma2tool.model.format_facts import FormatFacts

FACTS = FormatFacts("made-up", files="NAME.made", suffixes=(".made",))
""",
    "format.py": """
from pathlib import Path

from gemma2tool.formats.base import Format, Output, OutputFile
from gemma2tool.formats.registry import by_name
from made_up import FACTS


class MadeUp(Format):
    facts = FACTS

    def detect(self, path: Path) -> bool:
        return path.is_file() and path.read_bytes() == b"made up"

    def open(self, path, *, config=None):
        raise NotImplementedError

    def layout(self, checkpoint, options):
        return Output(self.name, True, [OutputFile(options.name, 7, [(0, b"made up")])], [])


FORMAT = MadeUp()
""",
}


@pytest.mark.slow
def test_a_new_format_takes_a_package_and_a_line(tmp_path: Path) -> None:
    """In a process of its own, because the registry reads its lines when it is imported."""
    (tmp_path / "made_up").mkdir()
    for name, text in MADE_UP.items():
        (tmp_path / "made_up" / name).write_text(text)
    code = f"""
import sys
from pathlib import Path
source = Path({registry.__file__!r}).read_text()
first = '    "gemma2tool.formats.gguf",'
assert first in source
import gemma2tool.formats
module = type(sys)("gemma2tool.formats.registry")
sys.modules["gemma2tool.formats.registry"] = gemma2tool.formats.registry = module
exec(compile(source.replace(first, '    "made_up",' + chr(10) + first), "registry", "exec"), module.__dict__)
from gemma2tool import api
from gemma2tool.formats.catalog import format_entries
assert [entry.files for entry in format_entries() if entry.format == "made-up"] == ["NAME.made"]
assert module.for_destination(Path("x.made"), None) == "made-up" and ".made" in module.FILE_SUFFIXES
api.convert(sys.argv[1], sys.argv[2], verify=False)
assert Path(sys.argv[2]).read_bytes() == b"made up" and module.detect(Path(sys.argv[2])).name == "made-up"
"""
    source = write_as("hf", random_checkpoint(np.dtype(np.float32)), tmp_path / "hf")
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "x.made")]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(registry.__file__).parents[2]}", "PATH": ""}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_names_and_suffixes_are_unique() -> None:
    assert len(set(registry.NAMES)) == len(registry.PACKAGES) == len(registry.FACTS)
    assert len(set(registry.FILE_SUFFIXES)) == len(registry.FILE_SUFFIXES)


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_format_has_the_facts_of_its_package(name: str) -> None:
    assert registry.by_name(name).facts is registry.FACTS[name]
    assert registry.for_destination(Path(f"x{suffix_of(name)}"), None) == (name if suffix_of(name) else "hf")


def test_facts_import_nothing_heavy() -> None:
    code = "import sys; from gemma2tool.formats import registry; print('numpy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_given_config_is_for_checkpoints_without_one(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(np.dtype(np.float32), replace(SMALL, num_hidden_layers=2, layer_types=()))
    path = write_as(name, source, tmp_path / f"model{suffix_of(name)}")
    assert registry.config_for(path, SMALL) is None
    assert registry.config_for(path, None) is None
    if path.is_dir():
        for config in (path / "config.json", path / "hf_config.json"):
            config.unlink(missing_ok=True)
        try:
            lacks_config = registry.config_for(path, SMALL) is SMALL
        except ToolError:
            lacks_config = True  # without a config the folder is not recognized at all
        assert lacks_config
