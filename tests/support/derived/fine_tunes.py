"""Fine-tunes as transformers and trl save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.derived.case import Derived, copy_tokenizer, edit_json, load, load_tokenizer, quiet, save, train

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Edit = Callable[[Any, Any], None]
"""Changes a model and its tokenizer in memory."""


def tuned(edit: Edit, *, dtype: str = "bf16", **options: Any) -> Callable[[Path, Path], None]:
    """Load, edit, save both; ``options``: of ``save_pretrained``."""

    def make(base: Path, folder: Path) -> None:
        with quiet():
            model, tokenizer = load(base, dtype), load_tokenizer(base)
            edit(model, tokenizer)
            save(model, base, folder, tokenizer, **options)

    return make


def _saved(dtype: str = "bf16", *, trained: bool = False, **options: Any) -> Callable[[Path, Path], None]:
    return tuned(lambda model, _: train(model) if trained else None, dtype=dtype, **options)


def _tokens(*contents: str, special: bool = True, multiple: int | None = None) -> Edit:
    """Add tokens, and rows for them."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.add_tokens(list(contents), special_tokens=special)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
        train(model)

    return edit


def _set_eos(model: Any, tokenizer: Any, token: str) -> None:
    tokenizer.eos_token = token
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(token)


def _chatml(multiple: int | None) -> Edit:
    """As trl's setup_chat_format: two tokens, template, eos, bos and pad of tokenizer, config and generation config."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.chat_template = CHATML
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
        for config in (model.config, model.generation_config):
            config.pad_token_id = config.eos_token_id = tokenizer.eos_token_id
            config.bos_token_id = tokenizer.bos_token_id
        train(model)

    return edit


def _eos_of_turn(model: Any, tokenizer: Any) -> None:
    _set_eos(model, tokenizer, "<end_of_turn>")


def _pad_is_eos(model: Any, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.eos_token_id


def _added_pad(model: Any, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.config.pad_token_id = tokenizer.pad_token_id


def _unused_made_special(model: Any, tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unused12>"]})


def _template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    train(model)


def _no_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = None


def _named_templates(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages[0]['content'] }}"}


def _mixed_norms(model: Any, _: Any) -> None:
    """FSDP and DeepSpeed trainers keep norms in float32."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() * 1.001


def _trainer_folder(base: Path, folder: Path) -> None:
    """A checkpoint of a Trainer: optimizer, scheduler, arguments beside the model."""
    _saved(trained=True)(base, folder)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": 10}, folder / "scheduler.pt")
    torch.save({"lr": 2e-5}, folder / "training_args.bin")
    torch.save({"cpu": torch.zeros(8, dtype=torch.uint8)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10}))


def _slow_tokenizer_only(base: Path, folder: Path) -> None:
    _saved(trained=True)(base, folder)
    copy_tokenizer(base, folder)
    (folder / "tokenizer.json").unlink()


def _fast_tokenizer_only(base: Path, folder: Path) -> None:
    _saved(trained=True)(base, folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)


def _bin(base: Path, folder: Path) -> None:
    """pytorch_model.bin with the tied head, as trainers before safetensors saved it."""
    with quiet():
        model = load(base)
        train(model)
        save(model, base, folder, load_tokenizer(base))
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _base_class(base: Path, folder: Path) -> None:
    with quiet():
        save(load(base, kind="Model"), base, folder, load_tokenizer(base))


def _classifier(kind: str, labels: int) -> Callable[[Path, Path], None]:
    """A reward model (one label) as trl's RewardTrainer saves it, or a classifier."""

    def make(base: Path, folder: Path) -> None:
        with quiet():
            model = load(base, kind=kind, num_labels=labels)
            train(model)
            save(model, base, folder, load_tokenizer(base))

    return make


def _configured(**fields: object) -> Callable[[Path, Path], None]:
    def make(base: Path, folder: Path) -> None:
        _saved(trained=True)(base, folder)
        edit_json(folder / "config.json", **fields)

    return make


def _untied(*, equal: bool) -> Callable[[Path, Path], None]:
    """Head and embedding apart: trained, or as a script saves them that always writes lm_head."""

    def make(base: Path, folder: Path) -> None:
        with quiet():
            model = load(base)
            model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
            model.config.tie_word_embeddings = False
            train(model, only="nothing" if equal else "")
            save(model, base, folder, load_tokenizer(base))

    return make


CASES = (
    *(Derived(f"transformers: saved as {dtype}", _saved(dtype)) for dtype in ("bf16", "f16", "f32")),
    *(Derived(f"transformers: trained in {dtype}", _saved(dtype, trained=True)) for dtype in ("bf16", "f16", "f32")),
    Derived("transformers: sharded", _saved(trained=True, max_shard_size="600KB")),
    Derived("transformers: norms in f32", tuned(_mixed_norms)),
    Derived("transformers: added special tokens", tuned(_tokens("<|a|>", "<|b|>", "<sep_c>"))),
    Derived("transformers: <think>", tuned(_tokens("<think>", "</think>", special=False))),
    Derived("transformers: a token with spaces", tuned(_tokens("two words", special=False))),
    Derived("transformers: padded to 64", tuned(_tokens("<|a|>", multiple=64))),
    Derived("transformers: padded to 128 in f32", tuned(_tokens("<|a|>", multiple=128), dtype="f32")),
    Derived("transformers: eos is <end_of_turn>", tuned(_eos_of_turn)),
    Derived("transformers: pad is eos", tuned(_pad_is_eos)),
    Derived("transformers: [PAD] added", tuned(_added_pad)),
    Derived("transformers: an unused token made special", tuned(_unused_made_special)),
    Derived("transformers: without a chat template", tuned(_no_template)),
    Derived("transformers: several chat templates", tuned(_named_templates)),
    Derived("transformers: tokenizer.model only", _slow_tokenizer_only),
    Derived("transformers: tokenizer.json only", _fast_tokenizer_only),
    Derived("transformers: pytorch_model.bin", _bin),
    Derived("transformers: base class", _base_class),
    Derived("transformers: untied, equal", _untied(equal=True)),
    Derived("transformers: untied, trained", _untied(equal=False), frozenset({"head"})),
    Derived("transformers: token classifier", _classifier("ForTokenClassification", 5), frozenset({"classifier"})),
    Derived("transformers: longer context", _configured(max_position_embeddings=16384)),
    Derived("transformers: another window", _configured(sliding_window=32), frozenset({"config"})),
    Derived("transformers: rope_theta 160000", _configured(rope_parameters={"rope_theta": 160000.0,
            "rope_type": "default"}), frozenset({"config"})),
    Derived("trl: ChatML", tuned(_chatml(None))),
    Derived("trl: ChatML, padded", tuned(_chatml(64))),
    Derived("trl: another chat template", tuned(_template)),
    Derived("trl: a Trainer's checkpoint", _trainer_folder),
    Derived("trl: reward model", _classifier("ForSequenceClassification", 1), frozenset({"classifier"})),
)  # fmt: skip
