"""The one table of config fields: complete, and the config digests in existing receipts keep their values."""

from __future__ import annotations

import dataclasses

import pytest

from gemma2tool.model.config import SIZES, Gemma2Config
from gemma2tool.model.config_fields import (
    ARITHMETIC_FIELDS,
    CONFIG_FIELDS,
    DESCRIPTION_FIELDS,
    IDENTIFYING_FIELDS,
    RELEASE_COMPARED_FIELDS,
    USE_FIELDS,
    comparable_value,
)
from gemma2tool.model.digest import config_digest

DIGESTS = {
    "2b": "5ef88f7994c79fc366791b352374b3e75e3fe1091372ee0262bed19295630773",
    "9b": "290653b41405879dca1247b1b2ea48647091c0ad02dade865c19ac64fa6d514c",
    "27b": "52ac261c26a037505cc94138234bcc11f9209930be65bffd8625b1f093bd9871",
}
"""Config digests of the released models, as in existing receipts (``gemma2tool config 1``)."""


def test_every_field_of_the_config_is_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(Gemma2Config)} - {"notes"}
    assert CONFIG_FIELDS.keys() == fields


def test_every_field_has_one_effect_and_a_meaning_where_messages_need_it() -> None:
    assert len(ARITHMETIC_FIELDS) + len(USE_FIELDS) + len(DESCRIPTION_FIELDS) == len(CONFIG_FIELDS)
    assert all(field.meaning for field in (*ARITHMETIC_FIELDS, *USE_FIELDS))


def test_released_models_are_recognized_by_sizes_and_compared_by_the_rest() -> None:
    assert not set(IDENTIFYING_FIELDS) & set(RELEASE_COMPARED_FIELDS)
    compared = {field.name for field in ARITHMETIC_FIELDS} | {"max_position_embeddings"}
    assert compared - {*IDENTIFYING_FIELDS, *RELEASE_COMPARED_FIELDS} == {
        "attention_bias",
        "tie_word_embeddings",
        "use_bidirectional_attention",
    }


@pytest.mark.parametrize("size", SIZES)
def test_config_digests_keep_their_values(size: str) -> None:
    assert config_digest(SIZES[size]) == DIGESTS[size]


def test_values_compare_in_float32_and_whatever_their_spelling() -> None:
    assert comparable_value("rms_norm_eps", 1e-6) == comparable_value("rms_norm_eps", 9.999999974752427e-07)
    assert comparable_value("query_pre_attn_scalar", 1e-6) != comparable_value("query_pre_attn_scalar", 9.99999997e-07)
    assert comparable_value("rope_scaling", None) == comparable_value("rope_scaling", {"rope_type": "default"})
    plain = {"rope_type": "yarn", "factor": 4.0}
    spelled = {**plain, "beta_fast": 32, "beta_slow": None, "truncate": True, "mscale": 1.0, "mscale_all_dim": 0.0}
    assert comparable_value("rope_scaling", plain) == comparable_value("rope_scaling", spelled)
    assert comparable_value("rope_scaling", plain) != comparable_value(
        "rope_scaling", {**plain, "mscale_all_dim": 2.0, "mscale": 1.0}
    )
    assert comparable_value("use_bidirectional_attention", None) is comparable_value(
        "use_bidirectional_attention", False
    )
