"""What one SSE event of a run's stream is: SseEvent -> Chunk | Ping | Done | ServerError | Unparsable.

Decides by message_type before it looks at seq_id, because keepalive pings borrow numbers (letta-protocol b).
Used by follower.py; the values go on to RunLog and to storage.
"""

import json
from typing import Annotated, Any

import msgspec

from worker.core.sse import SseEvent

MAX_SEQ_ID = 2**31 - 1
"""Larger numbers are refused as absurd: a run lives three hours, which would be 200,000 chunks a second."""
MAX_COLUMN_CHARS = 255
"""Longer ids stay in the payload only: an index entry has a size limit."""
MAX_SLOWLY_READ = 4 * 1024 * 1024
"""Characters of the largest payload the standard library reads: it takes thirty times the memory, in one go (I8)."""


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """One data payload of a run: one row.

    `payload` is the text after `data: `, verbatim. `seq_id` is None where the server sends none (stop_reason,
    usage_statistics). `ends_run` marks the run's own error event, the last thing in its log (letta-protocol a).
    """

    payload: str
    seq_id: int | None = None
    message_type: str | None = None
    message_id: str | None = None
    otid: str | None = None
    step_id: str | None = None
    run_id: str | None = None
    ends_run: bool = False


class Ping(msgspec.Struct, frozen=True, gc=False):
    """A ping: keepalive of one reader, or the first entry of a run's log. Only RunLog can tell which."""

    chunk: Chunk


class Done(msgspec.Struct, frozen=True, gc=False):
    """`[DONE]`: the run's terminal marker."""


class ServerError(msgspec.Struct, frozen=True, gc=False):
    """An error of the reader inside the server, not of the run: the run goes on (letta-protocol a, last row)."""

    detail: str


class Unparsable(msgspec.Struct, frozen=True, gc=False):
    """Bytes that cannot be a row. They hold a place in the server's log all the same."""

    raw: bytes
    reason: str


Event = Chunk | Ping | Done | ServerError | Unparsable


_Column = Annotated[str, msgspec.Meta(max_length=MAX_COLUMN_CHARS)] | None


class _PlainHead(msgspec.Struct, gc=False):
    """The fields of a payload as every healthy chunk has them: decoded and checked in one go."""

    message_type: _Column = None
    seq_id: Any = None
    id: _Column = None
    otid: _Column = None
    step_id: _Column = None
    run_id: _Column = None


class _Head(msgspec.Struct, gc=False):
    """The same fields, whatever stands there; the rest is skipped, not decoded."""

    message_type: Any = None
    seq_id: Any = None
    id: Any = None
    otid: Any = None
    step_id: Any = None
    run_id: Any = None


_decode_plain_head = msgspec.json.Decoder(_PlainHead).decode
_decode_head = msgspec.json.Decoder(_Head).decode


def parse(event: SseEvent) -> Event:
    """Classify one event. Never raises: what cannot be read comes back as Unparsable with its bytes."""
    return _parse_plain(event) or _parse_with_care(event)


def _parse_plain(event: SseEvent) -> Chunk | Ping | None:
    """The same for what is healthy, which is nearly everything: a tenth of the work. None for all else."""
    if event.event or event.is_oversized:
        return None
    try:
        payload = event.data.decode()
        head = _decode_plain_head(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if "\\" in payload and "\\u0000" in payload:  # looking for one character is many times faster
        return None
    if not _is_seq_id(head.seq_id):
        return None
    chunk = Chunk(payload, head.seq_id, head.message_type, head.id, head.otid, head.step_id, head.run_id)
    return Ping(chunk) if head.message_type == "ping" else chunk


def _parse_with_care(event: SseEvent) -> Event:
    if event.is_oversized:
        return Unparsable(event.data, "larger than the limit for one event; only its beginning is kept")
    if event.data == b"[DONE]":
        return Done()
    try:
        payload = event.data.decode()
    except UnicodeDecodeError:
        return Unparsable(event.data, "not UTF-8")
    head = _read_head(payload)
    if head is None:
        is_reader_event = event.event not in {"", "message"}
        reason = "not a JSON object" if len(payload) <= MAX_SLOWLY_READ else "not JSON, or too large for us to be sure"
        return ServerError(payload[:500]) if is_reader_event else Unparsable(event.data, reason)
    if event.event not in {"", "message"} and head.message_type is None:
        return ServerError(payload[:500])
    return _classify(payload, head, is_error=event.event == "error")


def _classify(payload: str, head: _Head, *, is_error: bool) -> Chunk | Ping | Unparsable:
    message_type = _column(head.message_type)
    is_ping = message_type == "ping"
    seq_id = head.seq_id
    if not _is_seq_id(seq_id):
        if not is_ping:
            return Unparsable(payload.encode(), f"seq_id is not a whole number from 1 to {MAX_SEQ_ID}")
        seq_id = None
    run_id = _column(head.run_id)
    if run_id is None and head.run_id is not None:
        # No run of ours: a run whose id is no such text is never followed. Taken for ours it would be a wrong row.
        if not is_ping:
            return Unparsable(payload.encode(), "run_id is not the id of a run")
        seq_id = None
    chunk = Chunk(
        payload,
        seq_id,
        message_type,
        _column(head.id),
        _column(head.otid),
        _column(head.step_id),
        run_id,
        is_error and message_type == "error_message",
    )
    return Ping(chunk) if is_ping else chunk


def _is_seq_id(value: object) -> bool:
    return value is None or (type(value) is int and 1 <= value <= MAX_SEQ_ID)


def _read_head(payload: str) -> _Head | None:
    try:
        return _decode_head(payload)
    except (msgspec.MsgspecError, RecursionError):
        if len(payload) > MAX_SLOWLY_READ:
            return None
    # The standard library also reads what msgspec refuses and Letta may send: lone surrogates, NaN. Of bytes it
    # would also guess UTF-16, and let through raw NULs, which no PostgreSQL text can hold.
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return _Head(**{name: fields.get(name) for name in _Head.__struct_fields__})


def _column(value: object) -> str | None:
    """The text as a database column can hold it, else None; the payload keeps it either way."""
    if type(value) is not str or len(value) > MAX_COLUMN_CHARS or "\x00" in value:
        return None
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return None
    return value
