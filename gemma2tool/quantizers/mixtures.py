"""Mixtures: the GGUF type of each tensor of a model, for every file type of llama-quantize.

The rules are those of llama.cpp 0c1e570, src/llama-quant.cpp, for the architecture gemma2 (dense, embedding tied to the
output). Where llama.cpp counts the tensors of a kind in file order, the rules here use the layer, so that the order of
tensors in a file has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemma2tool.errors import UsageError, choices


@dataclass(frozen=True)
class Matrix:
    """A tensor that may be quantized: its GGUF ``name``, ``kind`` (token_embd, attn_q, ffn_down, ...), ``layer`` (None
    outside the layers) and ``cols``, the length of its rows."""

    name: str
    kind: str
    layer: int | None
    cols: int


@dataclass(frozen=True)
class Model:
    """What the rules depend on: the number of layers, query heads per key-value head, and whether there is an
    importance matrix."""

    layers: int
    gqa: int
    imatrix: bool = False

    def is_early(self, layer: int, share: int = 8) -> bool:
        """Whether a layer is among the first 1/share."""
        return layer < self.layers // share

    def gets_more_bits(self, layer: int) -> bool:
        """Whether a layer gets more bits in the _M mixtures: the first and last eighth do, and every third layer
        between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def is_middle(self, layer: int) -> bool:
        """Whether a layer is neither in the first nor in the last eighth."""
        return self.layers // 8 <= layer < 7 * self.layers // 8


Rule = str | Callable[[Model, int], str | None]
"""A type, or a function of model and layer that returns one, or None for the default type of the mixture."""


@dataclass(frozen=True)
class FileType:
    """A mixture: its name, llama.cpp's number for it (``general.file_type``), the default type, and rules by kind of
    tensor."""

    name: str
    number: int
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


def _wide(type: str, otherwise: Rule | None = None) -> Rule:
    """``type`` for models with 4 or more query heads for each key-value head, whose attn_v is small."""

    def rule(model: Model, layer: int) -> str | None:
        return type if model.gqa >= 4 else _resolve(otherwise, model, layer)

    return rule


def _early(type: str, otherwise: str | None = None, share: int = 8) -> Rule:
    return lambda model, layer: type if model.is_early(layer, share) else otherwise


def _first(count: int, type: str, otherwise: str | None = None) -> Rule:
    return lambda model, layer: type if layer < count else otherwise


def _more(type: str) -> Rule:
    return lambda model, layer: type if model.gets_more_bits(layer) else None


def _middle(type: str) -> Rule:
    return lambda model, layer: type if model.is_middle(layer) else None


def _with_imatrix(rule: Rule) -> Rule:
    return lambda model, layer: _resolve(rule, model, layer) if model.imatrix else None


def _without_imatrix(rule: Rule, otherwise: Rule | None = None) -> Rule:
    return lambda model, layer: _resolve(otherwise if model.imatrix else rule, model, layer)


def _resolve(rule: Rule | None, model: Model, layer: int) -> str | None:
    return rule(model, layer) if callable(rule) else rule


_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_LOW_EMBEDDING = {"token_embd": "Q5_K"}

_ROWS = (
    FileType("f32", 0, "F32"),
    FileType("f16", 1, "F16"),
    FileType("bf16", 32, "BF16"),
    FileType("q4_0", 2, "Q4_0", {"ffn_down": _with_imatrix(_early("Q4_1"))}),
    FileType("q4_1", 3, "Q4_1"),
    FileType("q5_0", 8, "Q5_0", {"ffn_down": _with_imatrix(_early("Q5_1"))}),
    FileType("q5_1", 9, "Q5_1"),
    FileType("q8_0", 7, "Q8_0", {"token_embd": "Q8_0"}),
    FileType("q2_k", 10, "Q2_K", {"attn_v": _wide("Q4_K", "Q3_K"), "attn_output": "Q3_K", "ffn_down": "Q3_K"}),
    FileType("q2_k_s", 21, "Q2_K", {"attn_v": _wide("Q4_K"), "ffn_down": _early("Q4_K")}),
    FileType("q3_k_s", 11, "Q3_K"),
    FileType(
        "q3_k_m",
        12,
        "Q3_K",
        {"attn_v": _first(2, "Q5_K", "Q4_K"), "attn_output": "Q4_K", "ffn_down": _early("Q5_K", "Q4_K", share=16)},
    ),
    FileType("q3_k_l", 13, "Q3_K", {"attn_v": "Q5_K", "attn_output": "Q5_K", "ffn_down": "Q5_K"}),
    FileType("q4_k_s", 14, "Q4_K", {"attn_v": _first(4, "Q5_K"), "ffn_down": _early("Q5_K")}),
    FileType("q4_k_m", 15, "Q4_K", {"attn_v": _more("Q6_K"), "ffn_down": _more("Q6_K")}),
    FileType("q5_k_s", 16, "Q5_K"),
    FileType("q5_k_m", 17, "Q5_K", {"attn_v": _more("Q6_K"), "ffn_down": _more("Q6_K")}),
    FileType("q6_k", 18, "Q6_K"),
    FileType(
        "iq1_s",
        24,
        "IQ1_S",
        _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "Q2_K"), "attn_output": "IQ2_XXS", "ffn_down": _early("Q2_K")},
    ),
    FileType(
        "iq1_m",
        31,
        "IQ1_M",
        _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "Q2_K"), "attn_output": "IQ2_XXS", "ffn_down": _early("Q2_K")},
    ),
    FileType("iq2_xxs", 19, "IQ2_XXS", _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "Q2_K"), "ffn_down": _early("Q2_K")}),
    FileType("iq2_xs", 20, "IQ2_XS", _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "Q2_K"), "ffn_down": _early("Q2_K")}),
    FileType(
        "iq2_s",
        28,
        "IQ2_XS",
        _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "IQ3_S"), "attn_output": "IQ3_S", "ffn_down": _early("IQ3_S")},
    ),
    FileType(
        "iq2_m",
        29,
        "IQ2_S",
        _LOW_EMBEDDING | {"attn_v": _wide("Q4_K", "IQ3_S"), "attn_output": "IQ3_S", "ffn_down": _early("IQ3_S")},
    ),
    FileType(
        "iq3_xxs",
        23,
        "IQ3_XXS",
        _LOW_EMBEDDING
        | {
            "attn_v": _wide("Q4_K", _without_imatrix("IQ3_S")),
            "attn_k": "IQ2_S",
            "attn_q": "IQ2_S",
            "attn_output": "IQ3_S",
            "ffn_down": _without_imatrix(_early("Q4_K", "Q3_K")),
        },
    ),
    FileType(
        "iq3_xs",
        22,
        "IQ3_S",
        {
            "attn_v": _wide("Q4_K"),
            "attn_k": "IQ3_XXS",
            "attn_q": "IQ3_XXS",
            "ffn_gate": _middle("IQ3_XXS"),
            "ffn_up": _middle("IQ3_XXS"),
        },
    ),
    FileType("iq3_s", 26, "IQ3_S", {"attn_v": _wide("Q4_K")}),
    FileType("iq3_m", 27, "IQ3_S", {"attn_v": "Q4_K", "attn_output": "Q4_K", "ffn_down": _early("Q4_K")}),
    FileType("iq4_nl", 25, "IQ4_NL", {"attn_v": _wide("Q5_K"), "ffn_down": _without_imatrix(_early("Q5_K"))}),
    FileType("iq4_xs", 30, "IQ4_XS", {"attn_v": _wide("Q5_K"), "ffn_down": _without_imatrix(_early("Q5_K"))}),
    FileType("tq1_0", 36, "TQ1_0"),
    FileType("tq2_0", 37, "TQ2_0"),
    # A mixture for mixture-of-experts models; every matrix of a dense model is Q8_0.
    FileType("q1_0", 40, "Q1_0"),
    FileType("q2_0", 41, "Q2_0"),
    # llama-quantize makes neither; its --tensor-type makes the tensors.
    FileType("mxfp4", 38, "MXFP4", {"token_embd": "Q8_0"}),
    FileType("nvfp4", 39, "NVFP4", {"token_embd": "Q8_0"}),
    FileType("mxfp4_moe", 38, "MXFP4", dict.fromkeys(("token_embd", *_MATRICES), "Q8_0")),
)

FILE_TYPES: Mapping[str, FileType] = {row.name: row for row in _ROWS}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
REGEX_HINT = r"put a backslash before (, [, * and other special characters: '\('"
COPY = "copy"
FLOATS = ("f32", "f16", "bf16")

_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Types with large blocks -> the type with blocks of 32 that replaces them where rows do not divide into blocks."""

_NEEDS_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


@dataclass(frozen=True)
class Overrides:
    """Types requested for single tensors, as in llama-quantize's options; GGUF types in upper case.

    ``patterns``: (regular expression, type); the expression is searched in the tensor's name, and the first that
    matches applies. ``pure``: the default type for all other tensors. ``token_embedding`` overrides everything;
    ``output`` also applies to a tied embedding.
    """

    pure: bool = False
    token_embedding: str | None = None
    output: str | None = None
    patterns: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Choice:
    """``types``: the type of each matrix, by name. ``fallbacks``: by name, the types that were replaced because rows do
    not divide."""

    types: Mapping[str, str]
    fallbacks: Mapping[str, str]


def file_type(name: str) -> FileType:
    """The mixture with this name, in upper or lower case. Raises ``UsageError`` with a list of all."""
    name = name.lower()
    try:
        return FILE_TYPES[ALIASES.get(name, name)]
    except KeyError:
        hint = choices.hint(name, (*FILE_TYPES, *ALIASES, COPY))
        raise UsageError("quantize.unknown-type", f"unknown GGUF file type {name!r}", hint=hint) from None


def choose(
    ftype: FileType,
    matrices: Sequence[Matrix],
    model: Model,
    blocks: Mapping[str, int],
    overrides: Overrides = Overrides(),
) -> Choice:
    """Choose the type of every matrix. ``blocks``: how many elements a block of each type has.

    Raises ``UsageError`` for a pattern that matches nothing, or an override with an unknown type.
    """
    patterns = _compiled(overrides.patterns, blocks)
    for type in (overrides.token_embedding, overrides.output):
        _check_type(type, blocks)
    types: dict[str, str] = {}
    fallbacks: dict[str, str] = {}
    matched: set[str] = set()
    for matrix in matrices:
        matches = [(pattern.pattern, type) for pattern, type in patterns if pattern.search(matrix.name)]
        matched.update(pattern for pattern, _ in matches)
        if matrix.kind == "token_embd" and overrides.token_embedding is not None:
            types[matrix.name] = overrides.token_embedding
            _refuse_undivided(matrix, overrides.token_embedding, blocks)
            continue
        if ftype.name in FLOATS:
            types[matrix.name] = ftype.default
            continue
        if matches:
            preferred = matches[0][1]
        elif overrides.pure:
            preferred = ftype.default
        else:
            preferred = _mixed(ftype, matrix, model, blocks, overrides)
        types[matrix.name] = dividing(preferred, matrix.cols, blocks)
        if types[matrix.name] != preferred:
            fallbacks[matrix.name] = preferred
    for pattern, _ in patterns:
        if pattern.pattern not in matched:
            raise UsageError(
                "quantize.pattern",
                f"the pattern {pattern.pattern!r} matches no tensor",
                hint="patterns are searched in GGUF names such as blk.0.ffn_down.weight",
            )
    return Choice(types, fallbacks)


def needs_imatrix(ftype: FileType, matrix: Matrix, type: str) -> bool:
    """Whether llama-quantize refuses this type for this tensor without an importance matrix, because the result would
    be unusable."""
    if matrix.kind == "token_embd":
        return False
    return type in _NEEDS_IMATRIX or (type == "Q2_K" and ftype.name == "q2_k_s")


def _mixed(ftype: FileType, matrix: Matrix, model: Model, blocks: Mapping[str, int], overrides: Overrides) -> str:
    if matrix.kind != "token_embd":
        return _resolve(ftype.rules.get(matrix.kind), model, matrix.layer or 0) or ftype.default
    if overrides.output is not None:
        return overrides.output
    if matrix.cols % blocks[ftype.default]:
        return "Q8_0"
    rule = ftype.rules.get("token_embd", "Q6_K")
    return _resolve(rule, model, 0) or ftype.default


def dividing(type: str, cols: int, blocks: Mapping[str, int]) -> str:
    """``type``, or what llama-quantize stores rows of ``cols`` values in that do not divide into its blocks."""
    if cols % blocks[type] == 0:
        return type
    fallback = _FALLBACKS.get(type)
    return fallback if fallback is not None and cols % blocks[fallback] == 0 else "F16"


def _refuse_undivided(matrix: Matrix, type: str, blocks: Mapping[str, int]) -> None:
    if matrix.cols % blocks[type]:
        raise UsageError(
            "quantize.block",
            f"{matrix.name} has rows of {matrix.cols} values, which do not divide into {type}'s blocks of"
            f" {blocks[type]}",
            hint="choose a different type for the embedding",
        )


def _compiled(patterns: Sequence[tuple[str, str]], blocks: Mapping[str, int]) -> list[tuple[re.Pattern[str], str]]:
    result = []
    for text, type in patterns:
        _check_type(type, blocks)
        try:
            result.append((re.compile(text), type))
        except re.error as error:
            raise UsageError(
                "quantize.pattern", f"{text!r} is not a regular expression: {error}", hint=REGEX_HINT
            ) from None
    return result


def _check_type(type: str | None, blocks: Mapping[str, int]) -> None:
    if type is not None and type not in blocks:
        raise UsageError(
            "quantize.unknown-type",
            f"unknown GGUF tensor type {type!r}",
            hint=choices.hint(type, [block.lower() for block in blocks]),
        )
