"""What a user may choose of a quantized folder: group sizes, symmetry, zero points, which weights; and
what is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer

from gemma2tool.cli.main import app
from gemma2tool.errors import UsageError
from gemma2tool.formats import packings, registry
from gemma2tool.formats.option_info import option_fields, type_names
from gemma2tool.formats.options import GROUP_SIZES, GGUFOptions, PackingOptions, SplitOptions
from gemma2tool.formats.options_calibration import Calibration
from gemma2tool.formats.packings import Settings
from gemma2tool.model.lazy import ArrayTensor
from tests.support.checkpoints import SMALL, random_checkpoint, write_checkpoint
from tests.support.commands import assert_refused, run
from tests.support.packings import NAME, encoded, spec, stored_as

CONFIG = dataclasses.replace(
    SMALL, hidden_size=256, intermediate_size=384, num_attention_heads=4, head_dim=64, num_key_value_heads=2
)
LINEAR = 7 * CONFIG.num_hidden_layers
SINGLE_TYPES = {kind: sizes for kind, sizes in GROUP_SIZES.items() if kind in packings.TYPES}
"""Without mlx-lm's recipes, which mix several types."""

PAIRS = [(kind, size) for kind, sizes in SINGLE_TYPES.items() for size in sizes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        random_checkpoint(np.dtype(ml_dtypes.bfloat16), CONFIG), tmp_path_factory.mktemp("source") / "hf"
    )


def stored(path: Path) -> dict[str, str]:
    with registry.open_checkpoint(path) as checkpoint:
        return {name: tensor.stored for name, tensor in checkpoint.tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), PAIRS)
def test_every_group_size(source: Path, tmp_path: Path, kind: str, size: int) -> None:
    """Written, stated in the config, read back accordingly, within the type's bound group by group."""
    result = run("quantize", source, tmp_path / "out", "--type", kind, "--group-size", size, "--quiet")
    assert result.exit_code == 0, result.output
    with registry.open_checkpoint(tmp_path / "out") as output:
        tensor = output.tensors["model.layers.0.mlp.down_proj.weight"]
        assert tensor.stored == stored_as(kind) and (tensor.group_size or 384) == (384 if size == -1 else size)
        config = output.metadata["quantization_config"]
    if "config_groups" in config:
        weights = next(iter(config["config_groups"].values()))["weights"]
        assert (weights["strategy"], weights["group_size"]) == (("channel", None) if size == -1 else ("group", size))
    elif "quant_type" in config:
        data = config["quant_type"]["default"]["_data"]
        assert data.get("weight_granularity", {"_data": data})["_data"]["group_size"] == size
    else:
        assert config["group_size"] == size


def test_smaller_groups_are_closer() -> None:
    values = np.random.default_rng(0).standard_t(4, (64, 512)).astype(np.float32) * 0.02
    for kind, sizes in SINGLE_TYPES.items():
        errors = []
        for size in sizes:
            settings = Settings(kind, PackingOptions(group_size=size))
            source = ArrayTensor(values.astype(ml_dtypes.bfloat16))
            parts = encoded(packings.encoder_for(spec(NAME, (64, 512)), settings, source), source, 100)
            raw = {packings.part_name(NAME, suffix): ArrayTensor(part) for suffix, part in parts.items()}
            back = packings.unpack(raw, packings.quantization_config(settings))[NAME]
            errors.append(float(np.square(back.load_rows_f32(0, 64) - values).mean()))
        assert errors == sorted(errors), kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq-4", "gptq-8"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetry", ["--sym", "--asym"])
def test_gptq_choices(source: Path, tmp_path: Path, kind: str, label: str, symmetry: str) -> None:
    """Both conventions say the same; zero points of their own are closer where weights lean to one side."""
    result = run("quantize", source, tmp_path / "out", "--type", kind, "--gptq-format", label, symmetry, "--quiet")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["checkpoint_format"], config["sym"]) == (label, symmetry == "--sym")


def test_both_conventions_hold_the_same_values() -> None:
    """Also where all weights of a group are positive, whose zero point would be 0 and carry into its neighbour when
    stored minus one.
    """
    from gemma2tool.quantizers import gptq
    from gemma2tool.quantizers.bitpack import unpack_words

    values = np.abs(np.random.default_rng(0).standard_normal((16, 256))).astype(np.float32) + 0.5
    values[8:] -= 1
    dequantized = []
    for label in gptq.CHECKPOINT_FORMATS:
        encoder = gptq.Gptq(4, 64, symmetric=False, checkpoint_format=label)
        parts = encoder.finish(values.shape, encoder.encode(values))
        assert label != "gptq" or unpack_words(parts["qzeros"], 4).max() < 15
        codes = unpack_words(np.ascontiguousarray(parts["qweight"].T), 4)
        zeros = gptq.unpack_zeros(parts["qzeros"], 4, label).T
        dequantized.append(gptq.dequantize(codes, zeros, parts["scales"].T, parts["g_idx"]))
    assert np.array_equal(*dequantized)
    assert np.abs(dequantized[0] - values).max() <= (values.max() + 1) / 14 / 2 * 1.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in packings.TYPES if name not in GROUP_SIZES])
def test_types_without_groups_say_so(source: Path, tmp_path: Path, kind: str) -> None:
    assert_refused(
        run("quantize", source, tmp_path / "out", "--type", kind, "--group-size", 64),
        2,
        f"--group-size has no effect for {kind}",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--type", "gptq-4", "--group-size", 100), "no groups of 100"),
        (("--type", "mlx-4", "--group-size", -1), "no groups of -1"),
        (("--type", "gptq-4", "--gptq-format", "gptq_v3"), "gptq_v3"),
        (("--type", "gptq-4", "--calibration", "x.npy", "--calibration-method", "textbok"), "textbook"),
        (("--type", "awq-4", "--gptq-format", "gptq_v2"), "--gptq-format"),
        (("--type", "nf4", "--asym"), "--asym"),
        (("--type", "w4a16", "--double-quant"), "--double-quant has no effect for w4a16"),
        (("--type", "nf4", "--skip", "layers.7"), "layers.7"),
        (("--type", "nf4", "--only", "mlp.*gate", "--only", "experts"), "experts"),
        (("--type", "nf4", "--skip", "("), "put a backslash"),
        (("--type", "nf4", "--skip", ""), "--skip '' matches every tensor"),
        (("--type", "nf4", "--only", "mlp", "--only", ""), "--only '' matches every tensor"),
        (("--type", "nf4", "--gptq-format", "gptq"), "--gptq-format has no effect for nf4"),
        (("--type", "nf4", "--gptq-format", "gptq"), "it is for gptq-4 and gptq-8"),
        (("--type", "nf4", "--only", "embed_tokens"), "nothing would be quantized"),
        (("--type", "nf4", "--skip", "proj"), "nothing would be quantized"),
        (("--type", "mlx-4", "--to", "hf"), "mlx-4"),
        (("--type", "nf4", "--to", "mlx"), "nf4"),
    ],
)
def test_what_is_refused(source: Path, tmp_path: Path, words: tuple, message: str) -> None:
    assert_refused(run("quantize", source, tmp_path / "out", *words), 2, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "types"),
    [
        (
            ("--group-size", 64),
            "awq-4, gptq-4, gptq-8, mlx-2, mlx-3, mlx-4, mlx-5, mlx-6, mlx-8, mlx-mixed-2-6, mlx-mixed-3-4,"
            " mlx-mixed-3-6, mlx-mixed-4-6, torchao-int4, torchao-int8-int4, w4a16, w4a16-asym, w4afp8 and w8a16",
        ),
        (("--asym",), "gptq-4 and gptq-8"),
        (("--sym",), "gptq-4 and gptq-8"),
        (("--gptq-format", "gptq"), "gptq-4 and gptq-8"),
        (("--double-quant",), "nf4 and fp4"),
        (("--skip", "mlp"), "quantized folders"),
        (("--only", "mlp"), "quantized folders"),
    ],
)
def test_gguf_has_options_of_its_own(source: Path, tmp_path: Path, words: tuple, types: str) -> None:
    """The hint names the types that take the option, and they do take it."""
    result = run("quantize", source, tmp_path / "x.gguf", "--type", "q8_0", *words)
    assert_refused(result, 2, "has no effect for gguf", f"it is for {types}")
    if types != "quantized folders":
        for kind in types.replace(" and ", ", ").split(", "):
            assert (
                run("quantize", source, tmp_path / "out", "--type", kind, *words, "--dry-run", "--quiet").exit_code == 0
            )


def test_an_invalid_pattern_for_tensors_of_a_gguf(source: Path, tmp_path: Path) -> None:
    result = run(
        "quantize", source, tmp_path / "x.gguf", "--type", "q8_0", "--tensor-type", "(=q4_0", "--allow-mismatch"
    )
    assert_refused(result, 2, "'(' is not a regular expression", "put a backslash")


def test_help_names_the_types_that_take_an_option() -> None:
    """Each option's help begins with the types that take it, and those are the ones that the command accepts."""
    help_texts = {
        param.opts[0]: param.help
        for param in typer.main.get_command(app).commands["quantize"].params
        if param.param_type_name == "option"
    }
    for group in (GGUFOptions, PackingOptions, Calibration, SplitOptions):
        for _, info in option_fields(group):
            help_text = help_texts[info.flag.split("/")[0]]
            assert help_text == info.help_below(group.HEADING)
            assert all(re.search(rf"(?<![\w-]){kind}(?![\w-])", help_text) for kind in type_names(info.types))
    whole = {kind for kind, sizes in GROUP_SIZES.items() if -1 in sizes}
    assert "all but MLX and torchao also -1" in help_texts["--group-size"]
    assert whole == {kind for kind in GROUP_SIZES if not kind.startswith(("mlx-", "torchao-"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", packings.TYPES)
def test_skip_and_only(source: Path, tmp_path: Path, kind: str) -> None:
    """Left as they are, bit for bit, and listed where the consumer looks; the head with them, which a list would
    forget.
    """
    words = (
        "--type",
        kind,
        "--skip",
        "layers.1.mlp",
        "--only",
        "mlp",
        "--only",
        "q_proj$",
        "--skip",
        "layers.2.*down_proj.weight",
    )
    result = run("quantize", source, tmp_path / "out", *words, "--no-verify", "--quiet")
    assert result.exit_code == 0, result.output
    types = stored(tmp_path / "out")
    quantized = {name for name, type in types.items() if type != "bf16"}
    expected = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)}
    expected |= {f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 2) for part in ("gate", "up", "down")}
    expected -= {"model.layers.2.mlp.down_proj.weight"}
    assert quantized == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    listed = config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert") or config.get("ignore")
    if listed is not None:
        assert "lm_head" in listed and "model.layers.1.mlp.up_proj" in listed
        assert len([name for name in listed if name.startswith("model.layers.")]) == LINEAR - len(expected)
    else:
        assert kind.startswith(("gptq-", "mlx-"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", packings.TYPES)
def test_heads_and_embeddings_are_never_quantized_but_by_mlx(tmp_path: Path, kind: str) -> None:
    """Whatever is asked for: bitsandbytes' list replaces its default, and the loader then takes the head for a
    quantized layer.
    """
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    source = random_checkpoint(np.dtype(ml_dtypes.bfloat16), untied)
    words = {"only": ["."], "skip": ["layers.0.mlp.up_proj"]}
    if kind.startswith("mlx"):
        assert packings.encoder_for(
            source.specs["lm_head.weight"], Settings(kind, PackingOptions(**words)), source.tensors["lm_head.weight"]
        )
        return
    types = stored(write_checkpoint(source, tmp_path / "out", type=kind, **words))
    assert (
        types["lm_head.weight"]
        == types["model.embed_tokens.weight"]
        == types["model.layers.0.mlp.up_proj.weight"]
        == "bf16"
    )
    assert types["model.layers.0.mlp.down_proj.weight"] == stored_as(kind)


@pytest.mark.slow
def test_remarks(source: Path, tmp_path: Path) -> None:
    """A request that cannot be met in full, and a choice that one of the consumers cannot load, are said."""
    result = run("quantize", source, tmp_path / "out", "--type", "gptq-4", "--only", "embed|q_proj", "--no-verify")
    assert result.exit_code == 0
    assert "model.embed_tokens.weight is left unquantized" in result.stderr
    assert "vLLM, which fuses them" in result.stderr
    result = run(
        "quantize",
        source,
        tmp_path / "more",
        "--type",
        "gptq-4",
        "--skip",
        "layers.0.mlp",
        "--skip",
        "lm_head",
        "--no-verify",
    )
    assert result.exit_code == 0 and "vLLM" not in result.stderr
    result = run("quantize", source, tmp_path / "asym", "--type", "w4a16-asym", "--no-verify")
    assert result.exit_code == 0 and "dequantize=True" in result.stderr
    result = run("quantize", source, tmp_path / "rows", "--type", "gptq-4", "--group-size", -1, "--no-verify")
    assert result.exit_code == 0 and "one scale for each row" in result.stderr


def test_settings_of_an_unknown_type_are_refused() -> None:
    with pytest.raises(UsageError, match="no type 'q9'"):
        packings.quantization_config(Settings("q9"))


@pytest.mark.slow
def test_compute_dtype_is_the_models(source: Path, tmp_path: Path) -> None:
    """transformers' default, float32, makes a bfloat16 model slow and large; a float32 model keeps it."""
    for dtype, name in (("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")):
        run("quantize", source, tmp_path / dtype, "--type", "nf4", "--dtype", dtype, "--no-verify", "--quiet")
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == config["dtype"] == name


def test_what_is_collected_of_a_tensor_does_not_wait_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's words lie across the rows, so they are collected; a whole model's would be as large as its output."""
    import weakref

    from gemma2tool.quantizers.gptq import Gptq

    pieces: list[weakref.ref] = []
    most = 0
    encode, finish = Gptq.encode, Gptq.finish

    def noting(self: Gptq, rows: np.ndarray) -> dict:
        result = encode(self, rows)
        pieces.append(weakref.ref(result["qweight"]))
        return result

    def counting(self: Gptq, shape: tuple, collected: dict) -> dict:
        nonlocal most
        most = max(most, sum(piece() is not None for piece in pieces))
        return finish(self, shape, collected)

    monkeypatch.setattr(Gptq, "encode", noting)
    monkeypatch.setattr(Gptq, "finish", counting)
    write_checkpoint(
        random_checkpoint(np.dtype(ml_dtypes.bfloat16), CONFIG), tmp_path / "out", type="gptq-4", threads=1
    )
    assert len(pieces) >= LINEAR and most <= 2
