"""Strict JSON: nothing ambiguous, within limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma2tool.containers import strict_json
from tests.support.hostile.refusal import Hostile, as_params, assert_refused, assert_refused_somehow

MAX = 1 << 20

CASES = [
    Hostile("empty", b"", "json.syntax"),
    Hostile("cut", b'{"a": [1, 2', "json.syntax"),
    Hostile("two values", b"{} {}", "json.syntax"),
    Hostile("single quotes", b"{'a': 1}", "json.syntax"),
    Hostile("trailing comma", b'{"a": 1,}', "json.syntax"),
    Hostile("a comment", b'{"a": 1} // one', "json.syntax"),
    Hostile("a control character in a text", b'{"a": "b\nc"}', "json.syntax"),
    Hostile("5,000 digits", b"9" * 5000, "json.syntax"),
    Hostile("a byte order mark", b"\xef\xbb\xbf{}", "json.syntax"),
    Hostile("duplicate key", b'{"a": 1, "b": 2, "a": 3}', "json.duplicate-key"),
    Hostile("duplicate key, spelt differently", b'{"a": 1, "\\u0061": 3}', "json.duplicate-key"),
    Hostile("duplicate key deep inside", b'[[{"x": {"a": 1, "a": 1}}]]', "json.duplicate-key"),
    Hostile("NaN", b'{"a": NaN}', "json.nonfinite"),
    Hostile("Infinity", b"[Infinity]", "json.nonfinite"),
    Hostile("-Infinity", b"-Infinity", "json.nonfinite"),
    Hostile("a number that overflows", b'{"a": 1e999}', "json.nonfinite"),
    Hostile("a negative one", b"[-2.5E+400]", "json.nonfinite"),
    Hostile("not UTF-8", b'"\xff"', "json.utf8"),
    Hostile("a lone surrogate in UTF-8", b'"\xed\xa0\x80"', "json.utf8"),
    Hostile("65 lists deep", b"[" * 65 + b"]" * 65, "json.depth"),
    Hostile("65 deep, mixed", b'{"a":[' * 33 + b"]}" * 33, "json.depth"),
    Hostile("half a million open lists", b"[" * 500_000, "json.depth"),
    Hostile("half a million open dicts", b'{"":' * 250_000, "json.depth"),
    Hostile("quotes that never close", b'"\\' * 500_000, "json.syntax"),
    Hostile("one byte too long", b'"' + b"a" * (MAX - 1) + b'"', "json.too-large"),
    Hostile("too many values", b"[" + b"1," * 100_000 + b"1]", "json.too-many-values"),
    Hostile("too many empty lists", b"[" + b"[]," * 60_000 + b"1]", "json.too-many-values"),
]


@pytest.mark.parametrize("from_file", [False, True])
@as_params(CASES)
def test_hostile_json_is_refused(case: Hostile, from_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(case.data)
    source = path if from_file else case.data
    id = "file.too-large" if from_file and case.id == "json.too-large" else case.id
    error = assert_refused(lambda: strict_json.load(source, what="the config", max_bytes=MAX, max_values=100_000), id)
    assert (str(path) if from_file else "the config") in error.message


@pytest.mark.slow
@pytest.mark.parametrize("piece", [b"]", b"[", b"[]", b'"', b'{"":', b'"",', b"1,"])
def test_tens_of_megabytes_are_refused_quickly(piece: bytes) -> None:
    data = piece * (32_000_000 // len(piece))
    error = assert_refused_somehow(lambda: strict_json.load(data, what="x", max_bytes=64 << 20))
    assert error.id in ("json.too-many-values", "json.depth", "json.syntax")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1.5e300,
        "",
        'é\u2028\U0001f600"\\/\n',
        [],
        {},
        [[[]]],
        {"a": {"b": [1, "]}", '"[{', "\\"]}},
        "\ud800",
    ],
)
def test_output_of_json_is_read(value: object) -> None:
    for ascii_only in (True, False):
        try:
            data = json.dumps(value, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:  # a lone surrogate has no UTF-8
            continue
        assert strict_json.load(data, what="x", max_bytes=MAX) == value


def test_the_maximal_depth_is_read() -> None:
    strict_json.load(b"[" * 64 + b"]" * 64, what="x", max_bytes=MAX)
    strict_json.load(b'["' + b"[" * 1000 + b'"]', what="x", max_bytes=MAX, max_depth=1)


def test_nonfinite_numbers_on_request() -> None:
    assert strict_json.load(b"[Infinity]", what="x", max_bytes=MAX, allow_nonfinite=True) == [float("inf")]


def test_the_message_names_the_key() -> None:
    error = assert_refused(
        lambda: strict_json.load(b'{"a\\nb":1,"a\\nb":1}', what="x", max_bytes=MAX), "json.duplicate-key"
    )
    assert r"a\nb" in error.message
