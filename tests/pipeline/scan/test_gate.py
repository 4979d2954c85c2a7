"""A conversion refuses a dangerous template by name, carries it if asked to, and warns of what is odd."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused
from gemma2tool.pipeline.conversion import save
from tests.support.paths import TINY

HOSTILE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ cycler.__init__.__globals__ }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixture as a folder, with a hostile template."""
    path = tmp_path_factory.mktemp("gate") / "hf"
    api.convert(TINY / "model.ckpt", path, verify=False)
    for name in ("tokenizer_config.json", "tokenizer.model", "generation_config.json"):
        if (TINY / name).exists() and not (path / name).exists():
            shutil.copy(TINY / name, path)
    (path / "chat_template.jinja").write_text(HOSTILE)
    return path


@pytest.mark.slow
def test_a_dangerous_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused) as refused:
        api.convert(folder, tmp_path / "x.gguf", verify=False)
    assert refused.value.id == "template.unsafe" and "'__globals__'" in refused.value.message
    assert "--allow-unsafe-template" in refused.value.hint
    assert not list(tmp_path.iterdir())
    with api.open(folder) as source, pytest.raises(InputRefused):
        save(source, tmp_path / "x.gguf")


@pytest.mark.slow
def test_it_is_carried_if_it_is_allowed(folder: Path, tmp_path: Path, logged: StringIO) -> None:
    run = api.RunOptions(allow_unsafe_template=True)
    api.convert(folder, tmp_path / "x.gguf", verify=False, run=run)
    assert "template.internals" in logged.getvalue()
    with api.open(tmp_path / "x.gguf") as written:
        assert written.tokenizer.chat_template == HOSTILE


@pytest.mark.slow
def test_what_is_odd_is_a_warning(folder: Path, tmp_path: Path, logged: StringIO) -> None:
    source = tmp_path / "odd"
    shutil.copytree(folder, source)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\u200b{% endfor %}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}))
    api.convert(source, tmp_path / "x.gguf", verify=False)
    assert "U+200B (ZERO WIDTH SPACE)" in logged.getvalue() and "not carried into the output" in logged.getvalue()


@pytest.mark.slow
def test_an_honest_source_gives_no_warning(tmp_path: Path, logged: StringIO) -> None:
    api.convert(TINY / "model.ckpt", tmp_path / "x.gguf", verify=False)
    assert logged.getvalue() == ""
