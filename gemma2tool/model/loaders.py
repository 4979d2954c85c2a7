"""Which files of a checkpoint's folder a loader acts on besides the weights and the config: what a model is to the
programs that people run it with.

An adapter that lies beside the weights is part of the model for transformers, whoever put it there. Reading,
converting, verifying and receipts all go by this table. Sources: transformers 5.23 (``maybe_load_adapters``,
``load_custom_generate``, the order of weight files in ``modeling_utils``), mlx-lm 0.32 (``load_model``), vLLM's
``default_loader``, llama.cpp's ``convert_hf_to_gguf.py``, sentence-transformers' ``modules.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gemma2tool.model.checkpoint import ASSET_NAMES, LoaderFiles
from gemma2tool.model.config import Gemma2Config

CODE_KEYS = ("auto_map", "model_file")
"""Where a config names Python files: for transformers, for mlx-lm."""
CUSTOM_GENERATE = "custom_generate/generate.py"
"""What transformers generates with, if it is told to trust remote code."""
_INDEX = "model.safetensors.index.json"
_FOLDERS = ("hf", "hf-bin", "mlx")


@dataclass(frozen=True)
class _Rule:
    """``loader`` does what ``effect`` says with the files whose names match ``patterns``, in a folder of ``formats``.

    ``key``: only if this file is there. ``absent``: only if this one is not. ``code``: only if the config names code.
    """

    patterns: tuple[str, ...]
    loader: str
    effect: str
    remedy: str
    formats: tuple[str, ...] = _FOLDERS
    key: str = ""
    absent: str = ""
    code: bool = False


_MOVE = "move it out of the folder if it does not belong to the model"

_RULES = (
    _Rule(
        ("adapter_config.json", "adapter_model.*"),
        "transformers",
        "applies the adapter to the weights",
        "merge it with --lora FOLDER, or move it out of the folder",
        key="adapter_config.json",
    ),
    _Rule(("pytorch_model.bin", "model.safetensors", _INDEX), "transformers", "prefers it", _MOVE, ("hf-bin",)),
    _Rule(
        ("model*.safetensors",),
        "mlx-lm",
        "loads every model*.safetensors of the folder, whatever the index says",
        _MOVE,
        ("hf", "mlx"),
    ),
    _Rule((_INDEX,), "vLLM and llama.cpp's converter", "go by it", _MOVE, ("hf",)),
    _Rule(
        ("*.safetensors",),
        "vLLM",
        "loads every .safetensors of a folder without an index",
        _MOVE,
        ("hf",),
        absent=_INDEX,
    ),
    _Rule(("*.py", "custom_generate/*"), "transformers", "runs it with trust_remote_code", "read it first", code=True),
    _Rule((CUSTOM_GENERATE,), "transformers", "generates with it if trust_remote_code is given", _MOVE),
    _Rule(
        ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/*"),
        "sentence-transformers",
        "builds pooling, normalization and prompts from it",
        "copy it beside the output, where its format has a place for it",
        ("hf", "hf-bin"),
        key="modules.json",
    ),
    _Rule(("hf_quant_config.json",), "vLLM and mlx-lm", "read it as the weights' quantization", _MOVE, ("hf", "mlx")),
    _Rule(("generation_config.json",), "transformers", "generates and stops as it says", _MOVE),
    _Rule(
        (*ASSET_NAMES, "additional_chat_templates/*.jinja"),
        "transformers",
        "reads it as part of the tokenizer",
        _MOVE,
    ),
)
"""The first rule that matches a name counts."""


_WEIGHTS = ("adapter_*", "*.safetensors", "*.bin", "*.index.json", "hf_quant_config.json")


def changes_weights(files: LoaderFiles) -> bool:
    """Whether a loader runs other weights with these files than those that were read."""
    return any(fnmatchcase(name, pattern) for name in files.names for pattern in _WEIGHTS)


def config_names_code(config: Gemma2Config) -> bool:
    """Whether a config names Python files for a loader to run."""
    return not config.extra.keys().isdisjoint(CODE_KEYS)


def files_acted_on(
    format_name: str, present: Set[str], judged: Iterable[str], *, names_code: bool = False
) -> list[LoaderFiles]:
    """The files among ``judged`` that a loader of a folder acts on; one entry for each rule.

    ``present``: all names in the folder, relative to it, with "/". ``names_code``: whether the folder's config names
    Python files.
    """
    by_rule: dict[_Rule, list[str]] = {}
    for name in sorted(judged):
        for rule in _rules(format_name, present, names_code):
            if any(fnmatchcase(name, pattern) for pattern in rule.patterns):
                by_rule.setdefault(rule, []).append(name)
                break
    return [LoaderFiles(tuple(names), rule.loader, rule.effect, rule.remedy) for rule, names in by_rule.items()]


def _rules(format_name: str, present: Set[str], names_code: bool) -> Iterator[_Rule]:
    for rule in _RULES:
        has_files = (not rule.key or rule.key in present) and rule.absent not in present
        if format_name in rule.formats and has_files and (names_code or not rule.code):
            yield rule
