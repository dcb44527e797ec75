"""Every answer of the server becomes the error that says what the worker does about it (letta-protocol d)."""

from __future__ import annotations

import datetime as dt
from email.utils import format_datetime
from typing import TYPE_CHECKING

import pytest

from tests.letta.wire import SECRET, answering, events_of
from worker.core.chunks import Chunk, Done
from worker.demo.fake_faults import Answer, Cut
from worker.demo.fake_routes import NO_REDIS
from worker.errors import (
    BadRequestError,
    NoBackgroundError,
    NotFoundError,
    NotStreamableError,
    RateLimitedError,
    RefusedError,
    RunExpiredError,
    RunIdIgnoredError,
    TroubleError,
    WorkerError,
)
from worker.letta import client as client_module
from worker.letta.answers import read_messages, read_runs
from worker.letta.client import Address, LettaClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from worker.demo.fake_letta import FakeLetta

RUN = "run-00000000-0000-4000-8000-000000000000"
CONVERSATION = "conv-00000000-0000-4000-8000-000000000000"
EVENT_STREAM = "text/event-stream; charset=utf-8"
NOT_BACKGROUND = "INVALID_ARGUMENT: Run was not created in background mode, so it cannot be retrieved."
NO_ACTIVE = "INVALID_ARGUMENT: No active runs found for this conversation."
EXPIRED = "EXPIRED: Run was created more than 3 hours ago, and is now expired."

TABLE = [
    (400, NO_ACTIVE, BadRequestError, RunIdIgnoredError),
    (400, NOT_BACKGROUND, NotStreamableError, RunIdIgnoredError),
    (400, "INVALID_ARGUMENT: Invalid run ID format: x", BadRequestError, BadRequestError),
    (401, "Unauthorized", RefusedError, RefusedError),
    (403, "Forbidden", RefusedError, RefusedError),
    (404, "Run not found", NotFoundError, NotFoundError),
    (405, "Method Not Allowed", BadRequestError, BadRequestError),
    (408, "Request Timeout", TroubleError, TroubleError),
    (409, "CONFLICT", BadRequestError, BadRequestError),
    (410, EXPIRED, RunExpiredError, RunIdIgnoredError),
    (413, "Too Large", BadRequestError, BadRequestError),
    (422, "[]", BadRequestError, BadRequestError),
    (429, "slow down", RateLimitedError, RateLimitedError),
    (500, "An unknown error occurred", TroubleError, TroubleError),
    (502, "Bad Gateway", TroubleError, TroubleError),
    (503, NO_REDIS, NoBackgroundError, NoBackgroundError),
    (503, "Service Unavailable", TroubleError, TroubleError),
    (504, "Gateway Timeout", TroubleError, TroubleError),
    (599, "?", TroubleError, TroubleError),
    (204, "", TroubleError, TroubleError),
    (304, "", TroubleError, TroubleError),
]


@pytest.mark.parametrize(("status", "detail", "by_run", "by_conversation"), TABLE)
async def test_status_codes(
    letta: FakeLetta,
    client: LettaClient,
    *,
    status: int,
    detail: str,
    by_run: type[WorkerError],
    by_conversation: type[WorkerError],
) -> None:
    """Each status of the stream endpoints has its reaction; what may be another run's is not taken for ours (I5)."""
    body = b'{"detail":"%s"}' % detail.encode() if detail else b""
    fault = Answer(status, body, on="stream", times=2)
    letta.faults.append(fault)

    for address, expected in ((Address(RUN), by_run), (Address(RUN, CONVERSATION), by_conversation)):
        with pytest.raises(WorkerError) as raised:
            await events_of(client, address)
        assert type(raised.value) is expected
        assert detail in str(raised.value)
    assert fault.fired == 2


@pytest.mark.parametrize("body", [b"<html>\xff</html>", b"[1]", b'"x"', b"null", b"", b"[" * 100_000])
async def test_error_without_detail(letta: FakeLetta, client: LettaClient, body: bytes) -> None:
    """An error's body may be anything and any length; the message stays short (I6)."""
    letta.faults.append(Answer(500, body, on="stream"))

    with pytest.raises(TroubleError, match="HTTP 500") as raised:
        await events_of(client, Address(RUN))

    assert len(str(raised.value)) < 600


def at(seconds: float) -> str:
    """An HTTP date so far from now."""
    return format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        (30, 20, 30),
        (-30, 0, 0),
        ("86400", 3600, 3600),
        ("inf", 3600, 3600),
        (10**7, 3600, 3600),
    ],
)
async def test_retry_after(letta: FakeLetta, client: LettaClient, header: str | int, least: float, most: float) -> None:
    """The server's own delay is read, as seconds or as a date, and an hour is the most."""
    value = header if isinstance(header, str) else at(header)
    letta.faults.append(Answer(429, headers={"retry-after": value}, on="runs"))

    with pytest.raises(RateLimitedError) as raised:
        await anext(aiter(client.newest_runs()))

    assert raised.value.retry_after is not None
    assert least <= raised.value.retry_after <= most


@pytest.mark.parametrize("header", ["", "soon", "nan", "Wed, 99 Foo", "Mon, 01 Jan 2024 00:00:00", "1e", "９９９９九"])
async def test_retry_after_of_no_use(letta: FakeLetta, client: LettaClient, header: str) -> None:
    """A delay nobody can read is none."""
    letta.faults.append(Answer(503, headers={"retry-after": header}, on="run"))

    with pytest.raises(TroubleError) as raised:
        await client.retrieve_run(RUN)

    assert raised.value.retry_after is None


@pytest.mark.parametrize("content_type", ["text/html", "application/json", "text/event-streams", ""])
async def test_stream_of_another_kind(letta: FakeLetta, client: LettaClient, content_type: str) -> None:
    """A page that answers 200 is not a stream that ended: it is trouble, and says what it was (I5)."""
    fault = Answer(200, b"<html>log in first</html>", content_type=content_type, on="stream")
    letta.faults.append(fault)

    with pytest.raises(TroubleError, match="is base_url a Letta server"):
        await events_of(client, Address(RUN))

    assert fault.fired == 1


@pytest.mark.parametrize("content_type", ["text/event-stream", "Text/Event-Stream ;charset=utf-8"])
async def test_stream(letta: FakeLetta, client: LettaClient, content_type: str) -> None:
    """A stream is read whatever the letters of its type."""
    letta.faults.append(Answer(200, b'data: {"seq_id":1}\n\ndata: [DONE]\n\n', content_type=content_type))

    assert await events_of(client, Address(RUN)) == [Chunk('{"seq_id":1}', 1), Done()]


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"{}", b"[1]", b"[{}]", b'[{"id":"run-1"}]', b'[{"id":"run-1","created_at":"x"}]', b"\xff"]
)
async def test_listing_that_is_none(letta: FakeLetta, client: LettaClient, body: bytes) -> None:
    """A listing that cannot be understood is trouble and not an empty listing, which would hide runs."""
    letta.faults += [Answer(200, body, on="runs"), Answer(200, body, on="run")]

    with pytest.raises(TroubleError):
        (await anext(aiter(client.newest_runs()))).whole()
    with pytest.raises(TroubleError):
        await client.retrieve_run(RUN)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"x"', b"7", b"\xff", b"[" * 10_000])
async def test_small_answers_that_are_none(letta: FakeLetta, client: LettaClient, body: bytes) -> None:
    """Whatever the other calls are answered, it becomes an error of ours."""
    letta.faults += [Answer(200, body, on="health"), Answer(200, body + b"x", on="conversations")]

    with pytest.raises(TroubleError):
        await client.server_version()
    with pytest.raises(TroubleError):
        await client.conversations_of("agent-1")


async def test_another_run_than_asked_for(letta: FakeLetta, client: LettaClient) -> None:
    """A record of another run is not taken for the one asked for (I5)."""
    other = letta.new_run()
    letta.faults.append(Answer(200, b'{"id":"%s","created_at":"2026-01-01T00:00:00Z"}' % other.id.encode(), on="run"))

    with pytest.raises(TroubleError, match=RUN):
        await client.retrieve_run(RUN)


@pytest.mark.parametrize("entry", [b"1", b"{}", b'{"id":"run-1"}', b'{"id":"run-1","created_at":"x"}'])
def test_an_entry_that_is_no_run(entry: bytes) -> None:
    """It counts, so that its page does not look like the last one, and is trouble (I5)."""
    page = read_runs(b"[%s]" % entry)

    assert (page.runs, page.entries, type(page.trouble)) == ([], 1, TroubleError)


def test_times_of_any_shape() -> None:
    """A time without a zone is UTC, and one that cannot be in UTC at all is no reason to fail (I6)."""
    listed = '[{"id":"run-1","created_at":"2026-01-01T02:00:00+02:00","completed_at":"%s"}]'
    times = ["2026-01-01T00:00:00.5", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "never"]

    completed = [read_runs((listed % time).encode()).runs[0].completed_at for time in times]

    assert completed == [dt.datetime(2026, 1, 1, 0, 0, 0, 500_000, dt.UTC), None, None, None]


def test_messages_of_any_shape() -> None:
    """A message the databases could not hold is kept all the same, its payload as it came (I6)."""
    raw = b'{"id":"m-1","message_type":"\\u0000","content":"a\\u0000b\\ud800","otid":"\\udfff","date":7}'

    (message,) = read_messages(b"[%s]" % raw)

    assert message.payload == raw.decode()
    assert (message.text, message.message_type, message.otid, message.date) == ("ab?", None, None, None)


async def test_answer_larger_than_the_limit(
    letta: FakeLetta, client: LettaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON answer that does not end is left at the limit (I8)."""
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 1_000_000)
    fault = Answer(200, b" " * 100_000, on="runs", repeat=500)
    letta.faults.append(fault)

    with pytest.raises(TroubleError, match="larger than 1000000 bytes"):
        await anext(aiter(client.newest_runs()))

    assert fault.fired == 1
    assert letta.requests[0].bytes_sent < 50_000_000


async def test_error_larger_than_the_limit(letta: FakeLetta, client: LettaClient) -> None:
    """Of an error's body only the beginning is read, and its length does not hide its status (I8)."""
    fault = Answer(410, b"x" * 100_000, content_type=EVENT_STREAM, repeat=500, times=2)
    letta.faults.append(fault)

    with pytest.raises(RunExpiredError):
        await events_of(client, Address(RUN))
    with pytest.raises(RunExpiredError):
        await client.retrieve_run(RUN)
    assert fault.fired == 2
    assert max(request.bytes_sent for request in letta.requests) < 50_000_000


@pytest.mark.parametrize("after_bytes", [0, 1, 100])
async def test_connection_broken(letta: FakeLetta, client: LettaClient, after_bytes: int) -> None:
    """A connection that breaks, before the status line or in the middle of a chunk, is trouble."""
    run = letta.new_run()
    fault = Cut(after_bytes, times=None)
    letta.faults.append(fault)

    with pytest.raises(TroubleError):
        await events_of(client, Address(run.id))
    with pytest.raises(TroubleError):
        await client.retrieve_run(run.id)
    with pytest.raises(TroubleError):
        await anext(aiter(client.newest_runs()))
    assert fault.fired >= 3


async def test_connection_refused(letta: FakeLetta, client: LettaClient) -> None:
    """A port nobody listens on is trouble, and no word of TLS is said where there is none."""
    await letta.stop_listening()

    with pytest.raises(TroubleError, match="Connect") as trouble:
        await client.server_version()
    assert "ssl" not in str(trouble.value)


STREAMING = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
RAW_ANSWERS = {
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-ty",
    "bad status": b"HTTP/1.1 banana\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    "half a chunk": STREAMING + b"transfer-encoding: chunked\r\n\r\n20\r\ndata: {}\n\n",
    "no last chunk": STREAMING + b"transfer-encoding: chunked\r\n\r\na\r\ndata: {}\n\n\r\n",
    "no chunk size": STREAMING + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "short body": STREAMING + b"content-length: 50\r\n\r\ndata: {}\n\n",
    "bad gzip": STREAMING + b"content-encoding: gzip\r\ncontent-length: 10\r\n\r\ndata: {}\n\n",
    "bad location": b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://[\r\ncontent-length: 0\r\n\r\n",
    "other scheme": b"HTTP/1.1 307 Temporary Redirect\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("name", RAW_ANSWERS)
async def test_broken_http(
    opened: Callable[..., AbstractAsyncContextManager[LettaClient]], *, name: str, resets: bool
) -> None:
    """Whatever comes over the wire, the worker hears of trouble and of nothing else, and its key is not in it (I10)."""
    async with (
        answering(RAW_ANSWERS[name], resets=resets) as port,
        opened(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        with pytest.raises(TroubleError) as raised:
            await events_of(client, Address(RUN))
        with pytest.raises(TroubleError):
            await client.retrieve_run(RUN)

    assert SECRET not in repr(raised.value)
