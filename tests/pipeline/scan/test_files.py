"""Folders and files: each kind of danger is found where it lies; honest checkpoints of every format are clean."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import pytest

from gemma2tool import api
from gemma2tool.errors import InputRefused
from gemma2tool.pipeline.scan.__main__ import document
from gemma2tool.pipeline.scan.catalog import Place
from gemma2tool.pipeline.scan.keras import scan_hdf5
from gemma2tool.pipeline.scan.sarif import sarif
from tests.support.paths import ROOT, TINY


@pytest.fixture
def model(tmp_path: Path, small_folder: Path) -> Path:
    shutil.copytree(small_folder, tmp_path / "model")
    return tmp_path / "model"


def places(path: Path) -> dict[str, str]:
    """The ids and files of what is not a note."""
    return {finding.id: finding.file for finding in api.scan(path).findings if finding.severity != "note"}


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def test_an_honest_folder_is_clean(model: Path) -> None:
    result = api.scan(model)
    assert result.clean and not result.findings and not result.skipped and result.files > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-bin", "keras", "gguf", "litgpt", "gemma-pytorch", "maxtext", "mlx", "gemma-cpp"])
def test_honest_checkpoints_are_clean(tmp_path: Path, name: str) -> None:
    suffix = {"gguf": ".gguf", "gemma-pytorch": ".ckpt", "gemma-cpp": ".sbs"}.get(name, "")
    api.convert(TINY / "model.ckpt", tmp_path / f"m{suffix}", to=name, verify=False)
    assert api.scan(tmp_path / f"m{suffix}").findings == ()


def test_remote_code(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (model / "modeling.py").write_text("import os\n")
    assert places(model) == {"code.remote": "config.json"}
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    assert [finding.id for finding in api.scan(model).findings] == ["code.python"]


def test_files_that_loaders_act_on(model: Path) -> None:
    edit(model / "adapter_config.json", peft_type="LORA", r=1)
    (model / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "files.loaded-too" in places(model)
    assert "applies the adapter" in " ".join(finding.message for finding in api.scan(model).findings)


def test_what_leads_out_of_the_folder(model: Path) -> None:
    (model / "vocab.txt").symlink_to("/etc/hostname")
    assert places(model) == {"files.escape": "vocab.txt"}
    (model / "vocab.txt").unlink()
    edit(model / "model.safetensors.index.json", weight_map={"a": "../../x.safetensors"})
    assert places(model)["files.escape"] == "model.safetensors.index.json"


def test_a_pointer_is_a_note(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"
    (model / "extra.safetensors").write_text(pointer)
    assert "files.pointer" in {finding.id for finding in api.scan(model).findings}


def test_texts_of_configs_and_names(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token="<eos>\u202e")
    edit(model / "config.json", _name_or_path="a\x1b]0;owned\7")
    (model / "a\u200b.txt").write_text("x")
    assert places(model) == {
        "text.bidirectional": "tokenizer_config.json",
        "text.control": "config.json",
        "text.invisible": "a\u200b.txt",
    }


@pytest.mark.slow
def test_templates_wherever_they_are(model: Path) -> None:
    hostile = "{{ ''.__class__ }}"
    folder = model / "additional_chat_templates"
    folder.mkdir()
    edit(model / "tokenizer_config.json", chat_template=[{"name": "rag", "template": hostile}])
    edit(model / "processor_config.json", chat_template=hostile)
    (model / "config.yaml").write_text(f"name: x\nchat_template: |\n  {hostile}\n")
    for path in (model / "chat_template.jinja", folder / "tool.jinja"):
        path.write_text("\n" + hostile)
    findings = [finding for finding in api.scan(model).findings if finding.id == "template.internals"]
    assert {finding.file: finding.line for finding in findings} == {
        "tokenizer_config.json": None,
        "processor_config.json": None,
        "config.yaml": None,
        "chat_template.jinja": 2,
        "additional_chat_templates/tool.jinja": 2,
    }


@pytest.mark.slow
def test_templates_by_name(model: Path) -> None:
    """A mapping of names to templates, which transformers takes as it is."""
    edit(model / "tokenizer_config.json", chat_template={"default": "a", "rag": "{{ ''.__class__ }}"})
    assert [(f.id, f.where) for f in api.scan(model).findings] == [("template.internals", "chat_template 'rag'")]


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_what_is_there_twice(tmp_path: Path, order: int) -> None:
    """Readers take the first or the last; both are looked at."""
    templates = ['"chat_template": "{{ \'\'.__class__ }}"', '"chat_template": "a"'][::order]
    (tmp_path / "tokenizer_config.json").write_text(f"{{{', '.join(templates)}}}")
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    )
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"xy")
    findings = {(finding.file, finding.id) for finding in api.scan(tmp_path).findings}
    assert findings == {
        ("tokenizer_config.json", "files.ambiguous"),
        ("tokenizer_config.json", "template.internals"),
        ("model.safetensors", "files.ambiguous"),
    }


def test_a_gguf_whose_tensors_are_unknown(tmp_path: Path, hostile_gguf: Path) -> None:
    ids = places(hostile_gguf)
    assert set(ids) == {"template.internals", "text.bidirectional", "text.control"}


def test_keras(tmp_path: Path) -> None:
    layer = {"class_name": "Lambda", "module": "keras.layers", "config": {"function": {"class_name": "__lambda__"}}}
    custom = {"class_name": "Thing", "module": "my_package", "registered_name": "mine>Thing", "config": {}}
    dense = {"class_name": "Dense", "module": "keras.layers", "registered_name": None, "config": {}}
    for name, content in (("lambda", layer), ("foreign", custom), ("honest", dense)):
        (tmp_path / name).mkdir()
        edit(tmp_path / name / "config.json", module="keras", class_name="Model", config={"layers": [content]})
    assert set(places(tmp_path / "lambda")) == {"keras.lambda"}
    assert set(places(tmp_path / "foreign")) == {"keras.foreign"}
    assert places(tmp_path / "honest") == {}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"config": {"layers": [layer]}})
        file["w"] = [1.0]
    assert set(places(tmp_path / "m.h5")) == {"keras.lambda"}


@pytest.mark.parametrize("cut", [1, 15, 24])
def test_a_lambda_at_the_border_of_two_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    text = b'"class_name": "Lambda"'
    monkeypatch.setattr("gemma2tool.pipeline.scan.keras._CHUNK", 64)
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(56 - cut) + text + bytes(64))
    assert [finding.id for finding in scan_hdf5(tmp_path / "m.h5", Place("m.h5"))] == ["keras.lambda"]


def test_members_beyond_the_limit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2tool.pipeline.scan.archives.MAX_MEMBERS", 3)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive, tarfile.open(tmp_path / "m.tar", "w") as tar:
        for number in range(5):
            archive.writestr(f"{number}.txt", "x")
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    with zipfile.ZipFile(tmp_path / "storages.pt", "w") as archive:
        for number in range(5):
            archive.writestr(f"model/data/{number}", "x")
    findings = [(finding.id, finding.file) for finding in api.scan(tmp_path).findings]
    assert sorted(findings) == [("archive.too-many", "m.tar"), ("archive.too-many", "m.zip")]


def test_members_that_cannot_be_read(tmp_path: Path) -> None:
    """Compressed with LZMA and damaged; a local header beyond the end."""
    for name, method in (("lzma.zip", zipfile.ZIP_LZMA), ("header.zip", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            archive.writestr("a.txt", b"some text" * 100)
    damaged = bytearray((tmp_path / "lzma.zip").read_bytes())
    damaged[45:60] = b"\xff" * 15
    (tmp_path / "lzma.zip").write_bytes(damaged)
    cut = bytearray((tmp_path / "header.zip").read_bytes())
    entry = cut.rfind(b"PK\1\2")
    cut[entry + 42 : entry + 46] = (len(cut) - 8).to_bytes(4, "little")
    (tmp_path / "header.zip").write_bytes(cut)
    damaged_files = [finding.file for finding in api.scan(tmp_path).findings if finding.id == "archive.damaged"]
    assert sorted(set(damaged_files)) == ["header.zip", "lzma.zip"]


def test_hdf5_that_reads_other_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["passwd"] = h5py.ExternalLink("/etc/passwd", "/")
    assert set(places(tmp_path / "m.h5")) == {"hdf5.external"}


def test_tar_and_yaml_and_programs(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../x.pkl")
        data = b"cos\nsystem\n(S'id'\ntR."
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    (tmp_path / "a.yaml").write_text("a: 1\nb: !!python/object/apply:os.system ['id']\n")
    (tmp_path / "tool").write_bytes(b"\x7fELF" + bytes(60))
    findings = {finding.id: finding for finding in api.scan(tmp_path).findings}
    assert set(findings) == {"archive.escape", "pickle.code", "yaml.python", "code.binary"}
    assert findings["yaml.python"].line == 2


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputRefused):
        api.scan(tmp_path / "nowhere")


def test_sarif(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that code scanning requires; the whole was validated against the official schema."""
    monkeypatch.chdir(model.parent)
    (model / "chat_template.jinja").write_text("\n{{ ''.__class__ }}")
    edit(model / "tokenizer_config.json", eos_token="<\u202eeos>")
    result = api.scan("model", sarif="out.sarif")
    content = json.loads(Path("out.sarif").read_text())
    assert content["version"] == "2.1.0" and len(content["runs"]) == 1
    run = content["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(run["results"]) == len(result.findings) and "\u202e" not in sarif(result)
    by_rule = {entry["ruleId"]: entry for entry in run["results"]}
    place = by_rule["template.internals"]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "model/chat_template.jinja" and place["region"] == {"startLine": 2}
    assert by_rule["template.internals"]["level"] == "error"
    assert all(rules[entry["ruleIndex"]] == entry["ruleId"] for entry in run["results"])


def test_the_page_is_made_from_the_catalog() -> None:
    assert (ROOT / "docs" / "scan.md").read_text() == document(), "run: python -m gemma2tool.pipeline.scan"


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['id']",
        "%TAG ! tag:yaml.org,2002:python/\n---\n!object/apply:os.system ['id']",
        "%TAG !p! tag:yaml.org,2002:pyth\n---\na: [!p!on/object/apply:os.system ['id']]",
        "%TAG !! tag:yaml.org,2002:python/\n---\n!!object/apply:os.system ['id']",
        "!!%70ython/object/apply:os.system ['id']",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['id']",
        "!<tag:yaml.org,2002:%70ython/object/apply:os.system> ['id']",
    ],
)
def test_python_tags_of_yaml(tmp_path: Path, text: str) -> None:
    for name, encoding in (("a.yaml", "utf-8"), ("b.yml", "utf-16")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert places(tmp_path / name) == {"yaml.python": name}


def test_other_tags_of_yaml_are_not_reported(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "%TAG !e! tag:example.org,2026:\n---\na: !e!x 1\nb: !!str 2\nc: !local 3\nd: 'Hi!'"
    )
    assert places(tmp_path / "a.yaml") == {}


def test_code_that_no_config_names(model: Path) -> None:
    """transformers generates with it; sentence-transformers imports the classes of its modules."""
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs): ...\n")
    assert places(model) == {"code.remote": "custom_generate/generate.py"}
    shutil.rmtree(model / "custom_generate")
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (model / "modules.json").write_text(json.dumps(modules))
    assert "code.remote" not in places(model)
    (model / "modules.json").write_text(json.dumps([*modules, {"type": "custom.Transformer"}]))
    assert places(model)["code.remote"] == "modules.json"
