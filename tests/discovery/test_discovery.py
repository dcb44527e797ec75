"""Which runs exist: found by one cheap listing, also those that began and ended while nobody watched."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.support.rig import swept, working
from worker.demo.fake_faults import Answer, Request
from worker.discovery import OVERLAP, Watch, watch_of
from worker.errors import RefusedError, TroubleError

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun
    from worker.discovery import Discovery

NOW = datetime.now(UTC)


def made(
    letta: FakeLetta, count: int, conversation_id: str | None = None, *, before: float = 0, apart: float = 1
) -> list[FakeRun]:
    """Runs of one conversation that are over, so many seconds apart, the last so many seconds ago; newest last."""
    runs = []
    for number in reversed(range(count)):
        created_at = NOW - timedelta(seconds=before + number * apart)
        run = letta.new_run(conversation_id, created_at=created_at)
        run.complete()
        runs.append(run)
    return runs


def ids(runs: list[FakeRun]) -> set[str]:
    """Their ids."""
    return {run.id for run in runs}


async def stored(rig: Rig) -> set[str]:
    """The ids of the stored runs."""
    return {run_id for (run_id,) in await rig.query("SELECT run_id FROM runs")}


@dataclass
class OnLaterPage(Answer):
    """Answers a request for any page but the first."""

    def matches(self, record: Request) -> bool:
        """Tell whether the request has a cursor."""
        return super().matches(record) and bool({"before", "after"} & record.query.keys())


async def test_past_runs_are_found(rig_on_both: Rig, letta: FakeLetta) -> None:
    """Runs that began and ended before the worker did are found, page by page, each reported once."""
    runs = made(letta, 250)
    discovery = await rig_on_both.discovery()

    first = await swept(discovery)
    again = await swept(discovery)

    assert sorted(first) == sorted(ids(runs))
    assert again == []
    assert await stored(rig_on_both) == ids(runs)


async def test_runs_while_the_worker_was_down(letta: FakeLetta, database_url: str) -> None:
    """Runs that began and ended while the worker was down are found by its next start; the past is not listed again."""
    made(letta, 300, before=1000, apart=10)
    async with working(letta, database_url) as rig:
        assert len(await rig.sweep()) == 300
    missed = made(letta, 30)
    letta.requests.clear()

    async with working(letta, database_url) as rig:
        found = await rig.sweep()

    assert ids(missed) <= set(found)
    assert len(letta.requests) == 1


async def test_idle_sweep(rig: Rig, letta: FakeLetta) -> None:
    """A sweep that finds nothing new is one request and no write, however many runs there are."""
    made(letta, 250, apart=10)
    discovery = await rig.discovery()
    await swept(discovery)
    letta.requests.clear()
    commits = rig.commit_count

    for _ in range(3):
        assert await swept(discovery) == []

    assert [request.path for request in letta.requests] == ["/v1/runs/"] * 3
    assert rig.commit_count == commits


async def test_no_runs_at_all(rig: Rig, letta: FakeLetta) -> None:
    """An empty server is one request a sweep; the first run is found when it comes."""
    discovery = await rig.discovery()
    assert await swept(discovery) == []
    run = letta.new_run()

    assert await swept(discovery) == [run.id]


async def test_changed_run_is_stored_and_not_reported(rig: Rig, letta: FakeLetta) -> None:
    """What the listing newly says of a known run is stored; its follower is not started twice."""
    run = letta.new_run()
    discovery = await rig.discovery()
    assert await swept(discovery) == [run.id]
    run.complete()

    assert await swept(discovery) == []
    assert (await rig.row(run))["status"] == "completed"


async def test_run_committed_late(rig: Rig, letta: FakeLetta) -> None:
    """A run that becomes visible after younger ones, as a slow transaction makes it, is found in the overlap."""
    made(letta, 10)
    discovery = await rig.discovery()
    await swept(discovery)
    late = letta.new_run(created_at=NOW - OVERLAP + timedelta(seconds=10))

    assert await swept(discovery) == [late.id]
    assert await swept(discovery) == []


async def test_run_committed_late_while_down(letta: FakeLetta, database_url: str) -> None:
    """The overlap holds over a restart: the position is stored, and looked back from."""
    made(letta, 3)
    async with working(letta, database_url) as rig:
        await rig.sweep()
        state = await rig.reads.discovery_state()
        assert state.position_at == max(run.created_at for run in letta.runs.values())
    late = letta.new_run(created_at=NOW - OVERLAP + timedelta(seconds=10))

    async with working(letta, database_url) as rig:
        assert late.id in await rig.sweep()


def scene(letta: FakeLetta) -> dict[str, FakeRun]:
    """Two agents; the first with two conversations and a run of its own."""
    one, two = letta.new_agent(), letta.new_agent()
    first, second, other = letta.new_conversation(one), letta.new_conversation(one), letta.new_conversation(two)
    return {
        "first": letta.new_run(first),
        "second": letta.new_run(second),
        "direct": letta.new_run(None, one),
        "other": letta.new_run(other),
        "other direct": letta.new_run(None, two),
    }


@pytest.mark.parametrize(
    ("conversations", "agents", "is_all", "wanted"),
    [
        ([], [], True, {"first", "second", "direct", "other", "other direct"}),
        (["first"], [], False, {"first"}),
        (["first", "other"], [], False, {"first", "other"}),
        ([], ["first"], False, {"first", "second", "direct"}),
        (["direct"], [], False, {"direct"}),
        (["direct", "other"], ["other direct"], False, {"direct", "other", "other direct"}),
    ],
)
async def test_scopes(
    rig: Rig, letta: FakeLetta, *, conversations: list[str], agents: list[str], is_all: bool, wanted: set[str]
) -> None:
    """All scopes, conversations, agents and agent-direct, are served by one listing, and nothing else is stored."""
    runs = scene(letta)
    names = [runs[name].conversation_id or runs[name].agent_id for name in conversations]
    watch = watch_of(is_all=is_all, conversations=names, agents=[runs[name].agent_id for name in agents])

    found = await rig.sweep(watch)

    assert {name for name, run in runs.items() if run.id in found} == wanted
    assert await stored(rig) == {runs[name].id for name in wanted}
    assert len(letta.requests) == 1
    assert letta.requests[0].query.keys() == {"order", "limit"}


async def test_scope_added_later(letta: FakeLetta, sqlite_url: str) -> None:
    """A scope that is new in the configuration has its past looked at, although the position is far ahead."""
    old, new = letta.new_conversation(), letta.new_conversation()
    watched, past = made(letta, 150, old, before=10_000), made(letta, 5, new, before=20_000)
    made(letta, 5, old)
    async with working(letta, sqlite_url) as rig:
        assert len(await rig.sweep(watch_of(is_all=False, conversations=[old], agents=[]))) == 155
        letta.requests.clear()

    async with working(letta, sqlite_url) as rig:
        both = watch_of(is_all=False, conversations=[old, new], agents=[])
        discovery = await rig.discovery(both)
        found = await swept(discovery)
        assert ids(past) <= set(found)
        listed = len(letta.requests)
        assert listed > 1
        assert await swept(discovery) == []
        assert len(letta.requests) == listed + 1, "the past is listed once"

    assert len(watched) == 150


async def test_scope_removed_and_added_again(letta: FakeLetta, sqlite_url: str) -> None:
    """A scope that was not watched for a while has what it missed looked for when it is watched again."""
    kept, left = letta.new_conversation(), letta.new_conversation()
    only, both = (watch_of(is_all=False, conversations=names, agents=[]) for names in ([kept], [kept, left]))
    for watch, conversation in ((both, left), (only, kept)):
        made(letta, 3, conversation, before=5000)
        async with working(letta, sqlite_url) as rig:
            await rig.sweep(watch)
    missed = made(letta, 2, left, before=4000)
    made(letta, 2, kept)
    async with working(letta, sqlite_url) as rig:
        await rig.sweep(only)
        assert not ids(missed) & await stored(rig)

    async with working(letta, sqlite_url) as rig:
        found = await rig.sweep(both)

        assert ids(missed) <= set(found)
        assert (await rig.reads.discovery_state()).scopes.keys() == both.scopes


@pytest.mark.parametrize("start", ["latest", "time"])
async def test_start(letta: FakeLetta, sqlite_url: str, start: str) -> None:
    """What is older than `start` is not wanted, not even in the overlap; after a restart `start` counts no more."""
    old, recent = made(letta, 120, before=3600), made(letta, 3, before=60)
    value = "latest" if start == "latest" else NOW - timedelta(minutes=10)
    wanted = set() if start == "latest" else ids(recent)
    async with working(letta, sqlite_url) as rig:
        discovery = await rig.discovery(start=value)
        assert set(await swept(discovery)) == wanted
        new = made(letta, 1)
        assert await swept(discovery) == [new[0].id]

    newer = letta.new_run(created_at=NOW + timedelta(seconds=1))
    async with working(letta, sqlite_url) as rig:
        found = await rig.sweep(start="earliest")
        assert newer.id in found
        assert not ids(old) & set(found)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("status", [500, 429, 400])
async def test_sweep_fails_in_the_middle(letta: FakeLetta, sqlite_url: str, *, status: int, restarts: bool) -> None:
    """A listing that fails half way loses nothing: the next finds the rest, and what was stored is not forgotten."""
    runs = made(letta, 250)
    fault = OnLaterPage(status, on="runs")
    letta.faults.append(fault)
    async with working(letta, sqlite_url) as rig:
        discovery = await rig.discovery()
        reported = await half_swept(discovery)
        assert fault.fired == 1
        assert len(reported) == 100
        assert (await rig.reads.discovery_state()).position_at is None
        if not restarts:
            rest = await swept(discovery)
            assert set(reported) | set(rest) == ids(runs)
            assert len(reported) + len(rest) == 250
    if restarts:
        async with working(letta, sqlite_url) as rig:
            unsettled = await rig.reads.unsettled_since(NOW - timedelta(days=1))
            assert {run.record.run_id for run in unsettled} == set(reported)
            assert set(reported) | set(await rig.sweep()) == ids(runs)


async def half_swept(discovery: Discovery) -> list[str]:
    """Sweep until the listing fails; return the ids that were reported before."""
    found: list[str] = []
    with pytest.raises((TroubleError, Exception), match="HTTP"):  # noqa: PT012 - it fails half way
        async for page in discovery.sweep():
            found += [run.record.run_id for run in page]
    return found


async def test_refused(rig: Rig, letta: FakeLetta) -> None:
    """A refused key is not an empty listing."""
    fault = Answer(401, on="runs")
    letta.faults.append(fault)

    with pytest.raises(RefusedError):
        await rig.sweep()

    assert fault.fired == 1
    assert await rig.query("SELECT * FROM discovery") == []


async def test_settled_run_is_not_reported(rig: Rig, letta: FakeLetta) -> None:
    """A restart in the overlap does not start followers for what is done."""
    (run,) = made(letta, 1)
    await rig.follow(run)

    assert await rig.sweep() == []


def test_watch_names() -> None:
    """A conversation written as an agent's id is that agent's `default` one."""
    watch = watch_of(is_all=False, conversations=["conv-1", "agent-1"], agents=["agent-2"])

    assert watch == Watch(False, frozenset({"conv-1"}), frozenset({"agent-1"}), frozenset({"agent-2"}))  # noqa: FBT003
    assert watch.scopes == {"conversation:conv-1", "direct:agent-1", "agent:agent-2"}
