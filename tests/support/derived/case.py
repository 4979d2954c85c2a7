"""What a derived model is, and the small trained base that all of them come from."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma2tool.formats import registry
from tests.support.formats import write_as
from tests.support.peers import Peer

transformers = Peer("transformers")

LAYERS = 2
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Derived:
    """A kind of derived model.

    ``make(base, folder)`` writes it into ``folder`` from the base's folder, and returns the folder of an adapter if the
    model is one on top of the base. ``needs``: what a format must have a place for beyond a plain Gemma 2: "head" (an
    output matrix of its own), "classifier", "config" (another window or rotary base).
    """

    name: str
    make: Callable[[Path, Path], Path | None]
    needs: frozenset[str] = frozenset()


def make_base(fixture: Path, folder: Path) -> Path:
    """The trained fixture's first layers as a Hugging Face folder in bfloat16."""
    with registry.open_checkpoint(fixture) as checkpoint:
        whole = write_as("hf", checkpoint, folder / "whole")
    with quiet():
        model = load(whole)
        model.model.layers = model.model.layers[:LAYERS]
        model.config.num_hidden_layers, model.config.layer_types = LAYERS, model.config.layer_types[:LAYERS]
        save(model, whole, folder / "base")
    shutil.rmtree(whole)
    return folder / "base"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        yield


def load(base: Path, dtype: str = "bf16", kind: str = "ForCausalLM", **options: Any) -> Any:
    """The model in transformers."""
    cls = getattr(transformers, f"Gemma2{kind}")
    return cls.from_pretrained(base, dtype=DTYPES[dtype], **options).eval()


def load_tokenizer(base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(base)


def save(model: Any, base: Path, folder: Path, tokenizer: Any = None, **options: Any) -> None:
    """Model and tokenizer as transformers saves them; without a ``tokenizer``, the base's files as they are."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        copy_tokenizer(base, folder)


def copy_tokenizer(base: Path, folder: Path) -> None:
    for path in (*base.glob("*token*"), *base.glob("chat_template*")):
        if path.name != "generation_config.json":
            shutil.copy(path, folder)


def train(model: Any, amount: float = 0.02, only: str = "") -> None:
    """Change the weights as an optimizer would: noise in proportion to each tensor."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if only in name:
            noise = torch.randn(parameter.shape, generator=generator)
            spread = parameter.float().std() if parameter.numel() > 1 else 1.0
            parameter.add_((amount * spread * noise).to(parameter.dtype))


def edit_json(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))
