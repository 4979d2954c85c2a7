"""In its process: Google's ``gemma``, its model in JAX, in float32.

Its classes for users (``gemma.gm``) need kauldron and with it tensorflow; ``gemma.params`` and ``gemma.transformer``,
on which they are built, need flax and Orbax only.

Google's code does not read a config. It tells a released model by its number of layers; for others, the transformer is
configured by the checkpoint's config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gemma2tool.engines.library import imported
from gemma2tool.engines.messages import Message, Unable, sentence, serve

_TOKENIZER = "tokenizer.model"
_OF_ORBAX = ("_METADATA", "checkpoint")
"""Files of a folder that Orbax writes; in old ones, the second alone."""


def answer(request: Mapping[str, Any]) -> Iterator[Message]:
    """The messages, see ``adapters``."""
    _, library = imported("gemma", lambda: import_module("gemma.transformer"))
    yield library
    jax: Any = import_module("jax")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    yield _tokens(request)
    yield Message({"kind": "unable", "message": "its samplers end an answer at <eos> alone, and write no template"})
    try:
        parameters = import_module("gemma.params").load_and_format_params(_tree(request))["transformer"]
        parameters = jax.tree.map(lambda array: array.astype(np.float32), parameters)
        config = _config(parameters, request["config"])
    except Unable:
        raise
    except Exception as error:
        yield Message({"kind": "refused", "message": sentence(error)})
        return
    yield from _run(config, parameters, request)


def _tree(request: Mapping[str, Any]) -> str:
    """The Orbax folder, which may lie in the checkpoint's beside tokenizer.model. Orbax takes absolute paths only."""
    path = Path(request["path"]).absolute()
    trees = [tree for tree in (path, *path.glob("*/")) if any((tree / name).is_file() for name in _OF_ORBAX)]
    if not trees:
        raise Unable(f"finds no Orbax checkpoint in {path.name} or one folder below it")
    return str(trees[0])


def _tokens(request: Mapping[str, Any]) -> Message:
    """With bos, as Google's sampler takes a prompt."""
    folder = Path(request["path"])
    path = next((p for p in (folder / _TOKENIZER, folder.parent / _TOKENIZER) if p.exists()), None)
    if path is None:
        return Message({"kind": "unable", "message": "finds no tokenizer.model in its folder or beside it"})
    try:
        tokenizer = import_module("sentencepiece").SentencePieceProcessor(str(path))
        ids = [[tokenizer.bos_id(), *tokenizer.EncodeAsIds(text)] for text in request["texts"]]
    except Exception as error:
        return Message({"kind": "unable", "message": f"loads no tokenizer: {sentence(error)}"})
    return Message({"kind": "tokens", "ids": ids})


def _config(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Google's config: that of a released model with so many layers, otherwise what ``config`` says."""
    transformer = import_module("gemma.transformer")
    try:
        return transformer.TransformerConfig.from_params({"transformer": parameters})
    except ValueError:
        pass
    kinds = import_module("gemma.modules").AttentionType
    scales = transformer.QueryPreAttentionNormalisation
    embedding, gating = parameters["embedder"]["input_embedding"], parameters["layer_0"]["mlp"]["gating_einsum"]
    heads, width, scalar = config["num_attention_heads"], config["hidden_size"], config["query_pre_attn_scalar"]
    if scalar not in (config["head_dim"], width // heads):
        raise Unable(f"gemma scales queries by head_dim or by hidden_size / heads, not by {scalar:g}")
    return transformer.TransformerConfig(
        num_layers=config["num_hidden_layers"],
        num_embed=embedding.shape[0],
        embed_dim=width,
        hidden_dim=config["intermediate_size"],
        num_heads=heads,
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        final_logit_softcap=config["final_logit_softcapping"],
        attn_logits_soft_cap=config["attn_logit_softcapping"],
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=tuple(
            kinds.LOCAL_SLIDING if kind == "sliding_attention" else kinds.GLOBAL for kind in config["layer_types"]
        ),
        sliding_window_size=config["sliding_window"],
        transpose_gating_einsum=gating.shape[-1] == width,
        query_pre_attn_norm=scales.BY_ONE_OVER_SQRT_HEAD_DIM
        if scalar == config["head_dim"]
        else scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    )


def _run(config: Any, parameters: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Message]:
    jax: Any = import_module("jax")
    model = import_module("gemma.transformer").Transformer(config)
    prompt, new_tokens, vocabulary = request["ids"], request["new_tokens"], request["config"]["vocab_size"]
    length = len(prompt) + new_tokens
    causal = np.tril(np.ones((length, length), bool))
    cache = config.init_cache(1, jax.numpy.float32, cache_length=length)

    def step(ids: Any, positions: Any, cache: Any, mask: Any) -> Any:
        logits, cache = model.apply({"params": parameters}, ids, positions, cache, mask)
        return logits[0, -request["positions"] :, :vocabulary], cache

    compiled = jax.jit(step)

    def forward(ids: list[int], first: int, cache: Any) -> Any:
        rows = slice(first, first + len(ids))
        return compiled(np.array([ids]), np.arange(length)[None, rows], cache, causal[None, rows])

    outputs, cache = forward(prompt, 0, cache)
    logits = np.ascontiguousarray(outputs, np.float32)
    yield Message({"kind": "logits", "shape": list(logits.shape)}, logits.tobytes())
    ids: list[int] = []
    while len(ids) < new_tokens:
        ids.append(int(outputs[-1].argmax()))
        if len(ids) < new_tokens:
            outputs, cache = forward(ids[-1:], length - new_tokens + len(ids) - 1, cache)
    yield Message({"kind": "continuation", "ids": ids})


if __name__ == "__main__":
    serve(answer)
