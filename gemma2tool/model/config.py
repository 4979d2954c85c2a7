"""A Gemma 2 model's configuration: ``Gemma2Config``, the released sizes, and a config inferred from tensor shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2tool.errors import InputRefused, UsageError
from gemma2tool.model import config_hf
from gemma2tool.model.config_checks import check_agreement, check_values
from gemma2tool.model.config_fields import FULL, IDENTIFYING_FIELDS, RELEASE_COMPARED_FIELDS, SLIDING
from gemma2tool.model.names import EMBEDDING, HEAD

_FLOATS = ("attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "rope_theta", "initializer_range")


@dataclass(frozen=True)
class Gemma2Config:
    """A Gemma 2 model's configuration: every field of Hugging Face's ``Gemma2Config``, checked when it is created.

    Sizes (the defaults are those of the released 2B, as in transformers 4.47 and later):

    - ``vocab_size`` (256000): rows of the embedding, V.
    - ``hidden_size`` (2304): width of the residual stream, D.
    - ``intermediate_size`` (9216): width of gate and of up, F.
    - ``num_hidden_layers`` (26): decoder layers, L.
    - ``num_attention_heads`` (8): query heads, H.
    - ``num_key_value_heads`` (4): key and value heads, K; query head i reads key-value head i // (H / K).
    - ``head_dim`` (256): h; independent of D / H (27B: 128, where D / H is 144).
    - ``max_position_embeddings`` (8192): the longest sequence the model was trained for.

    Arithmetic:

    - ``hidden_activation`` ("gelu_pytorch_tanh"): applied to the gate.
    - ``rms_norm_eps`` (1e-6): added to the mean square in every norm.
    - ``query_pre_attn_scalar`` (256): attention scores are scaled by its -1/2 power; not always head_dim (27B: 144).
    - ``attn_logit_softcapping`` (50.0): c in c * tanh(score / c), applied before the mask; None: no cap.
    - ``final_logit_softcapping`` (30.0): the same for the logits; None: no cap.
    - ``rope_theta`` (10000.0): base of the rotary embedding.
    - ``rope_scaling`` (None): rotary scaling, ``{"rope_type": ..., "factor": ...}``; ``rope_parameters`` combines it
      with the base, which is how transformers 5 writes both.
    - ``sliding_window`` (4096): W; key j is visible to query i of a sliding layer when 0 <= i - j < W.
    - ``layer_types``: "sliding_attention" or "full_attention" for each layer; (): even layers slide.
    - ``use_bidirectional_attention`` (None): True drops the causal mask, for encoders derived from Gemma 2; a sliding
      layer then sees the keys j with abs(i - j) <= W. ``is_causal`` false in a file means the same.
    - ``attention_bias`` (False): biases in the q, k, v and o projections.
    - ``attention_dropout`` (0.0): share of attention weights dropped in training; no effect at inference.
    - ``tie_word_embeddings`` (True): lm_head is the embedding matrix.

    Use and training:

    - ``pad_token_id`` (0), ``bos_token_id`` (2), ``eos_token_id`` (1; instruction-tuned files: 1 and 107).
    - ``use_cache`` (True): return the key-value cache by default.
    - ``initializer_range`` (0.02): standard deviation of newly initialized weights.
    - ``dtype`` (None): the type the weights were saved in, such as "bfloat16".
    - ``architectures`` (None): class names, such as ("Gemma2ForCausalLM",).
    - ``id2label``, ``label2id`` (None: two labels), ``problem_type`` (None: derived from the labels): classification
      heads.
    - ``transformers_version`` (None): the release that wrote the file.
    - ``extra``: other keys of the source file, kept for writing.
    - ``notes``: what the reader had to assume; part of ``warnings``.

    ``config_fields`` says what a different value of each field changes. Raises ``InputRefused`` with id
    ``config.value`` for a value that is never valid, ``config.contradiction`` for two fields that contradict each
    other. Source of the defaults: transformers 5.23 ``configuration_gemma2.py``.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    query_pre_attn_scalar: int | float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = ()
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None
    dtype: str | None = None
    architectures: tuple[str, ...] | None = None
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    transformers_version: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_values(vars(self))
        self._normalize()
        check_agreement(vars(self))

    # -- reading and writing ------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> Gemma2Config:
        """The config in a parsed config.json of any generation; see ``config_hf`` for the spellings. Raises
        ``InputRefused``."""
        return cls(**config_hf.read(source))

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json object with every field, as transformers 5 spells it."""
        return config_hf.write(vars(self))

    # -- derived from the fields -------------------------------------------------------------------------------------

    @property
    def query_scale(self) -> float:
        """The factor of the attention scores: query_pre_attn_scalar ** -0.5."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def embed_scale(self) -> float:
        """The factor of the embeddings: sqrt(D), to be rounded to the activation type first."""
        return float(self.hidden_size**0.5)

    @property
    def head_name(self) -> str:
        """The canonical name of the matrix that gives the logits."""
        return EMBEDDING if self.tie_word_embeddings else HEAD

    @property
    def num_key_value_groups(self) -> int:
        """How many query heads share a key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_labels(self) -> int:
        """How many classes a classification head has; Hugging Face's default is two."""
        return 2 if self.id2label is None else len(self.id2label)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as a tuple however the file spells them."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Base and scaling of the rotary embedding in one object, as transformers 5 writes them."""
        return config_hf.rope_parameters(self.rope_theta, self.rope_scaling)

    def layer_is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def layer_window(self, layer: int) -> int | None:
        """Return how many keys a query of this layer sees, including its own; None if it sees all of them."""
        return self.sliding_window if self.layer_is_sliding(layer) else None

    @property
    def size_name(self) -> str | None:
        """ "2b", "9b" or "27b" where the sizes are those of a released model, else None."""
        for name, released in SIZES.items():
            if all(getattr(self, field) == getattr(released, field) for field in IDENTIFYING_FIELDS):
                return name
        return None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is valid but looks wrong, one line each; for a released size, every departure from the release."""
        warnings = list(self.notes)
        if self.size_name is not None:
            released = SIZES[self.size_name]
            for name in RELEASE_COMPARED_FIELDS:
                value, expected = getattr(self, name), getattr(released, name)
                if value != expected:
                    explanation = _known_departure(self, name)
                    warnings.append(f"{name} is {value!r}; the released {self.size_name} has {expected!r}{explanation}")
        elif self.query_pre_attn_scalar not in (self.head_dim, self.hidden_size / self.num_attention_heads):
            warnings.append(
                f"query_pre_attn_scalar is {self.query_pre_attn_scalar!r}, neither head_dim ({self.head_dim}) nor"
                f" hidden_size / num_attention_heads ({self.hidden_size / self.num_attention_heads:g})"
            )
        if self.hidden_size % self.num_attention_heads:
            warnings.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads};"
                " transformers 5 refuses such a config"
            )
        pad = () if self.pad_token_id is None else (self.pad_token_id,)
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for name, ids in (("pad", pad), ("bos", bos), ("eos", self.eos_token_ids)):
            outside = [str(token) for token in ids if not 0 <= token < self.vocab_size]
            if outside:
                verb = "is" if len(outside) == 1 else "are"
                warnings.append(
                    f"{name}_token_id {', '.join(outside)} {verb} outside the vocabulary of {self.vocab_size}"
                )
        return tuple(warnings)

    def _normalize(self) -> None:
        """Give each field one Python type, so that equal configs compare equal and transformers' strict types accept
        them."""
        for name in _FLOATS:
            value = getattr(self, name)
            self._set(name, None if value is None else float(value))
        if self.query_pre_attn_scalar == int(self.query_pre_attn_scalar):
            self._set("query_pre_attn_scalar", int(self.query_pre_attn_scalar))
        for name in ("layer_types", "architectures", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                self._set(name, tuple(getattr(self, name)))
        if not self.layer_types:
            self._set("layer_types", tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


# -- the released models ----------------------------------------------------------------------------------------------

_2B = Gemma2Config(dtype="bfloat16", architectures=("Gemma2ForCausalLM",))

# Sources: gemma_pytorch gemma/config.py; keras-hub's preset metadata agrees with the parameter counts they imply.
SIZES: Mapping[str, Gemma2Config] = {
    "2b": _2B,
    "9b": dataclasses.replace(
        _2B,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        layer_types=(),
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
    "27b": dataclasses.replace(
        _2B,
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        layer_types=(),
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
}


def _known_departure(config: Gemma2Config, name: str) -> str:
    """What is known about this departure from the release, in parentheses; empty where nothing is."""
    if name == "query_pre_attn_scalar":
        if config.size_name == "9b" and config.query_pre_attn_scalar == 224:
            return " (files written before 2024-07-12 say 224, which was corrected)"
        if config.size_name == "27b" and config.query_pre_attn_scalar == 128:
            return " (128 is head_dim: a known error of tools that do not store the scalar)"
    return ""


# -- from tensor shapes -----------------------------------------------------------------------------------------------


def infer_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path | None = None) -> Gemma2Config:
    """Infer the config of a checkpoint that has none from the canonical names and shapes of its tensors. ``where``: its
    path, for messages.

    Shapes give V, D, F, L, H * h and K * h, but not h alone and none of the scalars, so only the widths of a released
    model (with any number of layers or vocabulary rows) are enough. Raises ``UsageError`` (``config.needed``) for other
    widths and ``InputRefused`` where a tensor that shows a size is missing.
    """
    vocab_size, hidden_size = _matrix_shape(shapes, EMBEDDING)
    intermediate_size, _ = _matrix_shape(shapes, "model.layers.0.mlp.gate_proj.weight")
    query_width, _ = _matrix_shape(shapes, "model.layers.0.self_attn.q_proj.weight")
    key_width, _ = _matrix_shape(shapes, "model.layers.0.self_attn.k_proj.weight")
    layers = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d{1,6})\.", name)))
    widths = (hidden_size, intermediate_size, query_width, key_width)
    for name, released in SIZES.items():
        released_widths = (
            released.hidden_size,
            released.intermediate_size,
            released.num_attention_heads * released.head_dim,
            released.num_key_value_heads * released.head_dim,
        )
        if widths == released_widths:
            note = f"the weights have no config; that of the released {name} is assumed, because the widths match"
            return dataclasses.replace(
                released,
                vocab_size=vocab_size,
                num_hidden_layers=layers,
                layer_types=(),
                notes=(note,),
                **_head_fields(shapes),
            )
    raise UsageError(
        "config.needed",
        f"{where or 'the weights'}: no config, and no released Gemma 2 has their shapes (hidden {hidden_size},"
        f" feed-forward {intermediate_size}, queries {query_width}, keys {key_width}): head_dim,"
        " query_pre_attn_scalar and the window do not follow from shapes",
        hint="pass the model's config.json with --config",
    )


def _matrix_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2:
        problem = f"has shape {tuple(shape)}" if name in shapes else "is missing"
        raise InputRefused("config.shape", f"tensor {name!r} {problem}; it is needed to determine the model's size")
    rows, columns = shape
    return rows, columns


def _head_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A classification head's fields: Hugging Face gives the token classifier a bias, the sequence classifier none."""
    if "score.weight" not in shapes:
        return {"tie_word_embeddings": HEAD not in shapes}
    kind = "Gemma2ForTokenClassification" if "score.bias" in shapes else "Gemma2ForSequenceClassification"
    count, _ = _matrix_shape(shapes, "score.weight")
    return {"architectures": (kind,), "id2label": {index: f"LABEL_{index}" for index in range(count)}}
