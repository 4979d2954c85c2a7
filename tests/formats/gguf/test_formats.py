"""Reading GGUF files, and what a GGUF cannot say; the writer's files are judged in test_gguf_files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma2tool.containers.gguf import read_header
from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.formats.gguf.format import GGUF
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.hf.format import HuggingFace
from gemma2tool.formats.mapping.transforms import entries
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import SIZES
from gemma2tool.model.config_fields import FULL
from gemma2tool.model.lazy import ArrayTensor
from gemma2tool.quantizers.gguf_types import GGML_BLOCKS
from tests.support.assets import file_assets
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.gguf import options, write

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def written(checkpoint: Checkpoint, folder: Path, **parameters: object) -> Path:
    return write(GGUF().layout(checkpoint, options(**parameters)), folder)[0]


def library_file(
    path: Path, *, drop: tuple[str, ...] = (), extra: dict[str, object] | None = None, type: str = "F32"
) -> dict:
    """SMALL as gguf-py writes it: random tensors in HF's sense (w, not w + 1), returned by canonical name."""
    generator = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "gemma2")
    keys = {
        "context_length": SMALL.max_position_embeddings,
        "embedding_length": SMALL.hidden_size,
        "block_count": SMALL.num_hidden_layers,
        "feed_forward_length": SMALL.intermediate_size,
        "attention.head_count": SMALL.num_attention_heads,
        "attention.head_count_kv": SMALL.num_key_value_heads,
        "attention.key_length": SMALL.head_dim,
        "attention.value_length": SMALL.head_dim,
        "attention.sliding_window": SMALL.sliding_window,
    } | (extra or {})
    for key, value in keys.items():
        if key not in drop:
            writer.add_uint32(f"gemma2.{key}", value)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key not in drop:
            writer.add_float32(f"gemma2.{key}", 12.5)
    writer.add_float32("gemma2.attention.layer_norm_rms_epsilon", 1e-6)
    truth = {}
    shapes = {name: tensor.shape for name, tensor in random_checkpoint(F32).tensors.items()}
    kind = gguf.GGMLQuantizationType[type]
    for entry in entries(TABLE, SMALL):
        (name,) = entry.canonical
        values = (generator.standard_normal(shapes[name]) * 0.25).astype(ml_dtypes.bfloat16).astype(np.float32)
        if len(values.shape) == 1:
            values = np.round(values * 1024) / np.float32(1024)  # w + 1 holds these exactly
            writer.add_tensor(entry.disk, values + np.float32(1))
        else:
            blocks = gguf.quants.quantize(values, kind)
            values = gguf.quants.dequantize(blocks, kind)
            writer.add_tensor(entry.disk, blocks, raw_dtype=kind)
        truth[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.mark.slow
@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_reads_what_the_library_wrote(tmp_path: Path, type: str) -> None:
    truth = library_file(tmp_path / "model.gguf", type=type)
    assert GGUF().detect(tmp_path / "model.gguf")
    with GGUF().open(tmp_path / "model.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == truth.keys()
        for name, tensor in checkpoint.tensors.items():
            assert np.array_equal(tensor.load().astype(np.float32), truth[name]), name
        embedding = checkpoint.tensors["model.embed_tokens.weight"]
        assert embedding.stored == type.lower()
        assert embedding.dtype == {"F16": F16, "BF16": BF16}.get(type, F32)
        assert np.array_equal(embedding.load_rows(7, 9).astype(np.float32), truth["model.embed_tokens.weight"][7:9])


def test_the_config_is_what_llama_cpp_will_run(tmp_path: Path) -> None:
    library_file(tmp_path / "model.gguf")
    with GGUF().open(tmp_path / "model.gguf") as checkpoint:
        config = checkpoint.config
        expected = dataclasses.replace(SMALL, attn_logit_softcapping=12.5, final_logit_softcapping=12.5)
        for field in dataclasses.fields(expected):
            if field.name not in ("dtype", "architectures", "notes"):
                assert getattr(config, field.name) == getattr(expected, field.name), field.name
        assert config.rms_norm_eps == 1e-6


def test_old_files_without_caps_and_window(tmp_path: Path) -> None:
    """Files of June 2024 lack these keys, and llama.cpp fills them in."""
    library_file(
        tmp_path / "model.gguf", drop=("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    )
    with GGUF().open(tmp_path / "model.gguf") as checkpoint:
        assert checkpoint.config.attn_logit_softcapping == 50.0
        assert checkpoint.config.final_logit_softcapping == 30.0
        assert checkpoint.config.sliding_window == 4096


@pytest.mark.parametrize("field", ["query_pre_attn_scalar", "layer_types"])
def test_46_layers_are_taken_for_the_27b(field: str) -> None:
    from gemma2tool.formats.gguf.config import cap_keys, read_config, shape_keys
    from gemma2tool.formats.gguf.key_values import KeyReader

    for size, row in SIZES.items():
        keys = KeyReader(dict([*shape_keys(row), *cap_keys(row)]), "file")
        assert getattr(read_config(keys, row.vocab_size, "bfloat16"), field) == getattr(row, field), size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_there_and_back_bit_for_bit(tmp_path: Path, dtype: np.dtype) -> None:
    """HF -> GGUF -> HF, the norms too where w + 1 can hold them, as it can for bfloat16 values of a trained model's
    size.
    """
    source = random_checkpoint(dtype)
    folder = write_checkpoint(source, tmp_path / "first")
    with HuggingFace().open(folder) as first:
        output = GGUF().layout(first, options())
        lossy = {name for name, _ in output.losses}
        assert lossy == (set() if dtype == BF16 else {name for name in first.tensors if "norm" in name})
        path = write(output, tmp_path)[0]
    with GGUF().open(path) as middle:
        assert all(tensor.stored == ("f32" if "norm" in name else {BF16: "bf16", F16: "f16", F32: "f32"}[dtype])
                   for name, tensor in middle.tensors.items())  # fmt: skip
        second = write_checkpoint(middle, tmp_path / "second")
    with HuggingFace().open(second) as last:
        for name, tensor in source.tensors.items():
            rows = last.tensors[name].load()
            if name not in lossy:
                assert rows.dtype == dtype and rows.tobytes() == tensor.load().tobytes(), name


def test_losses_say_how_much(tmp_path: Path) -> None:
    source = random_checkpoint(BF16)
    tiny = np.full(SMALL.hidden_size, 2.0**-30, BF16)
    source.tensors["model.norm.weight"] = ArrayTensor(tiny)
    assert GGUF().layout(source, options()).losses == [("model.norm.weight", 2.0**-30)]


def test_a_copy_of_a_quantized_file_keeps_every_byte(tmp_path: Path) -> None:
    library_file(tmp_path / "model.gguf", type="Q4_1")
    with GGUF().open(tmp_path / "model.gguf") as source:
        copy = written(source, tmp_path, name="copy.gguf")
        with GGUF().open(copy) as again:
            original, copied = source.metadata["gguf"], again.metadata["gguf"]
            assert original.tensors.keys() == copied.tensors.keys()
            for name, tensor in original.tensors.items():
                other = copied.tensors[name]
                assert tensor.load_blocks(0, tensor.rows).tobytes() == other.load_blocks(0, other.rows).tobytes(), name
            assert {key: v for key, v in copied.kv.items() if not key.startswith("general.")} == {
                key: v for key, v in original.kv.items() if not key.startswith("general.")
            }


def test_requantizing_needs_allow_requantize(tmp_path: Path) -> None:
    truth = library_file(tmp_path / "model.gguf", type="Q4_1")
    with GGUF().open(tmp_path / "model.gguf") as source:
        with pytest.raises(UsageError, match="already q4_1") as refused:
            GGUF().layout(source, options(type="q8_0"))
        assert refused.value.id == "quantize.requantize" and "--allow-requantize" in refused.value.hint
        path = written(source, tmp_path, name="q8.gguf", type="q8_0", allow_requantize=True)
        widened = written(source, tmp_path, name="f32.gguf", dtype="f32")
    with GGUF().open(path) as checkpoint, GGUF().open(widened) as floats:
        for name, values in truth.items():
            assert np.array_equal(floats.tensors[name].load(), values), name
            if len(values.shape) == 2:
                blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
                assert np.array_equal(checkpoint.tensors[name].load(), expected), name


UNSAYABLE = {
    "query_pre_attn_scalar": ({"query_pre_attn_scalar": 24}, "llama.cpp would use 32"),
    "rope scaling": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "linear and yarn"),
    "betas": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "yarn's beta_fast is 16"),
    "stretched": ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factors below 1"),
    "layers": ({"layer_types": (FULL, FULL, FULL)}, "every even layer"),
    "cap": ({"attn_logit_softcapping": None}, "would cap at 50"),
    "activation": ({"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
}


@pytest.mark.parametrize(("change", "words"), UNSAYABLE.values(), ids=UNSAYABLE)
def test_what_gguf_cannot_represent_is_refused(change: dict, words: str) -> None:
    source = random_checkpoint(BF16)
    source.config = dataclasses.replace(source.config, **change)
    for parameters in (options(), options(type="q8_0")):
        with pytest.raises(InputRefused, match=words) as refused:
            GGUF().layout(source, parameters)
        assert refused.value.id == "gguf.cannot-say" and "--allow-mismatch" in refused.value.hint
    assert any(words in warning for warning in GGUF().layout(source, options(allow_mismatch=True)).warnings)


@pytest.mark.parametrize("name", ["lm_head.weight", "score.weight"])
def test_heads_are_refused(name: str) -> None:
    source = random_checkpoint(BF16)
    source.tensors[name] = source.tensors["model.embed_tokens.weight"]
    with pytest.raises(InputRefused, match=name):
        GGUF().layout(source, options())


def test_only_46_layers_imply_the_27b_scalar() -> None:
    from gemma2tool.formats.gguf.config import unrepresentable

    for row in SIZES.values():
        assert not unrepresentable(row, ())
    fewer = dataclasses.replace(SIZES["27b"], num_hidden_layers=44, layer_types=())
    assert "would use 128" in unrepresentable(fewer, ())[0]
    more = dataclasses.replace(SIZES["9b"], num_hidden_layers=46, layer_types=())
    assert "would use 224" in unrepresentable(more, ())[0]


def test_another_rotary_base_is_written_with_a_warning(tmp_path: Path) -> None:
    source = random_checkpoint(BF16)
    source.config = dataclasses.replace(source.config, rope_theta=160000.0)
    output = GGUF().layout(source, options())
    assert any("rope_theta is 160000" in warning for warning in output.warnings)
    with GGUF().open(write(output, tmp_path)[0]) as back:
        assert back.config.rope_theta == 160000.0
    assert not any("rope" in warning for warning in GGUF().layout(random_checkpoint(BF16), options()).warnings)


def test_bidirectional_attention_is_written_with_a_warning(tmp_path: Path) -> None:
    """As the key that llama.cpp reads; back in a folder, as the key that transformers' default attention reads."""
    source = random_checkpoint(BF16)
    source.config = dataclasses.replace(source.config, use_bidirectional_attention=True)
    output = GGUF().layout(source, options())
    assert any("gemma2.attention.causal false" in warning for warning in output.warnings)
    with GGUF().open(write(output, tmp_path)[0]) as back:
        assert back.config.use_bidirectional_attention
        assert back.config.to_hf()["is_causal"] is False
        assert any("sliding window" in sentence for _, sentence in back.facts.assumptions(back.config))


@pytest.mark.slow
def test_bad_weights_name_the_tensor(tmp_path: Path) -> None:
    for value, id in ((np.nan, "weights.nonfinite"), (-np.inf, "weights.nonfinite"), (-7e4, "weights.f16-overflow")):
        for dtype in (F32, BF16):
            source = random_checkpoint(dtype)
            bad = source.tensors["model.layers.1.mlp.up_proj.weight"]
            bad.array[5, 3] = value
            output = GGUF().layout(source, options(type="q8_0"))
            with pytest.raises(InputRefused, match=r"model.layers.1.mlp.up_proj.weight.*\(5, 3\)") as refused:
                write(output, tmp_path, memory=32_000)
            assert refused.value.id == id


def test_the_largest_float16_is_not_an_overflow(tmp_path: Path) -> None:
    source = random_checkpoint(F32)
    source.tensors["model.layers.1.mlp.up_proj.weight"].array[5, 3:5] = (65519.0, -65519.0)
    write(GGUF().layout(source, options(type="q8_0")), tmp_path)


WRONG = {
    "unknown type": ({"type": "q4_k_xxl"}, "q4_k_xxl"),
    "unknown dtype": ({"dtype": "f8"}, "f8"),
    "pattern without a match": ({"type": "q8_0", "tensor_types": [("ffn_dwn", "q4_0")]}, "ffn_dwn"),
    "pattern that is none": ({"type": "q8_0", "tensor_types": [("ffn_(", "q4_0")]}, "regular expression"),
    "type that is none": ({"type": "q8_0", "tensor_types": [("ffn", "q4_x")]}, "Q4_X"),
    "patterns for floats": ({"type": "f16", "tensor_types": [("ffn", "q4_0")]}, "no effect"),
    "patterns without a type": ({"tensor_types": [("ffn", "q4_0")]}, "--type"),
    "low bits without a matrix": ({"type": "iq2_xxs"}, "importance matrix"),
    "override": ({"type": "q8_0", "override_kv": ["gemma2.context_length=2048"]}, "KEY=TYPE:VALUE"),
    "choosing from no matrix": ({"type": "q8_0", "exclude_weights": ["ffn"]}, "entries of an importance matrix"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "words"), WRONG.values(), ids=WRONG)
def test_options_that_cannot_work(parameters: dict, words: str) -> None:
    wide = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512, num_attention_heads=8)
    with pytest.raises(UsageError, match=words):
        GGUF().layout(random_checkpoint(BF16, wide), options(**parameters))


def test_rows_that_do_not_divide_are_reported(tmp_path: Path) -> None:
    source = random_checkpoint(BF16, dataclasses.replace(SMALL, hidden_size=40))
    for parameters in ({"type": "q4_0"}, {"dtype": "q8_0"}):
        output = GGUF().layout(source, options(**parameters))
        assert any("do not divide" in warning for warning in output.warnings)
        with GGUF().open(write(output, tmp_path)[0]) as back:
            assert back.tensors["model.layers.0.self_attn.q_proj.weight"].stored == "f16"


def test_shards_by_size(tmp_path: Path) -> None:
    source = random_checkpoint(BF16)
    output = GGUF().layout(source, options("m.gguf", split_max_size=30_000))
    paths = write(output, tmp_path)
    assert len(paths) > 3 and all(path.name.endswith(f"-of-{len(paths):05d}.gguf") for path in paths)
    for file in output.files:
        held = [tensor.parts[""].nbytes for tensor in output.tensors if tensor.parts[""].file == file.name]
        assert sum(held) <= 30_000 or len(held) == 1
    with GGUF().open(paths[2]) as back:
        for name, tensor in source.tensors.items():
            assert np.array_equal(back.tensors[name].load().astype(np.float32), tensor.load().astype(np.float32)), name
    paths[1].unlink()
    with pytest.raises(InputRefused, match=paths[1].name):
        GGUF().open(paths[0])


def test_other_models_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputRefused, match="'llama'"):
        GGUF().open(path)
    library_file(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(InputRefused):
        GGUF().open(path)
    path.write_bytes(data.replace(b"blk.1.ffn_up", b"blk.1.ffn_xp"))
    with pytest.raises(InputRefused, match=r"up_proj|ffn_xp"):
        GGUF().open(path)
    library_file(path, extra={"embedding_length": 65})
    with pytest.raises(InputRefused, match="shape"):
        GGUF().open(path)


def test_a_given_config_counts(tmp_path: Path) -> None:
    library_file(tmp_path / "model.gguf")
    config = dataclasses.replace(SMALL, query_pre_attn_scalar=16)
    with GGUF().open(tmp_path / "model.gguf", config=config) as checkpoint:
        assert checkpoint.config == config


def test_metadata_of_a_model_card(tmp_path: Path) -> None:
    folder = write_checkpoint(random_checkpoint(BF16), tmp_path / "gemma-2-2b-it-Tuned")
    (folder / "README.md").write_text(
        "---\nlicense: gemma\nbase_model: google/gemma-2-2b-it\nlanguage:\n- en\n- no\ntags: [a, b]\n"
        "pipeline_tag: text-generation\n"
        "---\n# Card\n"
    )
    generation = {"temperature": 0.5, "top_k": 64, "repetition_penalty": 1.5, "top_p": "high"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with HuggingFace().open(folder) as source:
        output = GGUF().layout(source, options())
        kv = read_header(write(output, tmp_path)[0], GGML_BLOCKS).kv
    values = {key: value.value for key, value in kv.items() if key.startswith("general.")}
    assert values["general.name"] == "Gemma 2 2b It Tuned"
    assert values["general.license"] == "gemma"
    assert values["general.base_model.count"] == 1
    assert values["general.base_model.0.name"] == "Gemma 2 2b It"
    assert values["general.base_model.0.repo_url"] == "https://huggingface.co/google/gemma-2-2b-it"
    assert list(values["general.tags"]) == ["a", "b", "text-generation"]
    assert list(values["general.languages"]) == ["en", "no"]
    assert values["general.sampling.temp"] == 0.5 and values["general.sampling.top_k"] == 64
    assert values["general.sampling.penalty_repeat"] == 1.5
    assert any("top_p is 'high'" in warning for warning in output.warnings)
    keys = list(values)
    assert keys.index("general.sampling.top_k") < keys.index("general.name") < keys.index("general.size_label")


def test_numbers_beyond_their_keys(tmp_path: Path) -> None:
    source = random_checkpoint(BF16)
    source.config = dataclasses.replace(source.config, max_position_embeddings=1 << 40)
    with pytest.raises(InputRefused, match="context_length"):
        GGUF().layout(source, options())
    source = random_checkpoint(BF16)
    source.assets = file_assets({"generation_config.json": b'{"top_k": 1e30, "temperature": 1e300, "top_p": 0.5}'})
    output = GGUF().layout(source, options())
    assert sum("left out" in warning for warning in output.warnings) == 2


def test_the_end_of_a_turn_is_a_stop_whatever_the_chat_template(tmp_path: Path) -> None:
    from gemma2tool.formats.gguf.key_values import KeyReader, string, strings, u32
    from gemma2tool.formats.gguf.stops import stop_ids

    kv = {"tokenizer.ggml.eos_token_id": u32(1), "tokenizer.ggml.tokens": strings(["<pad>", "<eos>", "<end_of_turn>"])}
    assert stop_ids(KeyReader(kv, "file")) == (1, 2)
    kv["tokenizer.ggml.eos_token_id"] = u32(2)
    assert stop_ids(KeyReader(kv, "file")) == (2, 1)
    kv["tokenizer.chat_template"] = string("{{ x }}<end_of_turn>")
    assert stop_ids(KeyReader(kv, "file")) == (2, 1)


def test_a_gguf_beside_the_weights_is_not_the_model(tmp_path: Path) -> None:
    folder = write_checkpoint(random_checkpoint(BF16), tmp_path / "model")
    library_file(folder / "model.gguf")
    assert not GGUF().detect(folder) and GGUF().detect(folder / "model.gguf")
    (folder / "model.safetensors").unlink()
    assert GGUF().detect(folder)
    library_file(folder / "other.gguf")
    assert not GGUF().detect(folder)


def test_one_source_written_twice_keeps_its_keys(tmp_path: Path) -> None:
    source = random_checkpoint(BF16)
    first, second = (GGUF().layout(source, options(type=type)) for type in ("q8_0", "q8_0"))
    assert first.files[0].fixed == second.files[0].fixed and first.warnings == second.warnings
    source.config = dataclasses.replace(source.config, vocab_size=161)
    (path,) = write(GGUF().layout(source, options()), tmp_path)
    assert read_header(path, GGML_BLOCKS).kv["gemma2.vocab_size"].value == 161
