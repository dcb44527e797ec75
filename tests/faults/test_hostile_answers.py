"""What REST answers, and a server's words in errors: nothing of it stops the worker, and nothing of it is too much."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.hostile import EndlessMessages, Raw
from tests.support.mutations import mutated
from tests.support.rig import SECRET, hurry, until, working
from worker.demo.fake_faults import Answer
from worker.demo.fake_letta import FakeLetta
from worker.demo.fake_run import compact
from worker.errors import TroubleError, WorkerError
from worker.letta import client as client_module
from worker.letta.answers import MAX_DETAIL_CHARS, error_of, read_ids, read_messages, read_run, read_runs, read_version
from worker.letta.client import Address
from worker.status import read_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.rig import Rig
    from worker.demo.fake_run import FakeRun

EXAMPLES = int(os.environ.get("LETTA_INGEST_EXAMPLES") or "150")
TRICK = 'a\u0000b\u001b[2J\ud800 "quoted"\n[/]'
LISTED = compact([{"id": "run-1", "created_at": "2026-11-22T15:06:52.849251Z", "metadata": {"error": "é\u2028"}}])
SAID = compact(
    [{"id": "message-1", "message_type": "x", "date": "2026-11-22T15:06:52+00:00", "content": [{"text": "é"}]}]
)
ANSWERS = [body.encode() for body in (LISTED, SAID, compact({"detail": [{"msg": "é"}]}), compact({"version": "1"}))]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
async def rig(letta: FakeLetta, sqlite_url: str) -> AsyncIterator[Rig]:
    """A worker on SQLite."""
    async with working(letta, sqlite_url) as made:
        yield made


@pytest.fixture
async def rig_on_both(letta: FakeLetta, database_url: str) -> AsyncIterator[Rig]:
    """A worker on SQLite and on PostgreSQL, one after the other."""
    async with working(letta, database_url) as made:
        yield made


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@given(mutated(ANSWERS) | st.binary(max_size=40), st.integers(200, 599))
def test_any_answer_is_understood_or_refused(body: bytes, status: int) -> None:
    """Whatever an answer holds, no other error than ours comes of it: short, on one line, and storable (I6)."""
    reads = (lambda body: read_runs(body).whole(), read_run, read_messages, read_ids, read_version)
    said = [complaint(read, body) for read in reads]
    said.append(str(error_of(status, {}, body)))
    for text in said:
        assert len(text) < 1000
        assert not {"\n", "\r", "\0"} & set(text)
        text.encode()


def complaint(read: Callable[[bytes], object], body: bytes) -> str:
    """Why an answer is refused; nothing, if it is understood."""
    try:
        read(body)
    except WorkerError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("body", [TRICK.encode("utf-8", "replace"), json.dumps({"detail": TRICK}).encode(), b"\xff\0"])
async def test_words_of_an_error_can_be_stored(rig_on_both: Rig, letta: FakeLetta, body: bytes) -> None:
    """Why a run's messages could not be had is stored with it, whatever bytes the server says it with (I6)."""
    run = finished(letta)
    fault = Answer(400, body, on="messages", times=None)
    letta.faults.append(fault)

    await rig_on_both.follow(run)

    row = await rig_on_both.row(run)
    assert fault.fired
    assert (row["state"], row["settled_at"] is not None) == ("complete", True)
    assert row["error"].startswith("the server does not give the run's record and messages: HTTP 400: ")


@pytest.mark.parametrize(
    "item",
    [
        b'{"id":"m","x":"\xff"}',
        b'{"id":"m","x":"\xed\xa0\xbd"}',
        b'{"id":"m","x":"\x00"}',
        b'{"id":"\\u0000"}',
        b"[" * 5000,
    ],
    ids=["no UTF-8", "surrogate bytes", "NUL", "no id", "deep"],
)
async def test_messages_nobody_can_read(rig: Rig, letta: FakeLetta, item: bytes) -> None:
    """Messages that are none leave the run complete, with the reason why it has none (I6)."""
    run = finished(letta)
    letta.faults.append(Answer(200, b"[" + item + b"]", on="messages", times=None))

    await rig.follow(run)

    assert await rig.messages(run) == []
    assert "the server" in (await rig.row(run))["error"]
    assert (await rig.row(run))["state"] == "complete"


async def test_messages_any_database_can_hold(rig_on_both: Rig, letta: FakeLetta) -> None:
    """A message with all there is to stumble over is stored, its payload as it came (I6)."""
    run = finished(letta)
    fields = {"id": "m", "message_type": TRICK, "otid": TRICK, "step_id": 7, "date": "0001-01-01", "content": TRICK}
    body = json.dumps([fields]).encode()
    letta.faults.append(Answer(200, body, on="messages", times=None))

    await rig_on_both.follow(run)

    assert await rig_on_both.query("SELECT payload FROM messages") == [(body[1:-1].decode(),)]
    assert (await rig_on_both.row(run))["error"] is None


async def test_messages_without_end(rig: Rig, letta: FakeLetta, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of messages that never ends is left where it becomes too large, and the run is settled (I8)."""
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 500_000)
    run = finished(letta)
    fault = EndlessMessages(on="messages", times=None)
    letta.faults.append(fault)

    await rig.follow(run)

    row = await rig.row(run)
    assert (row["state"], row["settled_at"] is not None) == ("complete", True)
    assert "or without end" in row["error"]
    assert fault.fired < 100


LAYERS = [("gzip, gzip", 2), ("gzip", 1), ("GZIP,identity,deflate,gzip", 3)]


@pytest.mark.parametrize(("encoding", "layers"), LAYERS)
async def test_packed_stream_is_not_unpacked(rig: Rig, letta: FakeLetta, encoding: str, layers: int) -> None:
    """One read of a packed stream could be a gigabyte, or a million events: it is trouble, and is not unpacked (I8)."""
    run = finished(letta)
    body = b"data: x\n\n" * 1_000_000
    for _ in range(layers):
        body = gzip.compress(body)
    fault = Raw(body, {"content-encoding": encoding}, on="stream")
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 1
    await rig.assert_complete(run)
    assert await rig.query("SELECT count(*) FROM rejects") == [(0,)]
    assert "packed" in rig.log.of("run.reconnecting")[0]["error"]


async def test_packed_answers(rig: Rig, letta: FakeLetta) -> None:
    """An answer packed once is read, one packed twice is refused: a small read of it may be gigabytes (I8)."""
    body = compact([finished(letta).as_json()]).encode()
    for layers in (1, 2):
        body = gzip.compress(body)
        letta.faults.append(Answer(200, body, {"content-encoding": ", ".join(["gzip"] * layers)}, on="runs"))

    assert len((await anext(aiter(rig.client.newest_runs()))).runs) == 1
    with pytest.raises(TroubleError, match="packed as gzip, gzip"):
        await anext(aiter(rig.client.newest_runs()))


@pytest.mark.parametrize("status", [400, 401, 404, 500])
async def test_key_that_a_server_repeats(rig: Rig, letta: FakeLetta, status: int) -> None:
    """A proxy that answers with the request it was sent brings the key into no error, however it is cut (I10)."""
    for space in (0, MAX_DETAIL_CHARS - 50):
        echo = " " * 7 + "x" * space + f" authorization: Bearer {SECRET} "
        for body in (echo.encode(), json.dumps({"detail": echo}).encode(), json.dumps({"headers": echo}).encode()):
            letta.faults += [Answer(status, body, on="runs"), Answer(status, body, on="stream")]
            with pytest.raises(WorkerError) as listing:
                await anext(aiter(rig.client.newest_runs()))
            with pytest.raises(WorkerError) as streaming:
                async with rig.client.stream(Address("run-1"), 0):
                    pass
            for raised in (listing, streaming):
                assert f"HTTP {status}" in str(raised.value)
                assert SECRET[:8] not in str(raised.value)


LONG_AGO, FAR_AWAY = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
TOMORROW = datetime.now(UTC) + timedelta(days=1)


@pytest.mark.parametrize(
    ("database_url", "times"),
    [
        ("sqlite", [LONG_AGO]),
        ("sqlite", [TOMORROW]),
        ("sqlite", [LONG_AGO, TOMORROW, FAR_AWAY]),
        ("postgresql", [LONG_AGO, TOMORROW, FAR_AWAY]),
    ],
    indirect=["database_url"],
    ids=["long ago", "tomorrow", "all of them", "all of them on PostgreSQL"],
)
async def test_runs_of_another_time(letta: FakeLetta, database_url: str, times: list[datetime]) -> None:
    """A run that claims to be of long ago or of the future hides none that comes after it, and all can be shown."""
    for created_at in times:
        letta.new_run(created_at=created_at).say("alive")
        letta.new_run(created_at=created_at, background=False)
    for _ in range(2):  # the second life begins where the first one left the position
        async with working(letta, database_url, commits=False) as rig:
            service = await rig.service()
            letta.requests.clear()
            running = asyncio.create_task(service.run())
            await until(lambda: sum(request.kind == "runs" for request in letta.requests) > 1)
            late = finished(letta)
            async with asyncio.timeout(20):
                while not (await rig.row(late)).get("settled_at"):
                    await asyncio.sleep(0.01)
                    assert not running.done()
            figures = await read_status(rig.reads, datetime.now(UTC))
            assert sum(figures.runs.values()) == len(letta.runs)
            service.stop()
            await running
            await rig.assert_complete(late)
            assert rig.log.of("worker.task_failed") == []


@pytest.mark.parametrize(
    "fields", [{"id": "run-\0"}, {"id": "x" * 300}, {"id": "\ud800"}, {"id": None}, {"created_at": ""}]
)
async def test_a_listing_with_a_run_nobody_can_follow(rig: Rig, letta: FakeLetta, fields: dict[str, Any]) -> None:
    """It hides no other run, but is not passed over either: the listing begins there again until it is gone (I5)."""
    hidden, run = finished(letta), finished(letta)
    fault = Answer(200, json.dumps([run.as_json(), hidden.as_json() | fields]).encode(), on="runs")
    letta.faults.append(fault)

    with pytest.raises(TroubleError, match="without id or created_at"):
        await rig.sweep()
    assert fault.fired == 1
    assert await rig.query("SELECT run_id FROM runs") == [(run.id,)]
    assert await rig.query("SELECT position_at FROM discovery") == []

    assert set(await rig.sweep()) == {run.id, hidden.id}


async def test_a_run_nobody_can_follow_holds_up_no_other(letta: FakeLetta, sqlite_url: str) -> None:
    """While the server lists such a run the worker is not ready, says why, and stores the others (I2, I5)."""
    hidden, runs = finished(letta), [finished(letta), finished(letta)]
    listed = [run.as_json() for run in reversed(runs)] + [hidden.as_json() | {"created_at": None}]
    async with working(letta, sqlite_url, commits=False) as rig:
        service = await rig.service()
        faults = [Answer(200, json.dumps(listed).encode(), on="runs") for _ in range(1000)]
        letta.faults += faults
        running = asyncio.create_task(service.run())
        await until(lambda: len(rig.log.of("run.finished")) == len(runs) and faults[3].fired == 1)
        assert service.is_ready is False
        assert "without id or created_at" in rig.log.of("discovery.failed")[-1]["error"]
        for run in runs:
            await rig.assert_complete(run)
        assert await rig.rows(hidden) == []

        letta.faults.clear()
        await until(lambda: service.is_ready and len(rig.log.of("run.finished")) == 3)
        await rig.assert_complete(hidden)
        service.stop()
        await running
    assert len(rig.log.of("discovery.recovered")) == 1


def finished(letta: FakeLetta) -> FakeRun:
    """A run that is over."""
    run = letta.new_run()
    run.say("hello")
    run.complete()
    return run
