"""Which weights of a model are quantized: what a user names with --skip and --only, and what serving engines need."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from gemma2tool.errors import UsageError, choices
from gemma2tool.formats.options import WHOLE_ROW
from gemma2tool.formats.packings.parts import is_linear_weight
from gemma2tool.formats.packings.settings import Settings
from gemma2tool.model.names import HEAD
from gemma2tool.model.tensors import TensorSpec
from gemma2tool.quantizers.mixtures import REGEX_HINT

_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
"""Modules that serving engines run as one matrix, which is quantized as a whole or not at all."""


def excluded_tensors(specs: Mapping[str, TensorSpec], settings: Settings) -> set[str]:
    """Names of the tensors that ``skip`` and ``only`` exclude from quantization.

    Raises ``UsageError`` for a pattern that is not a regular expression, or that matches no tensor of the model (a tied
    head counts as one).
    """
    skip, only = _compiled(settings.options.skip), _compiled(settings.options.only)
    names = [*specs, *([] if HEAD in specs else [HEAD])]
    for pattern in (*skip, *only):
        if not any(_matches([pattern], name) for name in names):
            raise UsageError(
                "quantize.pattern",
                f"the pattern {pattern.pattern!r} matches no tensor",
                hint="patterns are searched in names such as model.layers.0.mlp.down_proj.weight",
            )
    return {name for name in specs if _matches(skip, name) or (only and not _matches(only, name))}


def is_named(name: str, settings: Settings) -> bool:
    """Whether the user named this tensor with --only."""
    return _matches(_compiled(settings.options.only), name)


def quantized_modules(specs: Mapping[str, TensorSpec], quantized: Collection[str]) -> dict[str, bool]:
    """The model's linear layers by module name, and whether each is quantized.

    A classifier's head is among them: transformers and vLLM take it for a quantized layer unless it is listed as an
    unquantized one.
    """
    return {name.removesuffix(".weight"): name in quantized for name in linear_layers(specs) if name != HEAD}


def fused_weights(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Weights, by canonical name, in tuples of those that serving engines run as one matrix."""
    units: dict[tuple[str, object], list[str]] = {}
    for name in names:
        module = name.removesuffix(".weight")
        fused = next((modules for modules in _FUSED for end in modules if module.endswith("." + end)), None)
        layer = module.rsplit(".", 2)[0]
        units.setdefault((layer, fused) if fused else (name, None), []).append(name)
    return [tuple(unit) for unit in units.values()]


def own_types(specs: Mapping[str, TensorSpec], settings: Settings, types: Collection[str]) -> dict[str, str]:
    """The types that ``module_types`` gives to weights, by name; the first pattern that matches counts.

    ``types``: those that go beside ``settings.type``. Raises ``UsageError`` for any other, and for a pattern that is
    not a regular expression or that matches no weight.
    """
    pairs = settings.options.module_types
    patterns = _compiled([pattern for pattern, _ in pairs])
    weights = [name for name, spec in specs.items() if spec.quantizable]
    for pattern, (text, type_name) in zip(patterns, pairs, strict=True):
        if type_name not in types:
            hint = choices.hint(type_name, list(types))
            raise UsageError(
                "format.type", f"--module-type {text}={type_name}: not a type of {settings.type}'s", hint=hint
            )
        if not any(_matches([pattern], name) for name in weights):
            raise UsageError("quantize.pattern", f"the pattern {text!r} of --module-type matches no weight")
    named = {}
    for name in weights:
        first = next((i for i, pattern in enumerate(patterns) if _matches([pattern], name)), None)
        if first is not None:
            named[name] = pairs[first][1]
    return named


def linear_layers(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The weights of all linear layers, those of heads among them."""
    return [name for name, spec in specs.items() if is_linear_weight(spec) or _is_head(name, spec)]


def _is_head(name: str, spec: TensorSpec) -> bool:
    return spec.role == "head" and name.endswith(".weight")


def consumer_remarks(settings: Settings) -> list[str]:
    """What known consumers of the type cannot load."""
    remarks = []
    if settings.type == "w4a16-asym":
        remarks.append(
            "w4a16-asym: vLLM loads it; transformers (5.23) expects other zero points, and loads it only with"
            " CompressedTensorsConfig(dequantize=True)"
        )
    if settings.type in ("gptq-4", "awq-4") and settings.options.group_size == WHOLE_ROW:
        remarks.append(
            f"{settings.type} with one scale for each row: GPTQModel's CPU kernel (7.6) does not run it, its GPU"
            " kernels do"
        )
    return remarks


def fusion_remarks(modules: Mapping[str, bool]) -> list[str]:
    """A remark if some modules are unquantized although others of the same fused matrix are quantized.

    ``modules``: see ``quantized_modules``.
    """
    partial = []
    for name in (name for name, is_quantized in modules.items() if not is_quantized):
        for fused in _FUSED:
            suffix = next((module for module in fused if name.endswith("." + module)), None)
            if suffix is not None and any(modules.get(name.removesuffix(suffix) + module) for module in fused):
                partial.append(name)
    if not partial:
        return []
    names = ", ".join(partial[:3]) + (" ..." if len(partial) > 3 else "")
    return [
        f"{names}: left unquantized while others of q, k and v, or of gate and up, are quantized;"
        " transformers loads that, but vLLM, which fuses them, does not"
    ]


def mixture_remarks(types: Mapping[str, str]) -> list[str]:
    """A remark if weights that serving engines run as one matrix have several types; ``types``: by canonical name."""
    mixed = [names for names in fused_weights(types) if len({types[name] for name in names}) > 1]
    if not mixed:
        return []
    shown = ", ".join(f"{name.removesuffix('.weight')}: {types[name]}" for name in mixed[0])
    more = f" (and {len(mixed) - 1} more)" if len(mixed) > 1 else ""
    return [
        f"{shown}{more}: other types within q, k and v, or gate and up; transformers loads that, but vLLM, which fuses"
        " them, does not"
    ]


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for text in patterns:
        try:
            compiled.append(re.compile(text))
        except re.error as error:
            raise UsageError(
                "quantize.pattern", f"{text!r} is not a regular expression: {error}", hint=REGEX_HINT
            ) from None
    return compiled


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    """Whether one of the patterns is found in the name of the tensor or of its module, which may be what a $ refers
    to.
    """
    return any(pattern.search(name) or pattern.search(name.removesuffix(".weight")) for pattern in patterns)
