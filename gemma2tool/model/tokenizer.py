"""A model's tokenizer in canonical form: what every format's reader produces from its files and keys, and what every
writer starts from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemma2tool.containers import tokenizer_model
from gemma2tool.containers.tokenizer_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    NormalizerSpec,
    Piece,
)
from gemma2tool.model.config import Gemma2Config

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""What a token can be for, in the order in which llama.cpp's converter writes them."""

DEFAULT_TEMPLATE = "default"

_PLACEHOLDER = "\ufdd0"
"""Prefix of the texts of pieces that cannot occur in a text: a code point that is not a character."""
_SURROGATE = re.compile("[\ud800-\udfff]")

_GEMMAS_PLAIN_TOKENS = ("<mask>", "<2mass>", "[@BOS@]")
"""Added tokens of Gemma's that look special and are not, beside the unused ones."""


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter writes an added token as a control token even where its file calls
    it not special.
    """
    if text in ("<pad>", *_GEMMAS_PLAIN_TOKENS):
        return True
    return (text.startswith("<|") and text.endswith("|>")) or _is_unused(text)


def _is_unused(text: str) -> bool:
    return text.startswith("<unused") and text.endswith(">")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before it is cut into pieces.

    ``special``: left out of a decoded text on request; None where the file does not say. ``normalized``: looked for in
    the normalized text. ``lstrip``, ``rstrip``: takes the spaces beside it. ``single_word``: found only between word
    boundaries.
    """

    content: str
    special: bool | None = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def is_special(self) -> bool:
        """``special``, or the likeliest value where the file does not say."""
        if self.special is not None:
            return self.special
        return not (self.content in _GEMMAS_PLAIN_TOKENS or _is_unused(self.content))


@dataclass(frozen=True, eq=False)
class Pieces:
    """SentencePiece's vocabulary by id: texts (a space is U+2581), float32 scores (n,), uint8 types (n,)."""

    texts: tuple[str, ...]
    scores: NDArray[np.float32]
    types: NDArray[np.uint8]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Pieces:
        listed = tuple(pieces)
        known = range(NORMAL, BYTE + 1)
        return cls(
            tuple(piece.text for piece in listed),
            np.array([piece.score for piece in listed], np.float32),
            np.array([piece.type if piece.type in known else NORMAL for piece in listed], np.uint8),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def listed(self) -> list[Piece]:
        return [
            Piece(text, score, type)
            for text, score, type in zip(self.texts, self.scores.tolist(), self.types.tolist(), strict=True)
        ]


NO_PIECES = Pieces((), np.zeros(0, np.float32), np.zeros(0, np.uint8))


@dataclass(frozen=True)
class Conflict:
    """Where the files of one tokenizer contradict each other. ``serious``: texts get other ids by one than by the
    other.
    """

    message: str
    serious: bool = True


def _no_conflicts() -> tuple[Conflict, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What turns text into token ids and back, and what a conversation looks like.

    - ``pieces``: SentencePiece's vocabulary; ids are positions. Empty where the checkpoint has none.
    - ``added_tokens``: by id; they override pieces of the same id and can lie beyond them.
    - ``roles``: ids of the tokens of ``ROLES`` that the files name.
    - ``adds``: role -> whether a text gets the token ("bos" before it, "eos" after it, "sep" between two); a role that
      is absent is not known. ``declared``: the roles of ``adds`` that the files state, in their order.
    - ``normalizer``: what is done to a text first; ``normalizer.add_dummy_prefix`` is llama.cpp's add_space_prefix.
    - ``stop_ids``: the ids that end a generated text; None where only the model's config says. ``implied_stops``: those
      of them that no file states; the program that runs the model adds them.
    - ``chat_templates``: by name; ``DEFAULT_TEMPLATE`` is the one that is used unless another is asked for.
    - ``notes``: what reading had to assume.
    - ``states_special``: whether the files say which added tokens are special; otherwise it is concluded from texts.
    - ``splits_special``: special tokens in a text are cut into pieces like any other text.
    - ``find_conflicts``: compares the files with each other, which takes seconds; see ``conflicts``.
    """

    pieces: Pieces = NO_PIECES
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    roles: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    declared: tuple[str, ...] = ()
    normalizer: NormalizerSpec = NormalizerSpec()
    stop_ids: tuple[int, ...] | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    find_conflicts: Callable[[], tuple[Conflict, ...]] = _no_conflicts
    implied_stops: frozenset[int] = frozenset()
    states_special: bool = True
    splits_special: bool = False

    @property
    def has_vocabulary(self) -> bool:
        return len(self.pieces) > 0

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max([len(self.pieces), *(token + 1 for token in self.added_tokens)])

    @cached_property
    def conflicts(self) -> tuple[Conflict, ...]:
        return self.find_conflicts()

    @cached_property
    def vocabulary(self) -> Pieces:
        """The pieces with the added tokens in their places, all ids up to ``size``.

        An added token is USER_DEFINED with a score of 0; an id without a token is UNUSED with an empty text. A piece
        that only SentencePiece calls USER_DEFINED is NORMAL: transformers and llama.cpp know added tokens alone.
        """
        missing = self.size - len(self.pieces)
        texts = [*self.pieces.texts, *("",) * missing]
        scores = np.concatenate([self.pieces.scores, np.zeros(missing, np.float32)])
        types = np.concatenate([self.pieces.types, np.full(missing, UNUSED, np.uint8)])
        types[types == USER_DEFINED] = NORMAL
        for token, added in self.added_tokens.items():
            texts[token], scores[token], types[token] = added.content.replace(" ", SPACE), 0.0, USER_DEFINED
        return Pieces(tuple(texts), scores, types)

    @cached_property
    def model_file(self) -> bytes:
        """The tokenizer as a model file that sentencepiece can run; equal bytes encode and decode alike."""
        vocabulary = self.vocabulary
        types = vocabulary.types.tolist()
        unknown = self._unknown_id(types)
        byte_fallback = types.count(BYTE) == 256
        taken = {text for text, type in zip(vocabulary.texts, types, strict=True) if type == USER_DEFINED}

        def pieces() -> Iterator[Piece]:
            seen: set[str] = set()
            for token, (text, score) in enumerate(zip(vocabulary.texts, vocabulary.scores.tolist(), strict=True)):
                type = types[token]
                if token == unknown:
                    type = UNKNOWN
                elif type == UNKNOWN or (type == BYTE and not byte_fallback):
                    type = NORMAL
                shadowed = type not in (USER_DEFINED, UNKNOWN) and text in taken
                if not text or text in seen or shadowed or _SURROGATE.search(text):
                    # SentencePiece takes no empty, repeated or non-UTF-8 pieces.
                    text, type = f"{_PLACEHOLDER}{token}", (UNKNOWN if type == UNKNOWN else UNUSED)
                seen.add(text)
                yield Piece(text, score, type)
            if unknown is None:
                yield Piece(_PLACEHOLDER, 0.0, UNKNOWN)

        special = {"unk": len(types) if unknown is None else unknown}
        return tokenizer_model.encode(pieces(), special, self.normalizer, byte_fallback=byte_fallback)

    def _unknown_id(self, types: list[int]) -> int | None:
        """The id of the unknown token; SentencePiece needs exactly one."""
        token = self.roles.get("unk")
        if token is not None and token < len(types):
            return token
        places = np.flatnonzero(self.pieces.types == UNKNOWN)
        return int(places[0]) if len(places) else None

    def spelling(self, token: int) -> str | None:
        """A token as the files spell it; None for an id without a token."""
        if token in self.added_tokens:
            return self.added_tokens[token].content
        return self.pieces.texts[token] if 0 <= token < len(self.pieces) else None

    def is_found_whole(self, token: int) -> bool:
        """Whether it is a token of its own in a text, and not one of the pieces that texts are cut into."""
        return token in self.added_tokens or not (
            token < len(self.pieces) and self.pieces.types[token] in (NORMAL, BYTE)
        )

    def text(self, token: int) -> str:
        """A token as text, a space where SentencePiece writes U+2581; ``<ID>`` for an id without a token."""
        spelling = self.spelling(token)
        return f"<{token}>" if spelling is None else spelling.replace(SPACE, " ")

    def stops(self, config: Gemma2Config) -> tuple[int, ...]:
        """The ids that end an answer of a model of ``config``: those that the tokenizer's files state, else the
        config's.
        """
        return self.stop_ids or config.eos_token_ids

    def within(self, vocab_size: int) -> Tokenizer:
        """Without the tokens that a model of ``vocab_size`` embedding rows cannot be given."""
        if self.size <= vocab_size:
            return self
        pieces = self.pieces
        return replace(
            self,
            pieces=Pieces(pieces.texts[:vocab_size], pieces.scores[:vocab_size], pieces.types[:vocab_size]),
            added_tokens={token: added for token, added in self.added_tokens.items() if token < vocab_size},
            roles={role: token for role, token in self.roles.items() if token < vocab_size},
        )


def added_of_pieces(pieces: Pieces) -> dict[int, AddedToken]:
    """The added tokens where only SentencePiece's types tell them: Gemma's control tokens and turn
    marks are special.
    """
    added = {}
    for token, (text, _, type) in enumerate(pieces.listed()):
        if type in (CONTROL, UNKNOWN, USER_DEFINED):
            added[token] = AddedToken(text, type != USER_DEFINED or text.endswith("_of_turn>"))
    return added
