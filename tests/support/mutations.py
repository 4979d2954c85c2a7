"""Byte mutations for fuzzing: what hypothesis draws, applied to a file."""

from __future__ import annotations

from hypothesis import strategies as st

INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    63,
    64,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 62,
    1 << 63,
]
INTERESTING += [(1 << 64) - 1, (1 << 64) - 32, (1 << 63) - 1]

Mutation = tuple[str, int, int, bytes]

mutations = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "insert", "delete", "copy", "number", "cut"]),
        st.integers(0, 1 << 16),
        st.integers(0, 255),
        st.binary(max_size=12),
    ),
    max_size=6,
)


def mutate(data: bytes, steps: list[Mutation]) -> bytes:
    """Applies each (kind, place, amount, bytes) step in turn. Places wrap around the length."""
    out = bytearray(data)
    for kind, place, amount, piece in steps:
        at = place % (len(out) + 1)
        if kind == "set":
            out[at : at + len(piece)] = piece
        elif kind == "flip" and at < len(out):
            out[at] ^= 1 << amount % 8
        elif kind == "insert":
            out[at:at] = piece * (amount % 9)
        elif kind == "delete":
            del out[at : at + amount % 40]
        elif kind == "copy":
            out[at:at] = out[amount : amount + 4 * len(piece)]
        elif kind == "number":
            width = (1, 2, 4, 8)[amount % 4]
            value = INTERESTING[amount % len(INTERESTING)] % (1 << 8 * width)
            out[at : at + width] = value.to_bytes(width, "little")
        elif kind == "cut" and amount > 200:
            del out[at:]
    return bytes(out)
