"""The network fault matrix: whatever happens to the bytes at any endpoint, in the end the store holds the server's log.

Between the real service and FakeLetta stands a TCP proxy (proxy.py). Silence is in test_network_silence.py, a thousand
followers at once are in test_network_stampede.py.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.faults.proxy import Answer, Cut, Delay, Drip, Proxy, Record, Redirect, Refuse, Rewrite, answer
from tests.support.rig import QUICK, SECRET, hurry, working
from worker.demo.fake_letta import FakeLetta
from worker.errors import RefusedError
from worker.letta import client as client_module

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.faults.proxy import Fault, How
    from tests.support.rig import Rig
    from worker.demo.fake_run import FakeRun

    Make = Callable[[str], Fault]  # for the requests whose line matches

ENDPOINTS = {
    "run listing": r"^GET /v1/runs/\?",
    "stream": r"^POST /v1/\S+/stream ",
    "run record": r"^GET /v1/runs/run-[^/]+ ",
    "messages": r"^GET /v1/runs/run-[^/]+/messages\?",
}
READ_TIMEOUT = 0.3
HTML = b"<!doctype html><title>Please log in</title>"
EVENT_STREAM = "text/event-stream; charset=utf-8"
RUNS_AT_ONCE = 40


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
async def proxy(letta: FakeLetta) -> AsyncIterator[Proxy]:
    """What stands between."""
    async with Proxy(letta.url) as made:
        yield made


def recorded(letta: FakeLetta) -> FakeRun:
    """A run of 25 events that is over: thoughts, a tool, text of more bytes than characters, unnumbered events."""
    run = letta.new_run(letta.new_conversation())
    for word in ("Ünï", "cödé", "\u2028", "\U0001f642"):
        run.think(word)
    run.call_tool("look", '{"at":"日本"}')
    run.tool_return("nothing\u0085there")
    for number in range(15):
        run.say(f"tök{number} ")
    run.complete()
    return run


def behind(
    proxy: Proxy, letta: FakeLetta, url: str, read_timeout: float = READ_TIMEOUT
) -> AbstractAsyncContextManager[Rig]:
    """A worker behind the proxy, whose service brings its own committer task."""
    waits = msgspec.structs.replace(QUICK, slow_chunk=0.5)
    settings = {"base_url": proxy.url, "read_timeout": read_timeout, "max_event_bytes": 65536}
    return working(letta, url, commits=False, waits=waits, **settings)


async def serve_once(rig: Rig) -> None:
    """Let the service follow everything there is to its end; it lists the runs before and after."""
    async with asyncio.timeout(30):
        await (await rig.service(interval=60.0)).run(once=True)


# ---- one fault at each endpoint ----


@dataclass(frozen=True)
class Row:
    """A fault that each endpoint meets `times` times; `is_borne`: a stream is not even asked for again."""

    make: Make
    times: int = 1
    is_borne: bool = False
    fires_at: Iterable[str] = tuple(ENDPOINTS)


def saying(status: int, body: bytes = b'{"detail":"x"}', kind: str = "application/json", **headers: str) -> Make:
    """A whole answer that is not the one asked for."""
    return lambda on: Answer(answer(status, body, kind, **headers), on=on)


def raw(data: bytes, *, tail: bytes = b"", pause: float = 0.0) -> Make:
    """These bytes instead of an answer, and then the end, or a tail without one."""
    return lambda on: Answer(data, tail, pause, then="close", on=on)


def cut(after: int, how: How) -> Make:
    """The answer breaks off after so many bytes."""
    return lambda on: Cut(after, how, on=on)


OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"

MATRIX = {
    "connection refused": Row(lambda on: Refuse(on=on)),
    "reset before the answer": Row(cut(0, "reset")),
    "reset in the head": Row(cut(40, "reset")),
    "reset in the body": Row(cut(300, "reset")),
    "closed before the answer": Row(cut(0, "close")),
    "closed in the head": Row(cut(40, "close")),
    "closed in the body": Row(cut(300, "close")),
    "half open before the answer": Row(cut(0, "silence")),
    "half open in the head": Row(cut(40, "silence")),
    "half open in the body": Row(cut(300, "silence")),
    "bytes drip in": Row(lambda on: Drip(on=on), is_borne=True),
    "headers late": Row(lambda on: Delay(READ_TIMEOUT / 3, on=on), is_borne=True),
    "headers too late": Row(lambda on: Delay(READ_TIMEOUT * 2, on=on)),
    "429": Row(saying(429), times=3),
    "429 with Retry-After": Row(saying(429, retry_after="0.2")),
    "500": Row(saying(500), times=3),
    "500 that calls itself a stream": Row(saying(500, b"", EVENT_STREAM)),
    "502": Row(saying(502), times=3),
    "503": Row(saying(503), times=3),
    "503 with Retry-After": Row(saying(503, retry_after="0.2")),
    "504": Row(saying(504), times=3),
    "200 but HTML": Row(saying(200, HTML, "text/html")),
    "200 but empty": Row(saying(200, b"", EVENT_STREAM)),
    "404 in HTML": Row(saying(404, HTML, "text/html")),
    "404 of a web framework": Row(saying(404, b'{"detail":"Not Found"}')),
    "stream of a wrong content type": Row(
        lambda on: Rewrite(b"text/event-stream", b"application/grpc", on=on), fires_at=["stream"]
    ),
    "redirect": Row(lambda on: Redirect(307, on=on), is_borne=True),
    "redirect to a login page": Row(lambda on: Redirect(302, "/login", on=on)),
    "redirect without end": Row(lambda on: Redirect(307, on=on), times=25),
    "not HTTP": Row(raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")),
    "truncated chunk": Row(raw(OK + b"transfer-encoding: chunked\r\n\r\n40\r\n[{data: ")),
    "no last chunk": Row(raw(OK + b"transfer-encoding: chunked\r\n\r\n2\r\n[{\r\n")),
    "body shorter than its length": Row(raw(OK + b"content-length: 50\r\n\r\n[{data: ")),
    "cut body without a length": Row(raw(OK + b"connection: close\r\n\r\n[{")),
    "endless body": Row(raw(OK + b"connection: close\r\n\r\n[", tail=b" " * 65536, pause=0.01)),
    "endless body that drips": Row(raw(OK + b"connection: close\r\n\r\n[", tail=b" ", pause=0.02)),
    "endless error that drips": Row(raw(b"HTTP/1.1 500 No\r\nconnection: close\r\n\r\n", tail=b" ", pause=0.02)),
}


@pytest.mark.parametrize("name", MATRIX)
async def test_matrix(
    letta: FakeLetta, proxy: Proxy, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A fault at every endpoint is got over without help, in few requests; the rows are the server's log (I2, I5)."""
    hurry(monkeypatch)
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 1_000_000)
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 3 * READ_TIMEOUT)
    row, run = MATRIX[name], recorded(letta)
    faults = {endpoint: row.make(on) for endpoint, on in ENDPOINTS.items()}
    for fault in faults.values():
        fault.times = row.times
    proxy.faults += faults.values()

    async with behind(proxy, letta, sqlite_url, 10.0 if row.is_borne else READ_TIMEOUT) as rig:
        await serve_once(rig)
        await rig.assert_complete(run)
        assert await rig.messages(run)

    assert [endpoint for endpoint, fault in faults.items() if fault.fired == row.times] == list(row.fires_at)
    assert bool(rig.log.of("run.reconnecting")) is not row.is_borne
    assert len(proxy.requests) <= 12 + 5 * row.times  # 6 of them without any fault; the rest is no busy loop


@pytest.mark.parametrize(("status", "body"), [(401, b'{"detail":"Unauthorized"}'), (403, HTML)])
async def test_refusal_ends_the_service(
    letta: FakeLetta, proxy: Proxy, sqlite_url: str, status: int, body: bytes
) -> None:
    """A refused key, at whichever endpoint, ends the service; a later one goes on from what is stored (I2, I10)."""
    run = recorded(letta)
    for on in ENDPOINTS.values():
        fault = saying(status, body)(on)
        proxy.faults = [fault]
        async with behind(proxy, letta, sqlite_url) as rig:
            with pytest.raises(RefusedError, match="refuses the API key") as refused:
                await serve_once(rig)
        assert fault.fired == 1
        assert SECRET not in str(refused.value)

    async with behind(proxy, letta, sqlite_url) as rig:
        await serve_once(rig)
        await rig.assert_complete(run)


async def test_redirect_takes_the_key_nowhere(letta: FakeLetta, proxy: Proxy, sqlite_url: str) -> None:
    """A redirect to another server is followed without the key (I10)."""
    run = recorded(letta)
    async with Proxy(letta.url) as elsewhere, behind(proxy, letta, sqlite_url) as rig:
        faults = [Redirect(307, elsewhere.url, on=on) for on in ENDPOINTS.values()]
        proxy.faults += faults
        await serve_once(rig)
        await rig.assert_complete(run)

    assert [fault.fired for fault in faults] == [1] * len(ENDPOINTS)
    assert len(elsewhere.requests) == len(ENDPOINTS)
    assert all(SECRET.encode() in asked.head for asked in proxy.requests)
    assert not any(SECRET.encode() in asked.head for asked in elsewhere.requests)


@pytest.mark.parametrize("endpoint", ["run record", "messages"])
async def test_outage_at_the_end_of_a_run(
    letta: FakeLetta, proxy: Proxy, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """A run is not settled without its messages because the server was away just then, for however long."""
    hurry(monkeypatch, 10_000)
    run, fault = recorded(letta), Refuse(0.0, on=ENDPOINTS[endpoint], times=30)
    proxy.faults.append(fault)

    async with behind(proxy, letta, sqlite_url) as rig:
        await serve_once(rig)
        await rig.assert_complete(run)
        assert await rig.messages(run)
        assert (await rig.row(run))["error"] is None

    assert fault.fired == 30


# ---- a cut at every byte ----


def sampled(recording: bytes, stride: int) -> list[int]:
    """Where to cut: behind every `stride`th byte, and behind every byte of what is delicate."""
    end_of_head, between_events = rb"\r\n\r\n", rb"\}\n\n\r\n[0-9a-f]+\r\ndata: "
    the_end = rb"\n\n\r\ne\r\ndata: \[DONE\]\n\n\r\n0\r\n\r"
    delicate = [end_of_head, between_events, the_end, *(text.encode() for text in ("\u2028", "\U0001f642", "日本"))]
    found = [re.search(text, recording) for text in delicate]
    assert all(found)
    spans = [match.span() for match in found if match]
    return sorted({*range(0, len(recording), stride), *(n for span in spans for n in range(*span))})


async def cut_each(letta: FakeLetta, proxy: Proxy, url: str, positions: list[int], how: How) -> None:
    """Follow one recorded run per position; the first response of each is cut there."""
    letta.runs.clear()
    runs = [recorded(letta) for _ in positions]
    faults = [
        Cut(position, how, on=f"/{run.conversation_id}/stream ") for position, run in zip(positions, runs, strict=True)
    ]
    proxy.faults = list(faults)
    async with working(letta, url, base_url=proxy.url) as rig:
        await rig.sweep()
        await asyncio.gather(*(rig.follow(run) for run in runs))
        for run, fault in zip(runs, faults, strict=True):
            assert fault.fired == 1, fault
            await rig.assert_complete(run)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    hurry(monkeypatch, 1000)


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("stride", [151, pytest.param(1, marks=pytest.mark.campaign)])
async def test_cut_behind_every_byte(letta: FakeLetta, proxy: Proxy, tmp_path: Path, stride: int, how: How) -> None:
    """A connection that ends behind any byte of a recorded run, head and framing too, costs no row (I1, I2)."""
    record = Record(on="/stream ")
    proxy.faults.append(record)
    async with working(letta, f"sqlite:///{tmp_path}/recording.db", base_url=proxy.url) as rig:
        await rig.follow(recorded(letta))
    positions = sampled(bytes(record.answer), stride)
    assert record.answer.count(b"\n\n") == 25
    assert len(positions) >= len(record.answer) / stride

    for start in range(0, len(positions), RUNS_AT_ONCE):
        url = f"sqlite:///{tmp_path}/{start}.db"
        await cut_each(letta, proxy, url, positions[start : start + RUNS_AT_ONCE], how)
