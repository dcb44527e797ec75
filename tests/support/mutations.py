"""Bytes as they never should be: real ones flipped, spliced, cut, repeated. Strategies for the fuzz tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

INSERTED = (
    *(bytes([n]) for n in (0, 9, 10, 13, 31, 34, 58, 92, 127, 128, 237, 255)),
    *(b"\n\n", b"\r\n", b"\r", b"data: ", b"data:", b"event: error\n", b"event: x\n", b": \n", b"id: 1\n", b"[DONE]"),
    *(b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\xbd", b"\xc0\x80", b"\\u0000", b"\\ud800", b'"seq_id":', b"null"),
    *(b"{", b"}", b"[", b"]", b"[" * 2000, b",", b'"', b"-", b"0", b"1", b"2147483647", b"9" * 30, b"1e400", b"NaN"),
    *(b'"message_type":"ping"', b'"message_type":"error_message"', b'"run_id":"run-x"', b'"run_id":null', b"}\n\n"),
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 6) -> bytes:
    """One of the seeds after some accidents."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, most))):
        place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 400))
        accident = draw(st.sampled_from(["flip", "insert", "cut", "repeat", "truncate", "splice"]))
        if accident == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif accident == "insert":
            data = data[:place] + draw(st.sampled_from(INSERTED)) + data[place:]
        elif accident == "cut":
            data = data[:place] + data[place + length :]
        elif accident == "repeat":
            data = data[: place + length] + data[place:]
        elif accident == "truncate":
            data = data[:place]
        else:
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, len(other)))
            data = data[:place] + other[start : start + length] + data[place:]
    return data
