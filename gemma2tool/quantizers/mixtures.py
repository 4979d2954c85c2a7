"""Mixtures: which tensor of a model gets which GGUF type, for every file type of llama-quantize. Knows nothing of bits.

Facts: llama.cpp 0c1e570, src/llama-quant.cpp, for the architecture gemma2 (dense, embedding tied to the output). Rules that speak of
"the i-th attn_v" count layers here, so that the order of tensors in a file cannot change them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemma2tool.errors import UsageError


@dataclass(frozen=True)
class Matrix:
    """A tensor that may be quantized: its GGUF ``name``, its ``kind`` (token_embd, attn_q, ffn_down, ...), its ``layer`` (None
    outside layers) and the length of its rows."""

    name: str
    kind: str
    layer: int | None
    cols: int


@dataclass(frozen=True)
class Model:
    """What the rules look at: the number of layers, query heads per key-value head, whether there is an importance matrix."""

    layers: int
    gqa: int
    imatrix: bool = False

    def early(self, layer: int, share: int = 8) -> bool:
        """Whether a layer is among the first 1/share."""
        return layer < self.layers // share

    def more(self, layer: int) -> bool:
        """The layers that get more bits in the _M mixtures: the first and last eighth, and every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def middle(self, layer: int) -> bool:
        return self.layers // 8 <= layer < 7 * self.layers // 8


Rule = str | Callable[[Model, int], str | None]
"""A type, or a function of model and layer that gives one, or None for the mixture's default."""


@dataclass(frozen=True)
class FileType:
    """A mixture: its name, llama.cpp's number of it (``general.file_type``), the default type, and rules by kind of tensor."""

    name: str
    number: int
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict)


def _wide(wide: str, else_: Rule | None = None) -> Rule:
    """``wide`` for models with 4 or more query heads a key-value head, whose attn_v is small."""

    def rule(model: Model, layer: int) -> str | None:
        return wide if model.gqa >= 4 else else_(model, layer) if callable(else_) else else_

    return rule


def _early(type: str, else_: str | None = None, share: int = 8) -> Rule:
    return lambda model, layer: type if model.early(layer, share) else else_


def _first(count: int, type: str, else_: str | None = None) -> Rule:
    return lambda model, layer: type if layer < count else else_


def _more(type: str) -> Rule:
    return lambda model, layer: type if model.more(layer) else None


def _middle(type: str) -> Rule:
    return lambda model, layer: type if model.middle(layer) else None


def _with_imatrix(rule: Rule) -> Rule:
    return lambda model, layer: _resolve(rule, model, layer) if model.imatrix else None


def _without_imatrix(rule: Rule, else_: Rule | None = None) -> Rule:
    return lambda model, layer: _resolve(else_ if model.imatrix else rule, model, layer)


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
    # A mixture for experts; all that a dense model has is Q8_0.
    FileType("mxfp4_moe", 38, "MXFP4", dict.fromkeys(("token_embd", *_MATRICES), "Q8_0")),
)

FILE_TYPES: Mapping[str, FileType] = {row.name: row for row in _ROWS}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
REGEX_HINT = r"put a backslash before (, [, * and other characters that mean something in one: '\('"
COPY = "copy"
FLOATS = ("f32", "f16", "bf16")

_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Types of 256-value blocks to the type of 32-value blocks that takes their place where rows do not divide."""

_NEEDS_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


@dataclass(frozen=True)
class Overrides:
    """What the user asked of single tensors, in llama-quantize's terms; types are GGUF's, in upper case.

    ``patterns``: (regular expression, type), searched in the tensor's name; the first that matches wins. ``pure``: the default type
    for everything else. ``token_embedding`` beats all others; ``output`` is the tied embedding's, too.
    """

    pure: bool = False
    token_embedding: str | None = None
    output: str | None = None
    patterns: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Choice:
    """The type of each matrix by name, and ``fallbacks``: name to the type that its rows do not divide into."""

    types: Mapping[str, str]
    fallbacks: Mapping[str, str]


def file_type(name: str) -> FileType:
    """The mixture of that name, in any case. Raises ``UsageError`` that lists them."""
    name = name.lower()
    try:
        return FILE_TYPES[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join((*FILE_TYPES, *ALIASES, COPY))
        raise UsageError(
            "quantize.unknown-type", f"there is no GGUF file type {name!r}", hint=f"choose one of {known}"
        ) from None


def choose(
    ftype: FileType,
    matrices: Sequence[Matrix],
    model: Model,
    blocks: Mapping[str, int],
    overrides: Overrides = Overrides(),
) -> Choice:
    """The type of every matrix. ``blocks`` gives the elements of a block of each type.

    Raises ``UsageError`` for a pattern that matches nothing, or an override of a type that does not exist.
    """
    patterns = _compiled(overrides.patterns, blocks)
    for given in (overrides.token_embedding, overrides.output):
        _check_type(given, blocks)
    types: dict[str, str] = {}
    fallbacks: dict[str, str] = {}
    matched: set[str] = set()
    for matrix in matrices:
        hits = [(pattern.pattern, type) for pattern, type in patterns if pattern.search(matrix.name)]
        matched.update(pattern for pattern, _ in hits)
        if matrix.kind == "token_embd" and overrides.token_embedding is not None:
            types[matrix.name] = overrides.token_embedding
            _refuse_undivided(matrix, overrides.token_embedding, blocks)
            continue
        if ftype.name in FLOATS:
            types[matrix.name] = ftype.default
            continue
        if hits:
            wanted = hits[0][1]
        elif overrides.pure:
            wanted = ftype.default
        else:
            wanted = _mixed(ftype, matrix, model, blocks, overrides)
        types[matrix.name] = _dividing(wanted, matrix.cols, blocks)
        if types[matrix.name] != wanted:
            fallbacks[matrix.name] = wanted
    for pattern, _ in patterns:
        if pattern.pattern not in matched:
            raise UsageError(
                "quantize.pattern",
                f"the pattern {pattern.pattern!r} matches no tensor",
                hint="patterns are searched in GGUF names such as blk.0.ffn_down.weight",
            )
    return Choice(types, fallbacks)


def needs_imatrix(ftype: FileType, matrix: Matrix, type: str) -> bool:
    """Whether llama-quantize refuses to make this tensor without importances: the result would be garbage."""
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


def _dividing(type: str, cols: int, blocks: Mapping[str, int]) -> str:
    if cols % blocks[type] == 0:
        return type
    instead = _FALLBACKS.get(type)
    return instead if instead is not None and cols % blocks[instead] == 0 else "F16"


def _refuse_undivided(matrix: Matrix, type: str, blocks: Mapping[str, int]) -> None:
    if matrix.cols % blocks[type]:
        raise UsageError(
            "quantize.block",
            f"{matrix.name} has rows of {matrix.cols}, which do not divide into {type}'s blocks of {blocks[type]}",
            hint="choose another type for the embedding",
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
            f"there is no tensor type {type!r}",
            hint=f"choose one of {', '.join(blocks).lower()}",
        )
