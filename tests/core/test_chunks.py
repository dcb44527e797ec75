"""parse(): what each line of a real server is, and that nothing it can be sent makes it fail or alter a byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.core.chunks import (
    MAX_COLUMN_CHARS,
    MAX_SEQ_ID,
    MAX_SLOWLY_READ,
    Chunk,
    Done,
    Event,
    Ping,
    ServerError,
    Unparsable,
    parse,
)
from worker.core.sse import SseDecoder, SseEvent

RUN = "run-3fcaa9e3-8334-4c88-8836-a9656f2f4eaf"
MESSAGE = "message-f7871f8a-41f5-4112-8094-921698e94894"


def captured(name: str) -> list[Event]:
    """Parse what a real letta 0.16.8 sent, byte for byte (tests/core/captures)."""
    received = (Path(__file__).parent / "captures" / f"{name}.sse").read_bytes()
    return [parse(event) for event in SseDecoder(1 << 20).feed(received)]


def in_short(event: Event) -> str:
    """Name an event in one word: kind, number, and whether it ends the run."""
    if isinstance(event, Ping):
        event = event.chunk
    if not isinstance(event, Chunk):
        return type(event).__name__
    kind = re.sub("_(message|reason|statistics)$", "", str(event.message_type))
    return f"{kind}{event.seq_id or ''}{'(ends)' if event.ends_run else ''}"


def parsed(data: str | bytes, name: str = "") -> Event:
    """Parse one event."""
    return parse(SseEvent(data.encode() if isinstance(data, str) else data, name))


# What a real server sends


@pytest.mark.parametrize(
    ("capture", "events"),
    [
        ("run", "ping1 reasoning2 reasoning3 assistant4 assistant5 assistant6 assistant7 stop usage Done"),
        (
            "keepalive",
            "ping1 assistant2 assistant3 assistant4 ping4 ping4 assistant5 assistant6 assistant7 stop usage Done",
        ),
        (
            "tool_run",
            (
                "ping1 reasoning2 reasoning3 tool_call4 tool_return5 reasoning6 reasoning7 assistant8 assistant9"
                " stop usage Done"
            ),
        ),
        ("failed_run", "ping1 assistant2 assistant3 assistant4 stop stop error7(ends)"),
        ("lone_surrogate", "assistant1 stop error3(ends)"),
    ],
)
def test_captured_runs(capture: str, events: str) -> None:
    """Every event of real runs is what letta-protocol a says it is, number or none included (I5, I9)."""
    assert [in_short(event) for event in captured(capture)] == events.split()


def test_captured_chunk_has_its_columns() -> None:
    """A chunk's ids are what people query by, and its payload is the text after `data: `, verbatim (I6)."""
    chunk = captured("run")[3]
    assert isinstance(chunk, Chunk)
    received = (Path(__file__).parent / "captures" / "run.sse").read_text()
    assert f"data: {chunk.payload}\n\n" in received
    assert chunk == Chunk(
        chunk.payload,
        4,
        "assistant_message",
        MESSAGE,
        "f7871f8a-41f5-4112-8094-921698e94881",
        "step-6bc73bdf-e212-4dd6-9182-a19c1083082d",
        RUN,
    )


def test_captured_odd_characters() -> None:
    """NUL, U+2028, U+0085, U+FFFE and what else a model may say arrive as they were sent (letta-protocol j, I6)."""
    chunks = [event for event in captured("odd_characters") if isinstance(event, Chunk)]
    assert [chunk.seq_id for chunk in chunks] == [*range(1, 14), None, None]
    text = "".join(json.loads(chunk.payload).get("content", "") for chunk in chunks)
    assert text == 'a\0b\u2028c\x85d\xe9\U0001f600"\n\r\ufffe'
    assert not any("\0" in chunk.payload for chunk in chunks)


@pytest.mark.parametrize(
    ("data", "name", "event"),
    [
        ('{"id":"ping-1","message_type":"ping","seq_id":1,"run_id":"r"}', "", "ping1"),
        ('{"id":"ping-1","message_type":"ping","seq_id":null,"run_id":"r"}', "", "ping"),
        ('{"message_type":"ping"}', "", "ping"),
        ('{"message_type":"reasoning_message","seq_id":2,"run_id":"r"}', "", "reasoning2"),
        ('{"message_type":"tool_call_message","seq_id":4,"run_id":"r"}', "message", "tool_call4"),
        ('{"message_type":"tool_return_message","seq_id":5,"run_id":"r"}', "", "tool_return5"),
        ('{"message_type":"stop_reason","stop_reason":"end_turn"}', "", "stop"),
        ('{"message_type": "stop_reason", "stop_reason": "cancelled"}', "", "stop"),
        ('{"message_type":"usage_statistics","run_ids":null}', "", "usage"),
        ("[DONE]", "", "Done"),
        ('{"message_type":"error_message","run_id":"r","seq_id":7}', "error", "error7(ends)"),
        ('{"message_type":"error_message","run_id":"r","seq_id":7}', "", "error7"),
        ('{"error":"Error 111 connecting","code":"INTERNAL_SERVER_ERROR"}', "error", "ServerError"),
        ('{"error":"Error 111","code":"X","seq_id":7,"run_id":"r"}', "error", "ServerError"),
        ("Internal Server Error", "error", "ServerError"),
        ("", "error", "ServerError"),
        ('{"message_type":"never_heard_of","seq_id":3,"run_id":"r"}', "", "never_heard_of3"),
        ('{"message_type":"never_heard_of","seq_id":3,"run_id":"r"}', "never_heard_of", "never_heard_of3"),
        ('{"seq_id":3}', "", "None3"),
        ("{}", "", "None"),
    ],
)
def test_each_kind_of_event(data: str, name: str, event: str) -> None:
    """Each row of the tables a and b of letta-protocol, and what a later release may add (I5, I6, I9)."""
    assert in_short(parsed(data, name)) == event


# What it might be sent


@pytest.mark.parametrize(
    "number",
    [
        "true",
        "false",
        "1.0",
        "1.5",
        '"7"',
        '""',
        "-1",
        "0",
        "-0",
        str(MAX_SEQ_ID + 1),
        str(2**63),
        str(10**30),
        "1e400",
        "1e2",
        "NaN",
        "-Infinity",
        "[]",
        "{}",
        "9" * 5000,
    ],
)
def test_an_absurd_number_is_refused_and_kept(number: str) -> None:
    """What is no whole number from 1 on orders nothing: the bytes are kept, and a ping is a keepalive then (I6, I9)."""
    data = f'{{"message_type":"assistant_message","seq_id":{number},"run_id":"r"}}'
    event = parsed(data)
    assert isinstance(event, Unparsable)
    assert event.raw == data.encode()
    ping = parsed(data.replace("assistant_message", "ping"))
    assert isinstance(ping, Unparsable if len(number) == 5000 else Ping)
    assert not isinstance(ping, Ping) or ping.chunk.seq_id is None


@pytest.mark.parametrize("number", [1, 2**31 - 1])
def test_the_smallest_and_the_largest_number(number: int) -> None:
    """Numbers go from 1 to MAX_SEQ_ID, both included (I1)."""
    assert in_short(parsed(f'{{"seq_id":{number}}}')) == f"None{number}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"true",
        b"7",
        b'"text"',
        b"[]",
        b'[{"seq_id":1}]',
        b"{",
        b'{"seq_id":1',
        b'{"seq_id":1}}',
        b'{"seq_id":1}{"seq_id":2}',
        b"{'seq_id':1}",
        b'{"seq_id":1,}',
        b"[DONE] ",
        b"[done]",
        b"Internal Server Error",
        b'{"content":"\x00","seq_id":1}',
        b'{"seq_id":1}\x00',
        b'{"content":"\x1f","seq_id":1}',
        '{"seq_id":1}'.encode("utf-16-le"),
        '{"seq_id":1}'.encode("utf-16"),
        '{"seq_id":1}'.encode("utf-32"),
        b'\xef\xbb\xbf{"seq_id":1}',
        b'{"content":"\xff","seq_id":1}',
        b'{"content":"\xed\xa0\xbd","seq_id":1}',
        b'{"content":"\xc0\x80","seq_id":1}',
        b'{"content":"\xe2\x80","seq_id":1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b',"seq_id":1}',
    ],
)
def test_what_cannot_be_a_row_keeps_its_bytes(data: bytes) -> None:
    """No JSON, not UTF-8, no object, raw NULs, too deep: flagged, with the bytes as they came (I6)."""
    event = parsed(data)
    assert isinstance(event, Unparsable)
    assert event.raw == data
    assert event.reason


def test_an_oversized_event_keeps_its_beginning() -> None:
    """What the decoder refused for its size says so, even if its beginning would parse (I6, I8)."""
    event = parse(SseEvent(b"[DONE]", is_oversized=True))
    assert isinstance(event, Unparsable)
    assert event.raw == b"[DONE]"
    assert "larger than the limit" in event.reason


@pytest.mark.parametrize(
    "data",
    [
        '{"content":"\\ud83d","seq_id":1}',
        '{"content":"\\udc00\\ud800","seq_id":1}',
        '{"content":"\\u0000","seq_id":1}',
        '{"content":"\u2028\u2029\x85\x7f","seq_id":1}',
        '{"content":"\ufeff\ufffe\uffff","seq_id":1}',
        '{"content":"\U0010ffff","seq_id":1}',
        '{"content":NaN,"seq_id":1}',
        '{"content":-Infinity,"seq_id":1}',
        '{"content":1e400,"seq_id":1}',
        '{"content":%s,"seq_id":1}' % ("9" * 1000),
        '{"seq_id":9,"seq_id":1}',
        '{"\\u0073eq_id":1}',
        '{"a":%s,"seq_id":1}' % ("[" * 100 + "]" * 100),
        ' \t\r\n{ "seq_id" :\n1 } ',
        '{"content":"%s","seq_id":1}' % ("x" * 1_000_000),
    ],
)
def test_what_is_odd_but_readable_is_a_chunk_verbatim(data: str) -> None:
    """Lone surrogates, escaped NULs, NaN, duplicate keys, any white space: a chunk like any other, unaltered (I6)."""
    event = parsed(data)
    assert isinstance(event, Chunk)
    assert event.seq_id == 1
    assert event.payload == data


@pytest.mark.parametrize("field", ["message_type", "id", "otid", "step_id"])
@pytest.mark.parametrize(
    ("value", "column"),
    [
        ("text", "text"),
        ("é\u2028\U0001f600", "é\u2028\U0001f600"),
        ("x" * MAX_COLUMN_CHARS, "x" * MAX_COLUMN_CHARS),
        ("x" * (MAX_COLUMN_CHARS + 1), None),
        ("x" * 1_000_000, None),
        ("nul\0", None),
        ("lone\ud83d", None),
        (7, None),
        (True, None),
        (["a"], None),
        (None, None),
    ],
)
def test_a_column_holds_only_what_a_database_can_hold(field: str, value: object, column: str | None) -> None:
    """An id no column can hold stays in the payload, and the chunk keeps its number (I6)."""
    data = json.dumps({field: value, "seq_id": 1})
    event = parsed(data)
    assert isinstance(event, Chunk)
    assert getattr(event, "message_id" if field == "id" else field) == column
    assert (event.seq_id, event.payload) == (1, data)


@pytest.mark.parametrize("value", ["x" * (MAX_COLUMN_CHARS + 1), "nul\0", "lone\ud83d", 7, True, ["a"], {}])
def test_the_id_of_no_run_is_not_taken_for_ours(value: object) -> None:
    """A run_id that no run of ours can have makes a chunk nobody's: kept as bytes, and a ping is a keepalive (I1)."""
    data = json.dumps({"run_id": value, "seq_id": 1})
    event = parsed(data)
    assert isinstance(event, Unparsable)
    assert event.raw == data.encode()
    ping = parsed(json.dumps({"run_id": value, "seq_id": 1, "message_type": "ping"}))
    assert isinstance(ping, Ping)
    assert ping.chunk.seq_id is None


def test_what_is_read_slowly_is_not_large() -> None:
    """Only a small payload is given to the standard library, which takes thirty times its size at once (I8)."""
    small, large = (b'{"seq_id":1,"a":NaN,"b":[%s1]}' % (b"{}," * (size // 3)) for size in (1000, MAX_SLOWLY_READ))
    assert isinstance(parsed(small), Chunk)
    event = parsed(large)
    assert isinstance(event, Unparsable)
    assert event.raw == large


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["message_type", "seq_id", "id", "otid", "step_id", "run_id", "content"])
PAYLOADS = st.builds(
    lambda fields, is_ascii: json.dumps(fields, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass"),
    st.dictionaries(FIELDS, JSON | st.sampled_from([1, 2, "ping", "error_message"])),
    st.booleans(),
)
PIECES = st.lists(st.sampled_from([*(bytes([b]) for b in b'{}[]":,\\0u1 '), b'"seq_id"', b"\x00", b"\xff"]))
HOSTILE = PAYLOADS | st.binary(max_size=60) | PIECES.map(b"".join) | JSON.map(lambda v: json.dumps(v).encode())
NAMES = st.sampled_from(["", "message", "error", "ping", "\x00"])


@settings(max_examples=500)
@given(HOSTILE, NAMES, st.booleans())
@example('{"seq_id":1}'.encode("utf-16-le"), "", False)  # noqa: FBT003
def test_parse_never_fails_and_never_alters(data: bytes, name: str, is_oversized: bool) -> None:  # noqa: FBT001
    """Whatever arrives, parse() answers, and what it keeps can be stored and is what came (I6)."""
    event = parse(SseEvent(data, name, is_oversized))
    if isinstance(event, Unparsable):
        assert event.raw == data
    elif isinstance(event, Chunk | Ping):
        chunk = event.chunk if isinstance(event, Ping) else event
        assert chunk.payload.encode() == data
        assert "\0" not in chunk.payload, "no PostgreSQL text can hold it"
        assert chunk.seq_id is None or (type(chunk.seq_id) is int and 1 <= chunk.seq_id <= MAX_SEQ_ID)
        for column in (chunk.message_type, chunk.message_id, chunk.otid, chunk.step_id, chunk.run_id):
            assert column is None or (len(column.encode()) <= 4 * MAX_COLUMN_CHARS and "\0" not in column)
    elif isinstance(event, ServerError):
        assert name not in {"", "message"}
    else:
        assert (event, data) == (Done(), b"[DONE]")


@given(st.dictionaries(FIELDS, JSON), st.integers(1, MAX_SEQ_ID))
def test_what_the_standard_library_reads_has_the_same_columns(fields: dict[str, object], number: int) -> None:
    """The quick reading of a payload's head agrees with a whole decode of it (I1)."""
    fields = {**fields, "seq_id": number, "message_type": "assistant_message", "run_id": "run-1"}
    event = parsed(json.dumps(fields))
    assert isinstance(event, Chunk)
    read = json.loads(event.payload)
    assert (event.seq_id, event.message_type) == (read["seq_id"], read["message_type"])
    for name, column in (("id", event.message_id), ("otid", event.otid), ("run_id", event.run_id)):
        assert column is None or column == read[name]
