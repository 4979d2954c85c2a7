"""``verify --engine``: real engines on what gemma2tool writes, and faults that only an engine shows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2tool.engines.run import ENGINES, EngineAnswer, ask, engine_for
from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.pipeline import engines
from gemma2tool.pipeline.engines import TEXTS, EngineChecks, verify_with_engines
from gemma2tool.reference.streaming import logits
from gemma2tool.verify.result import Verification
from tests.support.commands import assert_refused, run
from tests.support.paths import TINY

pytestmark = pytest.mark.peer

EMBEDDING = "token_embd.weight"
LENGTH = 12
"""Tokens that are run; scripts/engine_table.py runs prompts past the sliding window."""
EVERY = pytest.mark.skipif(
    os.environ.get("GEMMA2TOOL_EVERY_ENGINE") != "1", reason="GEMMA2TOOL_EVERY_ENGINE=1 runs every engine, in a minute"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    np.save(folder / "ids.npy", np.load(TINY / "heldout.npy")[0, :LENGTH].astype(np.int64))
    return folder


def written(place: Path, name: str, *words: str) -> Path:
    path = place / name
    if not path.exists():
        command = "quantize" if "--type" in words else "convert"
        result = run(command, TINY / "model.ckpt", path, *words, "--no-verify", "-q")
        assert result.exit_code == 0, result.output
    return path


def verified(path: Path, engine: str, ids: Path) -> Verification:
    with registry.open_checkpoint(path) as candidate:
        return verify_with_engines(candidate, EngineChecks(names=(engine,), ids=np.load(ids)))


def with_tensors(source: Path, path: Path, more: Callable[[dict[str, Any]], dict[str, np.ndarray]]) -> Path:
    """A copy of a GGUF with the tensors that ``more`` makes of those that it has."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "gemma2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in more({tensor.name: tensor.data for tensor in reader.tensors}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def messages(result: Verification) -> str:
    return "\n".join(finding.sentence for finding in result.findings)


@pytest.mark.slow
def test_llama_cpp_runs_what_is_written(place: Path) -> None:
    pytest.importorskip("xllamacpp")
    result = verified(written(place, "q8_0.gguf", "--type", "q8_0"), "llama.cpp", place / "ids.npy")
    assert result.passed, messages(result)
    assert result.verdict == "run as the file means it"
    assert [gate.name.removeprefix("llama.cpp ") for gate in result.gates] == [
        *("loading", "tokens", "template", "stops", "logits", "distribution", "mistakes", "continuation")
    ]
    assert result.gate("llama.cpp continuation").metrics["tokens"] == 16


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "module", "name", "words"),
    [
        ("transformers", "transformers", "hf", ()),
        ("mlx-lm", "mlx_lm", "mlx", ("--to", "mlx")),
        ("keras-hub", "keras_hub", "keras", ("--to", "keras")),
        ("gemma", "gemma.transformer", "flax", ("--to", "flax")),
    ],
)
def test_engines_run_what_is_written(place: Path, engine: str, module: str, name: str, words: tuple[str, ...]) -> None:
    pytest.importorskip(module)
    result = verified(written(place, name, *words), engine, place / "ids.npy")
    assert result.passed, messages(result)


@pytest.mark.slow
def test_google_gemma_finds_a_faulty_config(place: Path) -> None:
    """Google's code reads no config. It takes rope_theta to be 10,000, as in every released Gemma 2."""
    pytest.importorskip("gemma.transformer")
    folder = place / "theta"
    shutil.copytree(written(place, "flax", "--to", "flax"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 500_000.0
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    result = verified(folder, "gemma", place / "ids.npy")
    assert not result.gate("gemma tokens").failed and result.gate("gemma distribution").failed


class TestPlantedFaults:
    """Each is a fault of the file, or of what lies beside it, that the engine alone shows."""

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "THOROUGH_PARAMETERS", 0)

    @pytest.mark.slow
    def test_a_space_before_the_text(self, place: Path) -> None:
        pytest.importorskip("xllamacpp")
        path = place / "space.gguf"
        data = written(place, "q8_0.gguf", "--type", "q8_0").read_bytes()
        key = b"tokenizer.ggml.add_space_prefix"
        flag = data.index(key) + len(key) + 4
        assert data[flag] == 0
        path.write_bytes(data[:flag] + b"\1" + data[flag + 1 :])
        result = verified(path, "llama.cpp", place / "ids.npy")
        assert "a space is put before every text: add_space_prefix is not false" in messages(result)

    @pytest.mark.slow
    def test_another_template(self, place: Path) -> None:
        pytest.importorskip("xllamacpp")
        data = written(place, "q8_0.gguf", "--type", "q8_0").read_bytes()
        old, new = b"'<end_of_turn>\n'", b"'<end_of_turn> '"
        if old not in data:
            old, new = b"<end_of_turn>\\n", b"<end_of_turn>  "
        assert old in data
        path = place / "template.gguf"
        path.write_bytes(data.replace(old, new))
        result = verified(path, "llama.cpp", place / "ids.npy")
        assert "in programs that do not run Jinja, a conversation becomes" in messages(result)

    @pytest.mark.slow
    def test_an_untied_head(self, place: Path) -> None:
        """llama.cpp has no place for an output matrix in a Gemma 2."""
        pytest.importorskip("xllamacpp")
        source = written(place, "f32.gguf", "--dtype", "f32")
        path = with_tensors(source, place / "untied.gguf", lambda tensors: {"output.weight": tensors[EMBEDDING] * 2})
        result = verified(path, "llama.cpp", place / "ids.npy")
        assert result.gate("llama.cpp loading").failed
        assert "output.weight: llama.cpp does not load a Gemma 2 with it" in messages(result)

    @pytest.mark.slow
    def test_a_scale_of_a_whole_nvfp4_tensor(self, place: Path) -> None:
        """llama.cpp loads it, and leaves the scale out of a Gemma 2's feed-forward layers. No engine need run to see
        it."""
        pytest.importorskip("xllamacpp")
        source = written(place, "nvfp4.gguf", "--type", "nvfp4")
        name = "blk.0.ffn_gate.scale"
        path = with_tensors(source, place / "scaled.gguf", lambda _: {name: np.ones(1, np.float32)})
        words = f"'{name}' is the scale of a whole tensor"
        assert_refused(run("verify", path, "--engine", "llama.cpp"), 3, words, "llama.cpp")

    @EVERY
    @pytest.mark.slow
    def test_an_adapter_beside_the_weights(self, place: Path) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        folder = place / "adapter"
        shutil.copytree(written(place, "hf"), folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(model, config).save_pretrained(place / "lora")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(place / "lora" / name, folder / name)
        result = verified(folder, "transformers", place / "ids.npy")
        assert not result.passed
        assert "adapter_config.json, adapter_model.safetensors: transformers applies the adapter" in messages(result)

    @pytest.mark.slow
    def test_a_wrong_ignore_list(self, place: Path) -> None:
        pytest.importorskip("compressed_tensors")
        pytest.importorskip("transformers")
        folder = written(place, "w8a16", "--type", "w8a16", "--to", "hf", "--skip", r"layers\.0\.mlp")
        config = json.loads((folder / "config.json").read_text())
        ignored = config["quantization_config"]["ignore"]
        assert "model.layers.0.mlp.up_proj" in ignored
        ignored.remove("model.layers.0.mlp.up_proj")
        wrong = place / "ignore"
        shutil.copytree(folder, wrong)
        (wrong / "config.json").write_text(json.dumps(config))
        result = verified(wrong, "transformers", place / "ids.npy")
        assert not result.passed
        assert "model.layers.0.mlp.up_proj.weight is stored unquantized" in messages(result)


@pytest.fixture(scope="module")
def truth(place: Path) -> tuple[Path, EngineAnswer]:
    """A folder, and the answer of an engine that makes no mistake."""
    folder = written(place, "hf")
    ids = np.load(place / "ids.npy")
    with registry.open_checkpoint(folder) as checkpoint:
        tokenizer = engines.PromptTokenizer(checkpoint)
        outputs = logits(checkpoint, ids[None])[0]
        first = int(outputs[-1].argmax())
        second = int(logits(checkpoint, np.append(ids, first)[None])[0, -1].argmax())
        answer = EngineAnswer(
            version="engine 1",
            tokens=tuple(tuple(tokenizer.encode(text)) for text in TEXTS),
            has_template=True,
            template=tokenizer.chat(engines.PROMPT),
            stops=frozenset(tokenizer.stop_ids()),
            logits=outputs,
            continuation=(first, second),
        )
    return folder, answer


def with_answer(monkeypatch: pytest.MonkeyPatch, folder: Path, ids: Path, answer: EngineAnswer) -> Verification:
    monkeypatch.setattr(engines, "ask", lambda engine, checkpoint, question: answer)
    return verified(folder, "transformers", ids)


MISTAKES: list[tuple[Callable[[EngineAnswer], EngineAnswer], str, str]] = [
    (lambda a: replace(a, refused="KeyError: 'x'"), "loading", "engine 1 does not run it: KeyError: 'x'"),
    (lambda a: replace(a, problems=("ignores: x.weight",)), "loading", "ignores: x.weight"),
    (lambda a: replace(a, tokens=tuple(ids[1:] for ids in a.tokens or ())), "tokens", "no bos is put before a text"),
    (
        lambda a: replace(a, tokens=tuple((2, *ids) for ids in a.tokens or ())),
        "tokens",
        "bos is put before a text twice",
    ),
    (lambda a: replace(a, tokens=((2, 7), *(a.tokens or ())[1:])), "tokens", "1 of 17 texts get other ids: 'Hello"),
    (lambda a: replace(a, template=None), "template", "the checkpoint has a chat template, the engine has none"),
    (lambda a: replace(a, template="User: x"), "template", "a conversation becomes 'User: x', by the checkpoint's"),
    (lambda a: replace(a, stops=frozenset({1})), "stops", "an answer does not end at <end_of_turn> (107)"),
    (lambda a: replace(a, logits=a.logits * np.nan), "logits", "NaN or infinite"),
    (lambda a: replace(a, logits=np.roll(a.logits, 1, 0)), "mistakes", "one position too late"),
    (lambda a: replace(a, continuation=(a.continuation[0], 300)), "continuation", "token 2 after the prompt is"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "gate", "message"), MISTAKES, ids=[row[2][:30] for row in MISTAKES])
def test_each_gate_finds_its_mistake(
    truth: tuple[Path, EngineAnswer], place: Path, monkeypatch: pytest.MonkeyPatch, mistake, gate: str, message: str
) -> None:
    pytest.importorskip("transformers")
    folder, answer = truth
    result = with_answer(monkeypatch, folder, place / "ids.npy", mistake(answer))
    assert result.gate(f"transformers {gate}").failed
    assert message in messages(result)


@pytest.mark.slow
def test_a_right_answer_passes(truth: tuple[Path, EngineAnswer], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    folder, answer = truth
    result = with_answer(monkeypatch, folder, place / "ids.npy", answer)
    assert result.passed and not list(result.failures)


class TestRequests:
    def test_unknown_missing_and_wrong_engines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="'vllm' is not an engine"):
            engine_for("vllm", "hf")
        with pytest.raises(UsageError, match=r"llama.cpp does not load the format hf") as caught:
            engine_for("llama.cpp", "hf")
        assert caught.value.hint == "engines that do: transformers, mlx-lm"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        for name, engine in ENGINES.items():
            with pytest.raises(UsageError, match=f"{name} is not installed") as caught:
                engine_for(name, engine.formats[0])
            assert caught.value.hint.startswith("pip install ")

    @pytest.mark.slow
    def test_the_command_line(self, place: Path) -> None:
        folder = written(place, "hf")
        assert_refused(run("verify", folder, "--engine", "lama.cpp"), 2, "not an engine", "llama.cpp")
        assert_refused(run("verify", folder, "--engine", "llama.cpp"), 2, "does not load the format hf")
        assert_refused(run("verify", folder, "--engine", "transformers", "--reference", folder), 2, "--engine")

    @pytest.mark.slow
    def test_a_process_that_dies_is_a_failed_gate(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = replace(ENGINES["llama.cpp"], module="nowhere", formats=("hf",))
        with registry.open_checkpoint(written(place, "hf")) as checkpoint:
            question = engines.EngineQuestion([2, 3], 1, (), ())
            answer = ask(engine, checkpoint, question)
        assert answer.logits is None and "No module named" in str(answer.refused)
