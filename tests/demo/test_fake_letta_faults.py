"""FakeLetta's scripted faults: each does what it says, counts that it fired, and leaves the next request alone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.demo.wire import probe, raw, until
from worker.demo.fake_faults import Answer, Cut, Drip, EndEarly, Fault, Hang, OtherRun, ReaderError

if TYPE_CHECKING:
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

EVENT_STREAM = "text/event-stream; charset=utf-8"


@pytest.fixture
def run(letta: FakeLetta) -> FakeRun:
    """A finished run of six events: ping, two of text, stop_reason, usage, [DONE]."""
    made = letta.new_run(letta.new_conversation())
    made.say("tok000001 ")
    made.say("tok000002 ")
    made.complete()
    return made


async def read_until_broken(client: httpx.AsyncClient, path: str) -> bytes:
    """Read a stream that breaks; returns what arrived."""
    arrived = b""
    with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 - it breaks while being read
        async with client.stream("POST", path, json={}) as answer:
            async for piece in answer.aiter_bytes():
                arrived += piece
    return arrived


async def test_status_answer(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A scripted status goes to the next matching requests only, headers and body included."""
    fault = Answer(503, b"busy", {"Retry-After": "7"}, "text/plain", on="runs", times=2)
    letta.faults.append(fault)

    health = await client.get("/v1/health/")
    refused = [await client.get("/v1/runs/") for _ in range(2)]
    served = await client.get("/v1/runs/")

    assert [health.status_code, served.status_code] == [200, 200]
    assert {(r.status_code, r.text, r.headers["retry-after"]) for r in refused} == {(503, "busy", "7")}
    assert (fault.fired, letta.faults) == (2, [])


async def test_server_error_as_empty_event_stream(letta: FakeLetta, run: FakeRun) -> None:
    """A 500 that calls itself an event stream has no body and is chunked, as with Redis down."""
    letta.faults.append(Answer(500, content_type=EVENT_STREAM))

    answer = await raw(letta.url, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert answer.startswith("HTTP/1.1 500 ")
    assert answer.endswith("\r\n\r\n0\r\n\r\n")


async def test_hostile_bytes(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """Any bytes can be served as a stream, any number of times."""
    letta.faults.append(Answer(200, b"\xff\0data:", content_type=EVENT_STREAM, repeat=1000))

    answer = await client.post(f"/v1/runs/{run.id}/stream", json={})

    assert answer.content == b"\xff\0data:" * 1000


async def test_cut_at_every_place(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """A connection is cut after exactly so many bytes of the body, wherever in an event that is."""
    path = f"/v1/runs/{run.id}/stream"
    whole = (await client.post(path, json={})).content

    for length in (1, 5, 6, 247, 248, 249, 500, len(whole) - 1, len(whole)):
        fault = Cut(length, on="stream")
        letta.faults.append(fault)
        assert await read_until_broken(client, path) == whole[:length]
        assert fault.fired == 1


async def test_cut_before_any_answer(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """A cut after no bytes at all breaks the connection before the status line; lists can be cut too."""
    letta.faults += [Cut(0, on="run"), Cut(10, on="runs")]

    for path in (f"/v1/runs/{run.id}", "/v1/runs/"):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(path)

    assert [request.bytes_sent for request in letta.requests] == [0, 10]


async def test_cut_that_never_comes(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A fault whose moment does not come is used up, but does not claim to have fired."""
    fault = Cut(1_000_000)
    letta.faults.append(fault)

    assert (await client.get("/v1/runs/")).status_code == 200
    assert (fault.fired, letta.faults) == (0, [])


@pytest.mark.parametrize(("after_events", "seen"), [(0, []), (2, ["ping seq=1", "assistant_message seq=2 tok000001"])])
async def test_hang_until_released(
    letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun, after_events: int, seen: list[str]
) -> None:
    """A hanging request gets nothing more, not even pings; released, it goes on where it was."""
    fault = Hang(after_events, times=2)
    letta.faults.append(fault)
    path = f"/v1/runs/{run.id}/stream"

    silent = await probe(client, "POST", path, "{}", 0.2)
    held = asyncio.create_task(probe(client, "POST", path, "{}"))
    await until(lambda: fault.fired == 2)
    fault.release()

    assert silent[1:-1] == seen
    assert silent[-1] == "end: TIMEOUT"
    assert (await held)[-2:] == ["[DONE]", "end: EOF"]


@pytest.mark.parametrize("after_events", [0, 3])
async def test_end_without_marker(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun, after_events: int) -> None:
    """A stream can end cleanly with no sign that the run is over."""
    fault = EndEarly(after_events)
    letta.faults.append(fault)

    lines = await probe(client, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert len(lines) == after_events + 2
    assert lines[-1] == "end: EOF"
    assert fault.fired == 1


async def test_reader_error(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """The server's own reader can break: an event: error that is not the run's, then the end."""
    letta.faults.append(ReaderError(2, 'say "no"'))

    lines = await probe(client, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert lines[3:] == [
        r'event: error None seq=- {"error": "say \"no\"", "code": "INTERNAL_SERVER_ERROR"}',
        "end: EOF",
    ]


async def test_chunks_of_another_run(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """A stream can deliver another run than the one that was asked for, with that one's ids."""
    other = letta.new_run()
    other.say("not yours")
    other.complete()
    fault = OtherRun(other)
    letta.faults.append(fault)

    answer = await client.post(f"/v1/runs/{run.id}/stream", json={})

    assert f'"run_id":"{other.id}","content":"not yours"' in answer.text
    assert run.id not in answer.text
    assert fault.fired == 1


async def test_drip(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """A slow server sends piece by piece, and the whole arrives."""
    path = f"/v1/runs/{run.id}/stream"
    whole = (await client.post(path, json={})).content
    fault = Drip(100, 0.005)
    letta.faults.append(fault)

    started = time.monotonic()
    answer = await client.post(path, json={})

    assert answer.content == whole
    assert time.monotonic() - started > len(whole) // 100 * 0.005
    assert fault.fired == 1


async def test_faults_for_one_run(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """A fault can be meant for one run, named in the path or in the body, and for good."""
    other = letta.new_run()
    fault = Answer(418, on="stream", run_id=run.id, times=None)
    letta.faults.append(fault)

    answers = [
        await client.post(f"/v1/conversations/{run.conversation_id}/stream", json={"run_id": run.id}),
        await client.post(f"/v1/runs/{run.id}/stream", json={}),
        await client.get(f"/v1/runs/{run.id}"),
        await client.get(f"/v1/runs/{other.id}"),
    ]

    assert [answer.status_code for answer in answers] == [418, 418, 200, 200]
    assert (fault.fired, letta.faults) == (2, [fault])


def test_a_fault_of_no_kind_does_nothing() -> None:
    """The base class matches anything once and interferes with nothing."""
    assert Fault().times == 1
    assert Fault().fired == 0


# ---- the server's own life ----


async def test_dropped_connections(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Dropping connections breaks a live stream in the middle; the next request is served."""
    live = letta.new_run()
    path = f"/v1/runs/{live.id}/stream"

    reading = asyncio.create_task(read_broken_line(client, path))
    await until(lambda: letta.open_streams)
    await letta.drop_connections()

    assert await reading
    assert letta.open_streams == 0
    assert (await client.get("/v1/health/")).status_code == 200


async def read_broken_line(client: httpx.AsyncClient, path: str) -> bool:
    """Read until the connection breaks."""
    with pytest.raises(httpx.TransportError):
        await client.post(path, json={})
    return True


async def test_outage(letta: FakeLetta) -> None:
    """A server that stopped listening refuses connections, and comes back on the same port."""
    url = letta.url
    await letta.stop_listening()
    await letta.drop_connections()

    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/v1/health/")
        await letta.start_listening()
        assert (await client.get("/v1/health/")).status_code == 200
        await letta.restart()
        assert (await client.get("/v1/health/")).status_code == 200
    assert letta.url == url


async def test_redis_outage_under_live_readers(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """When Redis goes, a reader without pings is told so, one with pings just ends; a lost key then hangs."""
    live = letta.new_run()
    path = f"/v1/runs/{live.id}/stream"

    told = asyncio.create_task(probe(client, "POST", path, '{"include_pings":false}'))
    ended = asyncio.create_task(probe(client, "POST", path, "{}"))
    await until(lambda: letta.open_streams == 2)
    letta.redis = "down"
    lines, lines_with_pings = await told, await ended
    live.forget()
    letta.redis = "up"

    assert lines[-2].startswith('event: error None seq=- {"error": "Error 111 connecting to 127.0.0.1')
    assert lines_with_pings[-1] == "end: EOF"
    assert set(lines_with_pings[1:-1]) == {"ping seq=1"}
    assert await probe(client, "POST", path, '{"include_pings":false}', 0.1) == ["end: TIMEOUT"]


async def test_records(letta: FakeLetta, client: httpx.AsyncClient, run: FakeRun) -> None:
    """Every request is remembered: what it asked, what it got, how long it was open and how many were at once."""
    live = letta.new_run()
    body = '{"starting_after":1,"include_pings":false}'
    reading = [asyncio.create_task(probe(client, "POST", f"/v1/runs/{live.id}/stream", body)) for _ in range(3)]
    await until(lambda: letta.open_streams == 3)
    open_then = [request.closed_at for request in letta.requests]
    live.complete()
    await asyncio.gather(*reading)
    await probe(client, "POST", f"/v1/runs/{letta.new_run(pings=False).id}/stream", body, 0.05)
    await client.get("/v1/runs/", params={"limit": "1", "statuses": ["failed", "running"]})
    await until(lambda: not letta.open_streams)

    stream, listing = letta.requests[0], letta.requests[-1]
    assert open_then == [None] * 3
    assert (stream.method, stream.kind, stream.run_id, stream.status) == ("POST", "stream", live.id, 200)
    assert stream.body == {"starting_after": 1, "include_pings": False}
    assert stream.bytes_sent == sum(len(entry.data) for entry in live.log[1:-1])
    assert stream.closed_at is not None
    assert stream.closed_at >= stream.opened_at
    assert (listing.query, listing.kind) == ({"limit": "1", "statuses": "failed,running"}, "runs")
    assert (letta.most_open_streams, letta.abandoned_streams) == (3, 1)
