"""MaxText's parameters and what it makes of the model's: norms plus one, the embedding and the queries scaled.

Values are rounded to the stored type after that, so that the inverse is not exact. MaxText has two converters, which
scale by different numbers: ``convert_gemma2_chkpt.py`` (from Google's Flax release) rounds a factor to the stored type
before it multiplies, ``to_maxtext.py`` (from Hugging Face's folders, ``param_mapping.py``) does not, and takes head_dim
for query_pre_attn_scalar, which differ in 27B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma2tool.formats.mapping.layout_transforms import PadVocabulary, TransposeBlocks
from gemma2tool.formats.mapping.transforms import TableRow
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.lazy import FLOAT32, Array, DType, LazyTensor, MappedRows, to_float32
from gemma2tool.quantizers.casts import cast

EMBEDDING = "token_embedder/embedding"
LAYER = "layer_{i}/"
_HF = "model.layers.{i}."
_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Converter:
    """What one of MaxText's converters multiplies queries by, and whether it rounds factors to the stored type."""

    query_scale: Callable[[Gemma2Config], float]
    rounds_factors: bool

    def factor(self, factor: float, dtype: DType) -> np.float32:
        """``factor`` as values of type ``dtype`` are multiplied by it."""
        return np.float32(np.array(factor, FLOAT32).astype(dtype if self.rounds_factors else FLOAT32))

    def factors(self, config: Gemma2Config, dtype: DType) -> tuple[np.float32, np.float32]:
        """Those of the embedding and the queries."""
        return self.factor(config.embed_scale, dtype), self.factor(self.query_scale(config), dtype)


FLAX_CONVERTER, HF_CONVERTER = "convert_gemma2_chkpt", "to_maxtext"
CONVERTERS = {
    FLAX_CONVERTER: Converter(lambda config: config.query_scale, rounds_factors=True),
    HF_CONVERTER: Converter(lambda config: config.head_dim**-0.5, rounds_factors=False),
}
"""By the name of the script, without ".py"."""


def converters_differ(config: Gemma2Config, dtype: DType) -> bool:
    """Whether the converters scale a model in ``dtype`` by different factors."""
    return len({converter.factors(config, dtype) for converter in CONVERTERS.values()}) > 1


@dataclass(frozen=True)
class Multiplied:
    """Stored times ``factor(config)``, as ``converter`` multiplies, the product rounded to the stored type."""

    factor: Callable[[Gemma2Config], float]
    converter: Converter
    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        factor = self.converter.factor(self.factor(config), tensor.dtype)
        return _mapped(tensor, lambda values: values * factor)

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        factor = self.converter.factor(self.factor(config), tensor.dtype)
        return _mapped(tensor, lambda values: values / factor)


@dataclass(frozen=True)
class PlusOne:
    """Stored as w + 1 in the stored type."""

    exact: bool = False

    def apply(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return _mapped(tensor, lambda values: values + np.float32(1))

    def invert(self, tensor: LazyTensor, config: Gemma2Config) -> LazyTensor:
        return _mapped(tensor, lambda values: values - np.float32(1))


def _mapped(tensor: LazyTensor, function: Callable[[Array], Array]) -> LazyTensor:
    """``function`` of float32 values, rounded to the tensor's own type, float32 at most."""
    dtype = narrowest(tensor.dtype)
    return MappedRows(tensor, lambda values: cast(function(to_float32(values)), dtype), dtype)


def narrowest(dtype: DType) -> DType:
    """``dtype``, or float32 if that is narrower."""
    return min(dtype, FLOAT32, key=lambda candidate: candidate.itemsize)


def table(converter: Converter) -> tuple[TableRow, ...]:
    """The parameters, a matrix for each layer, as ``converter`` scales them."""
    embedding = Multiplied(lambda config: config.embed_scale, converter)
    query = Multiplied(converter.query_scale, converter)
    plain = {
        "self_attention/key": "self_attn.k_proj",
        "self_attention/value": "self_attn.v_proj",
        "self_attention/out": "self_attn.o_proj",
        "mlp/wi_0": "mlp.gate_proj",
        "mlp/wi_1": "mlp.up_proj",
        "mlp/wo": "mlp.down_proj",
    }
    return (
        TableRow(EMBEDDING, ("model.embed_tokens.weight",), (PadVocabulary(), embedding)),
        TableRow("decoder/decoder_norm/scale", ("model.norm.weight",), (PlusOne(),)),
        TableRow(LAYER + "self_attention/query/kernel", (_HF + "self_attn.q_proj.weight",), (TransposeBlocks(), query)),
        *(
            TableRow(f"{LAYER}{name}/kernel", (f"{_HF}{hf_name}.weight",), (TransposeBlocks(),))
            for name, hf_name in plain.items()
        ),
        *(
            TableRow(f"{LAYER}{name}/scale", (f"{_HF}{hf_name}.weight",), (PlusOne(),))
            for name, hf_name in _NORMS.items()
        ),
    )
