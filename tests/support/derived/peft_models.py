"""Models that peft trained: merged by peft itself, or an adapter beside its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.derived.case import Derived, copy_tokenizer, load, load_tokenizer, quiet, save
from tests.support.peers import Peer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
peft = Peer("peft")

_LORA = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR}

MERGED: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(**_LORA),
    "rslora": lambda: peft.LoraConfig(**_LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**_LORA, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**_LORA, init_lora_weights="pissa"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=LINEAR),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "v_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=["v_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=LINEAR),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=LINEAR),
    "ln-tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "pre_feedforward_layernorm"]),
}
BESIDE: dict[str, Any] = {
    **{name: MERGED[name] for name in ("lora", "rslora", "dora", "pissa")},
    "olora": lambda: peft.LoraConfig(**_LORA, init_lora_weights="olora"),
    "rank pattern": lambda: peft.LoraConfig(**_LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    "trained tokens": lambda: peft.LoraConfig(**_LORA, trainable_token_indices=[5, 9, 107]),
    "tied embedding": lambda: peft.LoraConfig(**_LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}


def _adapted(base: Path, config: Any) -> Any:
    """peft's model with an adapter that moved."""
    model = peft.get_peft_model(load(base, "f32"), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _merged(config: Callable[[], Any], dtype: torch.dtype) -> Callable[[Path, Path], None]:
    def make(base: Path, folder: Path) -> None:
        with quiet():
            model = _adapted(base, config()).merge_and_unload().to(dtype)
            save(model, base, folder, load_tokenizer(base))

    return make


def _beside(config: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    def make(base: Path, folder: Path) -> Path:
        with quiet():
            load(base).save_pretrained(folder)
            copy_tokenizer(base, folder)
            adapter = folder.with_name(f"{folder.name}-adapter")
            _adapted(base, config()).save_pretrained(adapter)
            load_tokenizer(base).save_pretrained(adapter)
        return adapter

    return make


CASES = (
    *(Derived(f"peft: {name}, merged", _merged(config, torch.bfloat16)) for name, config in MERGED.items()),
    Derived("peft: lora, merged in f32", _merged(MERGED["lora"], torch.float32)),
    Derived("peft: lora, merged in f16", _merged(MERGED["lora"], torch.float16)),
    *(Derived(f"peft: {name}, beside the base", _beside(config)) for name, config in BESIDE.items()),
)
