"""Mistakes in the config and the tokenizer."""

from __future__ import annotations

import json

from gemma2tool.model.config_fields import FULL, SLIDING
from tests.support.planted.faults import Victim, fault

# -- config ------------------------------------------------------------------------------------------------------------


@fault("config.attention-softcap-missing", forms=("memory", "hf"))
def attention_cap_missing(v: Victim) -> None:
    v.configure(attn_logit_softcapping=None)


@fault("config.final-softcap-missing", forms=("memory", "hf"))
def final_cap_missing(v: Victim) -> None:
    v.configure(final_logit_softcapping=None)


@fault("config.softcaps-swapped")
def caps_swapped(v: Victim) -> None:
    c = v.config
    v.configure(attn_logit_softcapping=c.final_logit_softcapping, final_logit_softcapping=c.attn_logit_softcapping)


@fault("config.query-scale", forms=("memory", "hf"))
def query_scale_224(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=224)


@fault("config.query-scale", forms=("memory", "hf"))
def query_scale_144(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=144)


def with_another_query_scale(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=v.config.head_dim * 3)


@fault("config.query-scale", prepare=with_another_query_scale)
def query_scale_head_dim(v: Victim) -> None:
    v.configure(query_pre_attn_scalar=v.config.head_dim)


@fault("config.window-off-by-one")
def window_one_too_large(v: Victim) -> None:
    v.configure(sliding_window=v.config.sliding_window + 1)


@fault("config.window-off-by-one")
def window_one_too_small(v: Victim) -> None:
    v.configure(sliding_window=v.config.sliding_window - 1)


@fault("config.window-missing", forms=("memory", "hf"))
def window_missing(v: Victim) -> None:
    v.configure(layer_types=(FULL,) * v.config.num_hidden_layers)


@fault("config.window-missing")
def window_as_long_as_the_context(v: Victim) -> None:
    v.configure(sliding_window=v.config.max_position_embeddings)


@fault("config.window-parity", forms=("memory", "hf"))
def window_on_odd_layers(v: Victim) -> None:
    v.configure(layer_types=tuple(SLIDING if layer % 2 else FULL for layer in v.layers))


@fault("config.window-everywhere", forms=("memory", "hf"))
def window_everywhere(v: Victim) -> None:
    v.configure(layer_types=(SLIDING,) * v.config.num_hidden_layers)


@fault("config.rope-theta")
def rope_theta_of_another_model(v: Victim) -> None:
    v.configure(rope_theta=1000000.0)


@fault("config.rope-scaling", forms=("memory", "hf"))
def rope_scaled(v: Victim) -> None:
    v.configure(rope_scaling={"rope_type": "linear", "factor": 2.0})


@fault("config.eps")
def eps_of_llama(v: Victim) -> None:
    v.configure(rms_norm_eps=1e-5)


@fault("config.activation", forms=("memory", "hf"))
def exact_gelu(v: Victim) -> None:
    v.configure(hidden_activation="gelu")


# -- tokenizer ---------------------------------------------------------------------------------------------------------


@fault("tokenizer.eos-wrong", prepare=lambda v: v.configure(eos_token_id=(1, 107)), forms=("memory", "hf"))
def end_of_turn_left_out(v: Victim) -> None:
    v.configure(eos_token_id=1)


@fault("tokenizer.bos-wrong", forms=("memory", "hf"))  # a GGUF without a tokenizer has no bos
def bos_is_eos(v: Victim) -> None:
    v.configure(bos_token_id=1)


def has_tokenizer(v: Victim) -> bool:
    return "tokenizer.model" in v.assets


@fault("tokenizer.wrong", forms=("memory",), needs=has_tokenizer)
def tokenizer_of_another_model(v: Victim) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(v.assets["tokenizer.model"])
    pieces = [piece.piece for piece in model.pieces]
    normal = [i for i, piece in enumerate(model.pieces) if piece.type == 1]
    for i, j in zip(normal, [normal[-1], *normal[:-1]], strict=True):
        model.pieces[i].piece = pieces[j]
    v.assets["tokenizer.model"] = model.SerializeToString()
    v.assets.pop("tokenizer.json", None)


@fault("tokenizer.bos-missing", forms=("memory",), needs=has_tokenizer)
def bos_not_added(v: Victim) -> None:
    content = json.loads(v.assets["tokenizer_config.json"])
    content["add_bos_token"] = False
    v.assets["tokenizer_config.json"] = json.dumps(content).encode()


@fault("tokenizer.lost", forms=("memory",), needs=has_tokenizer)
def tokenizer_not_copied(v: Victim) -> None:
    v.assets.pop("tokenizer.model")
    v.assets.pop("tokenizer.json", None)


@fault("config.softcap-wrong")
def attention_cap_of_another_value(v: Victim) -> None:
    v.configure(attn_logit_softcapping=20.0)


@fault("config.window-wrong")
def window_halved(v: Victim) -> None:
    v.configure(sliding_window=v.config.sliding_window // 2)


@fault("config.context-shorter")
def context_halved(v: Victim) -> None:
    v.configure(max_position_embeddings=v.config.max_position_embeddings // 2)


@fault("config.field", forms=("memory", "hf"))
def attention_in_both_directions(v: Victim) -> None:
    v.configure(use_bidirectional_attention=True)


def change_json(v: Victim, **entries: object) -> None:
    content = json.loads(v.assets["tokenizer_config.json"]) | entries
    v.assets["tokenizer_config.json"] = json.dumps(content).encode()


@fault("tokenizer.chat-template", forms=("memory",), needs=has_tokenizer)
def another_chat_template(v: Victim) -> None:
    change_json(v, chat_template="{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}")


@fault("tokenizer.eos-added", forms=("memory",), needs=has_tokenizer)
def eos_after_every_text(v: Victim) -> None:
    change_json(v, add_eos_token=True)


@fault("tokenizer.special-ids", forms=("memory",), needs=has_tokenizer)
def bos_and_eos_exchanged_in_the_tokenizer(v: Victim) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(v.assets["tokenizer.model"])
    spec = model.trainer_spec
    spec.bos_piece, spec.eos_piece = "<eos>", "<bos>"
    v.assets["tokenizer.model"] = model.SerializeToString()
