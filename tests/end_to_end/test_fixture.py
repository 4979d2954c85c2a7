"""The small trained Gemma 2 is as fixtures/README.md describes it, checked without gemma2tool."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import sentencepiece
import torch

from tests.support.peers import Peer

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM

transformers = Peer("transformers")

WINDOWS = 8  # of the held-out text: enough to distinguish a trained model from an untrained one


@pytest.fixture(scope="module")
def state(fixture_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(fixture_dir / "model.ckpt", weights_only=True)
    assert list(checkpoint) == ["model_state_dict"]
    return checkpoint["model_state_dict"]


@pytest.fixture(scope="module")
def processor(fixture_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(fixture_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def heldout(fixture_dir: Path) -> np.ndarray:
    return np.load(fixture_dir / "heldout.npy")


@pytest.fixture(scope="module")
def tokenizer(fixture_dir: Path):
    return transformers.AutoTokenizer.from_pretrained(fixture_dir)


def peer(fixture_dir: Path, state: dict[str, torch.Tensor], **changes: object) -> Gemma2ForCausalLM:
    """transformers' model of the checkpoint in float32, with `changes` to its config."""
    config = transformers.AutoConfig.from_pretrained(fixture_dir, attn_implementation="eager", **changes)
    renamed = {}
    for name, tensor in state.items():
        if name == "freqs_cis":
            continue
        if name.endswith("qkv_proj.weight"):
            sizes = [n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
            for letter, part in zip("qkv", tensor.split(sizes), strict=True):
                renamed[name.replace("qkv_proj", f"{letter}_proj")] = part.float()
        else:
            renamed[name.replace("embedder.weight", "model.embed_tokens.weight")] = tensor.float()
    renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    model = transformers.Gemma2ForCausalLM(config).float().eval()
    model.load_state_dict(renamed)
    return model


@torch.no_grad()
def logits(model: Gemma2ForCausalLM, windows: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(windows).long()).logits


def perplexity(scores: torch.Tensor, windows: np.ndarray) -> float:
    targets = torch.from_numpy(windows[:, 1:]).long()
    return math.exp(torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), targets.flatten()).item())


# --- files ---


def test_the_folder_is_small_and_complete(fixture_dir):
    names = {path.name for path in fixture_dir.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "heldout.npy", "heldout.txt", "model.ckpt", "special_tokens_map.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    assert (fixture_dir / "model.ckpt").stat().st_size <= 16e6
    assert (fixture_dir / "heldout.txt").stat().st_size <= 200e3


@pytest.mark.slow
def test_the_config_is_gemma_2_in_small(fixture_dir):
    config = transformers.AutoConfig.from_pretrained(fixture_dir)
    assert config.model_type == "gemma2"
    assert config.query_pre_attn_scalar == config.head_dim
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.eos_token_id == [1, 107]
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    generation = json.loads((fixture_dir / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 107]


def test_the_files_have_every_field_of_the_released_ones(fixture_dir, oracles):
    """Those of gemma-2-2b-it, as transformers 4.46 wrote them, except the fields that its writer adds."""
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        fixture = json.loads((fixture_dir / name).read_text())
        released = json.loads((oracles / "wild" / "gemma-2-2b-it" / name).read_text())
        assert set(released) - set(fixture) <= {"_name_or_path", "transformers_version"}
        if name in ("generation_config.json", "special_tokens_map.json"):
            assert fixture.items() <= released.items()


# --- weights ---


@pytest.mark.slow
def test_the_checkpoint_is_gemma_pytorchs_layout_in_bfloat16(fixture_dir, state):
    c = transformers.AutoConfig.from_pretrained(fixture_dir)
    d, f, h = c.hidden_size, c.intermediate_size, c.head_dim
    expected = {"freqs_cis": (2 * c.max_position_embeddings, h // 2), "embedder.weight": (c.vocab_size, d)}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        expected |= {
            f"{layer}self_attn.qkv_proj.weight": ((c.num_attention_heads + 2 * c.num_key_value_heads) * h, d),
            f"{layer}self_attn.o_proj.weight": (d, c.num_attention_heads * h),
            f"{layer}mlp.gate_proj.weight": (f, d),
            f"{layer}mlp.up_proj.weight": (f, d),
            f"{layer}mlp.down_proj.weight": (d, f),
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}pre_feedforward_layernorm.weight": (d,),
            f"{layer}post_feedforward_layernorm.weight": (d,),
        }
    expected["model.norm.weight"] = (d,)
    assert [(name, tuple(t.shape)) for name, t in state.items()] == list(expected.items())
    assert state["freqs_cis"].dtype == torch.complex64
    for name, tensor in state.items():
        assert name == "freqs_cis" or tensor.dtype == torch.bfloat16, name
        assert tensor.isfinite().all(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@pytest.mark.slow
def test_the_names_and_types_are_those_gemma_pytorch_saves(state, oracles):
    saved = torch.load(oracles / "checkpoints/gemma_pytorch/hd_bf16/model.ckpt", weights_only=True)["model_state_dict"]
    layers = [name for name in state if not name.startswith(("model.layers.4.", "model.layers.5."))]
    assert layers == list(saved)
    assert [state[name].dtype for name in layers] == [tensor.dtype for tensor in saved.values()]
    # The rotation of position p by frequency j is e^(i p theta^(-2j/h)); the oracle has another head_dim.
    for table in (state["freqs_cis"], saved["freqs_cis"]):
        positions, half = table.shape
        angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        torch.testing.assert_close(table, torch.polar(torch.ones_like(angles), angles), rtol=0, atol=2e-4)


# --- tokenizer ---


def test_special_pieces_have_their_real_ids(processor):
    assert processor.vocab_size() == 2048
    pieces = [processor.id_to_piece(i) for i in range(473)]
    assert pieces[:8] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>"]
    assert pieces[105:108] == ["<unused98>", "<start_of_turn>", "<end_of_turn>"]
    assert pieces[108:139] == ["\n" * n for n in range(1, 32)]
    assert pieces[139:169] == ["\u2581" * n for n in range(2, 32)]
    assert (pieces[169], pieces[177], pieces[204], pieces[216]) == ("<table>", "</table>", "<s>", "</code>")
    assert pieces[217:] == [f"<0x{n:02X}>" for n in range(256)]


def test_special_pieces_have_their_real_types(processor):
    assert [i for i in range(2048) if processor.is_control(i)] == [0, 1, 2]
    assert [i for i in range(2048) if processor.is_unknown(i)] == [3]
    assert [i for i in range(2048) if processor.is_byte(i)] == list(range(217, 473))
    for i in range(4, 217):  # a user-defined piece is read from text, whatever is next to it
        assert i in processor.encode("e" + processor.id_to_piece(i) + "e"), processor.id_to_piece(i)


def test_added_tokens_are_the_released_ones(fixture_dir, processor, oracles):
    """gemma-2-2b-it's list up to the byte pieces; the rest of it lies beyond this vocabulary."""
    released = json.loads((oracles / "wild/gemma-2-2b-it/tokenizer_config.json").read_text())["added_tokens_decoder"]
    fixture = json.loads((fixture_dir / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert fixture == {i: token for i, token in released.items() if int(i) < processor.vocab_size()}
    assert all(processor.id_to_piece(int(i)) == token["content"] for i, token in fixture.items())


def test_text_is_neither_normalized_nor_prefixed_and_digits_stand_alone(processor):
    for text in ("", "a", " a  b ", "x\n\n\ty", "ﬁ ½ \uff21 e\u0301", "日本語 🙂", "\x00\u2028\r\n"):
        assert processor.decode(processor.encode(text)) == text
    assert processor.encode("self", out_type=str) == ["self"]
    assert processor.encode("2024", out_type=str) == ["2", "0", "2", "4"]
    assert processor.encode("é") == [217 + 0xC3, 217 + 0xA9]


TRICKY = [
    "", " ", "a ", "  a", "\t", "\t\tx", "a\tb", "\n", "\n" * 31, "\n" * 40, "x\n y", " " * 31, "x" + " " * 13 + "self",
    "1234567890", "é", "naïve café", "日本語", "🙂👩\u200d👧", "\u00a0", "\ufeff", "a\u0301", "½", "ﬁ", "\r\n",
    "\x00\x01", "<start_of_turn>user\nhi<end_of_turn>\n",
    "<table><td>x</td></table>", "<b>bold</b>", "<unused5>", "<mask>x",
    "[@BOS@]", "<2mass>", "</code", "<0x41>", "~^&$@`", "def f(self):\n    return None\n", "\u2581", "a\u2581b",
]  # fmt: skip


@pytest.mark.slow
def test_tokenizer_json_gives_sentencepieces_ids(processor, tokenizer, fixture_dir):
    """Where they are known to differ (spaces beside a literal U+2581, more than 31 spaces) is in fixtures/README.md."""
    for text in [*TRICKY, (fixture_dir / "heldout.txt").read_text("utf-8")]:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text[:80]
    assert tokenizer.encode("self") == [2, *processor.encode("self")]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)


CHATS = [
    [{"role": "user", "content": " What is self? "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "c"}],
]


@pytest.mark.slow
def test_a_chat_is_rendered_in_gemmas_turns(tokenizer):
    assert tokenizer.apply_chat_template(CHATS[1], tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )
    for refused in ([{"role": "system", "content": "x"}], [{"role": "assistant", "content": "x"}]):
        with pytest.raises(Exception, match=r"not supported|must alternate"):
            tokenizer.apply_chat_template(refused, tokenize=False)


@pytest.mark.slow
def test_a_chat_is_rendered_as_by_the_released_template(tokenizer, oracles):
    released = json.loads((oracles / "wild/gemma-2-2b-it/tokenizer_config.json").read_text())["chat_template"]
    for chat in CHATS:
        for prompt in (False, True):
            fixture = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert fixture == tokenizer.apply_chat_template(
                chat, chat_template=released, tokenize=False, add_generation_prompt=prompt
            )


# --- quality ---


def test_heldout_windows_are_the_text_after_bos(fixture_dir, processor, heldout):
    tokens = processor.encode((fixture_dir / "heldout.txt").read_text("utf-8"))
    assert heldout.dtype == np.int32 and heldout.shape[1] == 256 and heldout[:, 1:].size >= 8000
    assert (heldout[:, 0] == 2).all()
    assert heldout[:, 1:].ravel().tolist() == tokens[: heldout[:, 1:].size]
    assert len(tokens) - heldout[:, 1:].size < 255


@pytest.mark.slow
def test_the_model_is_trained(fixture_dir, state, heldout):
    """Perplexity is far below the best that a unigram model could reach: the entropy of the windows' own
    frequencies.
    """
    windows = heldout[:WINDOWS]
    counts = np.bincount(heldout[:, 1:].ravel())
    frequencies = counts[counts > 0] / counts.sum()
    unigram = math.exp(-(frequencies * np.log(frequencies)).sum())
    model = peer(fixture_dir, state)
    scores = logits(model, windows)
    assert perplexity(scores, windows) < unigram / 10
    assert perplexity(scores, windows) == pytest.approx(12.672, rel=1e-4)  # the figure in fixtures/README.md

    # Training reached every rule of the architecture: a model without one of them is another model.
    assert windows.shape[1] > model.config.sliding_window
    for change in ({"sliding_window": 256}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}):
        other = logits(peer(fixture_dir, state, **change), windows)
        assert (other - scores).abs().max() > 0.1, change
