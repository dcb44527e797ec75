"""A server in trouble is waited for, as long as it asks and no busy loop; one that refuses us is not."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from tests.support.rig import until, working
from worker.demo.fake_faults import Answer
from worker.errors import RefusedError

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


@pytest.fixture
def run(letta: FakeLetta) -> FakeRun:
    """A run that is over."""
    made = letta.new_run(letta.new_conversation())
    made.say("one ")
    made.complete()
    return made


async def test_no_background_streaming(rig: Rig, letta: FakeLetta, run: FakeRun) -> None:
    """A server without Redis is waited for, and the log says what it lacks; nothing is given up (I5)."""
    letta.redis = "none"
    async with rig.following(run):
        await until(lambda: len(rig.asked("stream")) >= 4)
        assert "no background streaming" in rig.log.of("run.reconnecting")[0]["error"]
        assert (await rig.row(run))["state"] == "pending"
        letta.redis = "up"

    await rig.assert_complete(run)
    assert {request.status for request in rig.asked("stream")} == {503, 200}


async def test_redis_down(rig: Rig, letta: FakeLetta, run: FakeRun) -> None:
    """A 500 that calls itself an event stream is trouble and not an empty run, however long the run is over (I5)."""
    letta.redis = "down"
    async with rig.following(run):
        await until(lambda: len(rig.asked("stream")) >= 6)
        assert {request.status for request in rig.asked("stream")} == {500}
        assert (await rig.row(run))["state"] == "pending"
        letta.redis = "up"

    await rig.assert_complete(run)


async def test_redis_goes_down_in_mid_stream(rig: Rig, letta: FakeLetta) -> None:
    """A run whose Redis goes away and comes back goes on where it was (I2)."""
    live = letta.new_run(letta.new_conversation())
    async with rig.following(live):
        await rig.until_stored(live, live.say("one "))
        letta.redis = "down"
        await until(lambda: any(request.status == 500 for request in rig.asked("stream")))
        live.say("two ")
        letta.redis = "up"
        live.complete()

    await rig.assert_complete(live)


async def test_waits_grow_without_progress(rig: Rig, letta: FakeLetta, run: FakeRun) -> None:
    """Attempts that bring nothing come ever less often, and over REST first."""
    fault = Answer(502, b"<html>bad gateway", content_type="text/html", on="stream", times=7)
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 7
    at = [request.opened_at for request in rig.asked("stream")]
    waits = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert min(waits) >= 0.2 / 20
    assert waits[6] > 2 * waits[0]
    assert len(rig.asked("run", run)) >= 7
    await rig.assert_complete(run)


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_respected(rig: Rig, letta: FakeLetta, run: FakeRun, status: int) -> None:
    """What the server asks for is waited, although our own wait would be shorter."""
    fault = Answer(status, b'{"detail":"slow down"}', {"retry-after": "1"}, on="stream")
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 1
    first, second = (request.opened_at for request in rig.asked("stream"))
    assert 0.95 <= second - first < 10.0
    await rig.assert_complete(run)


@pytest.mark.parametrize("status", [400, 405, 422])
async def test_request_not_accepted(rig: Rig, letta: FakeLetta, run: FakeRun, status: int) -> None:
    """A request the server does not accept is said and tried again, rarely; the run is not given up (I5)."""
    fault = Answer(status, b'{"detail":"no such thing"}', on="stream", times=3)
    letta.faults.append(fault)

    await rig.follow(run)

    assert fault.fired == 3
    assert [line["error"] for line in rig.log.of("run.reconnecting") if "error" in line] == [
        f"HTTP {status}: no such thing"
    ] * 3
    await rig.assert_complete(run)


@pytest.mark.parametrize("kind", ["stream", "run", "messages"])
async def test_credentials_are_refused(rig: Rig, letta: FakeLetta, run: FakeRun, kind: str) -> None:
    """A 401, whatever it answers, is not waited out: it goes up to who can act, without the key (I10)."""
    fault = Answer(401, b'{"detail":"Unauthorized"}', on=kind)  # type: ignore[arg-type]
    letta.faults.append(fault)

    with pytest.raises(RefusedError, match="refuses the API key") as refused:
        await rig.follow(run)

    assert fault.fired == 1
    assert "sk-never" not in str(refused.value)
    assert (await rig.row(run))["settled_at"] is None


async def test_password_is_sent(letta: FakeLetta, sqlite_url: str, run: FakeRun) -> None:
    """The key goes with every request, and the run is stored; without it nothing is."""
    letta.password = "the right one"
    async with working(letta, sqlite_url, api_key="the right one") as rig:
        await rig.follow(run)
        await rig.assert_complete(run)
    async with working(letta, sqlite_url, api_key="the wrong one") as rig:
        with pytest.raises(RefusedError):
            await rig.sweep()


async def test_two_workers_at_once(letta: FakeLetta, database_url: str) -> None:
    """Two workers on one run store it once, and neither fails (I4)."""
    live = letta.new_run(letta.new_conversation())
    async with working(letta, database_url) as one, working(letta, database_url) as two:
        await one.stored(live)
        async with one.following(live), two.following(live):
            for number in range(30):
                live.say(f"tok{number} ")
                await asyncio.sleep(0)
            live.complete()
        await one.assert_complete(live)
        assert one.commit_count > 0
        assert two.commit_count > 0
