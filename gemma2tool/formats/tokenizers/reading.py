"""Tokenizer files to the canonical tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gemma2tool.containers.tokenizer_model import NormalizerSpec, Piece
from gemma2tool.formats.tokenizers.agreement import find_conflicts
from gemma2tool.formats.tokenizers.files import TokenizerFiles
from gemma2tool.formats.tokenizers.roles import Roles, read_roles
from gemma2tool.formats.tokenizers.tokenizer_json import json_normalizer, json_pieces, with_control_pieces
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.tokenizer import Pieces, Tokenizer, added_of_pieces


def read_tokenizer(assets: Mapping[str, bytes], config: Gemma2Config) -> Tokenizer:
    """The canonical tokenizer of a Hugging Face folder's files, or of as many of them as there are.

    ``config`` has the ids of bos, eos and pad where the files do not state them. Raises ``InputRefused``
    (``sentencepiece.damaged``, ``tokenizer.*``) for files that are damaged or not a Gemma's.
    """
    files = TokenizerFiles.of(assets)
    if files.model is None and files.json is None:
        return Tokenizer(
            added_tokens={},
            stop_ids=files.stop_ids(),
            chat_templates=files.chat_templates(),
        )
    pieces: list[Piece] = list(files.model.pieces) if files.model is not None else json_pieces(files.json or {})
    added = files.added_tokens()
    notes = []
    if files.adds_nothing:
        added = added_of_pieces(Pieces.of(pieces)) | added
        notes.append(
            "no tokenizer_config.json or tokenizer.json states which tokens are special: control tokens are those that"
            " tokenizer.model marks, and Gemma's turn marks"
        )
    overlaid = Tokenizer(Pieces.of(pieces), added).vocabulary.texts
    roles = read_roles(files, overlaid, config)
    templates = files.chat_templates()
    if files.config is None and not templates:
        notes.append("no tokenizer_config.json or chat_template.jinja: no chat template is known")
    if files.model is None:
        pieces = with_control_pieces(pieces, roles.ids)
    conflicts = partial(find_conflicts, files.json, pieces, added) if files.model and files.json else tuple
    return Tokenizer(
        Pieces.of(pieces),
        added,
        roles.ids,
        _effective(roles, files),
        tuple(roles.adds),
        _normalizer(files),
        files.stop_ids(),
        templates,
        (*notes, *roles.notes),
        conflicts,
        states_special=not files.adds_nothing,
        splits_special=(files.config or {}).get("split_special_tokens") is True,
    )


def _effective(roles: Roles, files: TokenizerFiles) -> dict[str, bool]:
    """Whether a text gets bos and eos. A tokenizer.json whose post-processor does not put bos puts none."""
    adds = dict(roles.adds)
    if files.json is not None:
        adds.setdefault("bos", False)
        adds.setdefault("eos", False)
    return adds


def _normalizer(files: TokenizerFiles) -> NormalizerSpec:
    if files.model is not None:
        return files.model.normalizer_spec
    return json_normalizer(files.json or {})
