"""SseDecoder: the same events as httpx-sse, however the bytes are cut, and bounded whatever they are."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import example, given
from hypothesis import strategies as st

from worker.core.sse import SseDecoder, SseEvent

PLENTY = 1 << 20
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
TEXTS = st.text(st.sampled_from("aé\u2028\u0085\U0001f600\ufeff\x00\x0b\x0c :{}"), max_size=8)
LINES = st.one_of(
    st.just(""),
    st.builds("data: {}".format, TEXTS),
    st.builds("data:{}".format, TEXTS),
    st.builds("event: {}".format, TEXTS),
    st.builds(": {}".format, TEXTS),
    st.builds("id: {}".format, TEXTS),
    st.sampled_from(["data", "event", "data: [DONE]", "retry: 5", "unknown: x", " data: x", "DATA: x"]),
    TEXTS,
)
STREAMS = st.lists(st.tuples(LINES, LINE_ENDS), max_size=20).map(lambda lines: "".join(a + b for a, b in lines))
CUTS = st.lists(st.integers(0, 400), max_size=30)


def decode(received: bytes, cuts: list[int] | None = None, *, limit: int = PLENTY, kept: int = 4096) -> list[SseEvent]:
    """Feed the bytes in pieces that end at the given places."""
    decoder = SseDecoder(limit, kept)
    places = sorted({0, len(received), *(cut for cut in cuts or () if cut < len(received))})
    return [event for start, end in pairwise(places) for event in decoder.feed(received[start:end])]


def oracle(text: str) -> list[SseEvent]:
    """What httpx-sse makes of it, less the events that carry no data: the standard does not dispatch those."""
    lines = SSELineDecoder()
    decoder = SSEDecoder()
    events = []
    for line in [*(lines.decode(text) if text else []), *lines.flush()]:
        has_data = bool(decoder._data)
        event = decoder.decode(line)
        if event is not None and has_data:
            events.append(SseEvent(event.data.encode(), event.event))
    return events


@given(STREAMS, CUTS, st.sampled_from(["", "\ufeff"]))
@example("data: a\r\n\r\ndata: b\r\r", [8, 9, 10, 11], "\ufeff")
def test_same_events_as_httpx_sse(text: str, cuts: list[int], mark: str) -> None:
    """Any stream, cut anywhere, gives what httpx-sse reads in it; a byte order mark at its start is nothing (I6)."""
    text = mark + text
    events = [SseEvent(e.data, e.event or "message") for e in decode(text.encode(), cuts)]
    assert events == oracle(text.removeprefix("\ufeff"))


@given(
    st.lists(st.sampled_from([b"data: ", b"a", b"\n", b"\r", b"\xe2\x80", b"\xa8", b"\xff", b":"])).map(b"".join), CUTS
)
def test_where_the_bytes_are_cut_means_nothing(received: bytes, cuts: list[int]) -> None:
    """Bytes that are not even UTF-8 give the same events in one piece, in any pieces and one by one (I6)."""
    assert decode(received) == decode(received, cuts) == decode(received, list(range(len(received))))


@given(
    st.lists(st.sampled_from([b"data: 123456789", b"x", b"\n", b"\n\n", b"\r\n"]), max_size=30).map(b"".join),
    CUTS,
    st.integers(3, 40),
    st.integers(1, 60),
)
@example(b"data: 1234\n\n", [11], 10, 4)
@example(b"data: 1\n\n\ndata: 1234\n\n", [9, 10], 10, 4)
@example(b"data: 12345\n\n", [11], 10, 40)
def test_an_event_is_refused_by_its_size_and_not_by_its_cuts(
    received: bytes, cuts: list[int], limit: int, kept: int
) -> None:
    """The size limit is one of the event, to the byte: no cut makes it larger (I8)."""
    assert decode(received, limit=limit, kept=kept) == decode(received, cuts, limit=limit, kept=kept)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_what_only_python_calls_a_line_end_stays_inside_the_line(separator: str) -> None:
    """Letta sends U+2028 and U+0085 raw inside a line; they end nothing (letta-protocol j)."""
    data = f'{{"content":"a{separator}b"}}'.encode()
    assert decode(b"data: " + data + b"\n\n", list(range(60))) == [SseEvent(data)]


@given(STREAMS, st.integers(0, 400))
def test_an_event_that_the_end_cuts_short_is_never_given_out(text: str, cut: int) -> None:
    """What a broken-off response gives is the beginning of what the whole one gives, event by whole event (I2)."""
    received = text.encode()
    begun = decode(received[:cut])
    assert begun == decode(received)[: len(begun)]
    assert decode(b'data: {"seq_id":7}\n') == []


def test_an_oversized_event_is_refused_and_the_next_one_is_read() -> None:
    """Of an event over the limit the beginning is given out, flagged and at once; what follows is not lost (I6, I8)."""
    decoder = SseDecoder(max_event_bytes=100, kept_of_oversized=20)
    (refused,) = decoder.feed(b"data: " + b"x" * 200)
    assert refused == SseEvent(b"data: " + b"x" * 14, is_oversized=True)
    assert decoder.feed(b"y" * 1000 + b"\ndata: of the same event\n") == []
    assert decoder.feed(b"\ndata: next\n\n") == [SseEvent(b"next")]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_oversized_events_in_a_row_are_refused_one_by_one(end: bytes, piece: int) -> None:
    """Each oversized event is refused once, however it arrives, and its neighbours are untouched (I6, I8)."""
    received = end.join([b"data: a", b"data: " + b"x" * 150, b"data: b", b"data: " + b"y" * 101, b"data: c", b""])
    events = decode(received, list(range(0, len(received), piece)), limit=100)
    assert [event.data[:7] for event in events] == [b"a", b"data: x", b"b", b"data: y", b"c"]
    assert [event.is_oversized for event in events] == [False, True, False, True, False]


@pytest.mark.parametrize("limit", [1000, 1 << 20])
def test_a_line_without_end_takes_neither_memory_nor_time(limit: int) -> None:
    """Many megabytes without a line end keep the buffer bounded, and cost the same for each byte (I8)."""
    piece = b"x" * 65536
    decoder = SseDecoder(limit)
    refused, seconds = [], []
    for _ in range(4):
        started = time.process_time()
        for _ in range(64):
            refused += decoder.feed(piece)
            assert len(decoder._buffer) <= limit + len(piece)
        seconds.append(time.process_time() - started)
    assert len(refused) == 1
    assert len(refused[0].data) <= 4096
    assert seconds[-1] < 10 * seconds[0] + 0.1


def test_endless_line_ends_take_no_memory() -> None:
    """A server that sends blank lines for ever leaves nothing in the buffer (I8)."""
    decoder = SseDecoder(1000)
    for received in [b"\n" * 1000, b"\r\n" * 1000, b"\r", b"\n"] * 100:
        assert decoder.feed(received) == []
        assert len(decoder._buffer) <= 2


def test_ten_megabytes_under_the_limit_pass_in_linear_time() -> None:
    """A large event within the limit is given out whole, and searching for its end is not quadratic (I8)."""
    data = b"x" * (10 << 20)
    decoder = SseDecoder(32 << 20)
    received = b"data: " + data + b"\n\n"
    started = time.process_time()
    events = [e for at in range(0, len(received), 4096) for e in decoder.feed(received[at : at + 4096])]
    assert events == [SseEvent(data)]
    assert time.process_time() - started < 2


def test_a_hundred_thousand_events_in_one_piece() -> None:
    """One read from the socket may complete any number of events; it gives all of them, in order."""
    started = time.process_time()
    events = SseDecoder(PLENTY).feed(b"".join(b"data: %d\n\n" % n for n in range(100_000)))
    assert [int(event.data) for event in events] == list(range(100_000))
    assert time.process_time() - started < 3


def test_the_name_of_an_event_and_several_data_lines() -> None:
    """An event keeps its name and joins its data lines with LF; comments, ids and unknown fields are nothing."""
    received = b": ping\nevent: error\nid: 7\ndata: one\ndata:two\nretry: 1\nfoo\n\ndata: three\n\n"
    assert decode(received, list(range(99))) == [SseEvent(b"one\ntwo", "error"), SseEvent(b"three")]


def test_an_event_without_data_is_nothing() -> None:
    """Only data makes an event: a lone name, an id or a comment is not one."""
    assert decode(b"event: error\n\n: keepalive\n\nid: 1\n\n\n\n") == []
    assert decode(b"data:\n\ndata\n\n") == [SseEvent(b""), SseEvent(b"")]
