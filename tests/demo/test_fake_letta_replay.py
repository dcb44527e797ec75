"""The requests of the captures made to FakeLetta: cursors, status codes and paging answer as the real server did."""

from __future__ import annotations

import ast
import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.demo.wire import between, captured, in_short, probe, probed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

    from tests.demo.wire import Probed
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

FINISHED = "run-3fcaa9e3-8334-4c88-8836-a9656f2f4eaf"
AT_ONCE = 0.2


def finished_run(letta: FakeLetta, conversation_id: str | None = None) -> FakeRun:
    """Play the run most captures read: ping 1, reasoning 2-3, text 4-7, hidden 8-10."""
    run = letta.new_run(conversation_id)
    for number in (1, 2):
        run.think(f"think{number:06} ")
    for number in (1, 2, 3, 4):
        run.say(f"tok{number:06} ")
    run.complete()
    return run


async def assert_same(client: httpx.AsyncClient, real: Probed) -> None:
    """Make a captured request to the fake and compare; where the real server hung, hang for a moment."""
    hangs = real.answer[-1] == "end: TIMEOUT"
    lines = await probe(client, real.method, real.path, real.body, AT_ONCE if hangs else 3)
    if "ping seq=None" in real.answer:  # how many there were before the probe gave up means nothing
        assert list(dict.fromkeys(lines)) == list(dict.fromkeys(real.answer)), str(real)
        return
    assert lines == real.answer, str(real)


async def test_cursors_and_batches(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Every starting_after, batch_size and poll_interval tried on the real server has the same outcome here."""
    run = finished_run(letta)
    capture = captured("c_cursor_and_batch")

    tried = list(probed(capture, {FINISHED: run.id}))
    await asyncio.gather(*(assert_same(client, real) for real in tried))

    assert len(tried) == 21


async def test_status_codes(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Every refusal of the two stream endpoints has the real status and body, and the silent cases hang."""
    conversation_id = letta.new_conversation()
    run = finished_run(letta, conversation_id)
    foreground = letta.new_run(letta.new_conversation(), background=False, pings=False)
    names = {
        FINISHED: run.id,
        "conv-043b9009-458f-4b18-b6b1-a39d2ec9ac00": conversation_id,
        "conv-aa0fc4d0-d71f-42f9-953c-781e599d0ca5": letta.new_conversation(),
        "run-4d78ea47-3454-47aa-b725-3ff61fb768a3": foreground.id,
        "conv-afdd8257-c071-4e4b-b778-9620fce6f7c4": str(foreground.conversation_id),
    }

    tried = list(probed(captured("d_stream_errors"), names))
    await asyncio.gather(*(assert_same(client, real) for real in tried))

    assert len(tried) == 21


async def test_no_redis(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Without Redis every stream is a 503, but an unknown run is still a 404 on its own endpoint."""
    run = finished_run(letta)
    letta.redis = "none"
    capture = captured("d_no_redis").replace("LETTA_REDIS_PORT: 56379", "LETTA_REDIS_PORT: 6379")
    capture = capture.replace("tzinfo=datetime.timezone.utc", "tzinfo=TzInfo(0)")

    tried = list(probed(capture, {"run-b3d9e64a-8dc1-40c4-b8a7-d310062d62d6": run.id}))[:4]
    for real in tried:
        await assert_same(client, real)

    assert [real.answer[0] for real in tried].count("HTTP 503 application/json") == 3


@pytest.mark.parametrize("body", [None, '{"poll_interval":null,"include_pings":false}'])
async def test_null_poll_interval(letta: FakeLetta, client: httpx.AsyncClient, body: str | None) -> None:
    """A null poll_interval, which an empty body means too, breaks the reader as soon as it has to wait."""
    (real,) = probed(captured("c_poll_null_live"))
    run = letta.new_run(letta.new_conversation())
    run.say("tok000001 ")
    run.say("tok000002 ")

    lines = await probe(client, "POST", f"/v1/conversations/{run.conversation_id}/stream", body)

    assert lines == real.answer


async def test_broken_reader_with_pings_ends_without_a_word(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """With pings on, the keepalive wrapper swallows the reader's error: a clean end without any marker."""
    run = letta.new_run()
    run.say("tok000001 ")

    lines = await probe(client, "POST", f"/v1/runs/{run.id}/stream", '{"poll_interval":null}')

    assert lines[1:] == ["ping seq=1", "assistant_message seq=2 tok000001", "end: EOF"]


async def test_expired(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A run older than three hours is a 410 on both endpoints, finished or not; it is still listed."""
    old = datetime.now(UTC) - timedelta(hours=3, minutes=1)
    run = letta.new_run(letta.new_conversation(), created_at=old)

    answers = [
        await client.post(f"/v1/runs/{run.id}/stream", json={}),
        await client.post(f"/v1/conversations/{run.conversation_id}/stream", json={}),
        await client.post(f"/v1/conversations/{letta.new_conversation()}/stream", json={"run_id": run.id}),
    ]

    assert {answer.status_code for answer in answers} == {410}
    assert {answer.text for answer in answers} == {
        '{"detail":"EXPIRED: Run was created more than 3 hours ago, and is now expired."}'
    }
    assert len((await client.get("/v1/runs/")).json()) == 1


async def test_which_run_a_conversation_means(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Without run_id the newest active run is read: an orphan takes over, ``default`` reads any conversation's."""
    conversation_id = letta.new_conversation()
    orphan = letta.new_run(conversation_id)
    run = letta.new_run(conversation_id, pings=False)
    run.say("tok000001 ")
    path, default = f"/v1/conversations/{conversation_id}/stream", "/v1/conversations/default/stream"
    body = f'{{"agent_id":"{run.agent_id}","include_pings":false}}'

    newest = await probe(client, "POST", default, body, AT_ONCE)
    run.complete()
    poisoned = await probe(client, "POST", path, '{"include_pings":false}', AT_ONCE)
    by_run_id = await probe(client, "POST", path, f'{{"run_id":"{run.id}","starting_after":1}}')
    letta.honours_run_id = False
    ignored = await probe(client, "POST", path, f'{{"run_id":"{run.id}","include_pings":false}}', AT_ONCE)

    assert newest[1] == "assistant_message seq=1 tok000001"
    assert poisoned[1:] == ignored[1:] == ["ping seq=1", "end: TIMEOUT"]
    assert by_run_id[-2:] == ["[DONE]", "end: EOF"]
    assert orphan.status == "running"


# ---- lists ----


@dataclass(frozen=True)
class Listed:
    """One list request of a capture: what was asked, and the answer's status and short ids."""

    path: str
    query: dict[str, object]
    status: int
    ids: list[str]


def listed(capture: str, names: Mapping[str, str]) -> Iterator[Listed]:
    """Walk the list requests of a capture, whole and short ids replaced."""
    for old, new in names.items():
        capture = capture.replace(old, new).replace(f"'{short(old)}'", f"'{short(new)}'")
    for found in re.finditer(r"^(/v1/\w+/) (\{.*?\}) (\d+) (?:\d+ )?(.*)$", capture, re.MULTILINE):
        ids = re.findall(r"'([0-9a-f]{8})'(?=, '[a-z]+', '\d\d:|, '[0-9a-f]{8}'|\])", found[4])
        yield Listed(found[1], ast.literal_eval(found[2]), int(found[3]), ids)


def short(item: str) -> str:
    """Abbreviate an id as the captures do."""
    return item.split("-")[1]


async def assert_same_list(client: httpx.AsyncClient, real: Listed) -> None:
    """Ask the fake for the same list."""
    answer = await client.get(real.path, params=real.query)  # type: ignore[arg-type]
    ids = [short(item["id"]) for item in answer.json()] if answer.is_success else []
    assert (answer.status_code, ids) == (real.status, real.ids), str(real)


def four_runs(letta: FakeLetta) -> dict[str, str]:
    """Make the four runs of one conversation that the captures page through; returns their ids by real id."""
    conversation_id = letta.new_conversation()
    real = [
        "run-9ff0570d-bba5-4ac9-ac2d-a0c76ac65fbd",
        "run-934cb010-ea94-43cd-ab90-a0982767ba41",
        "run-9d8f36f1-2eae-43e3-91e8-7442f1db820e",
        "run-d7f24b7f-8348-4d70-980c-a331555e5a3e",
    ]
    runs = [finished_run(letta, conversation_id) for _ in real]
    agent_id = letta.conversations[conversation_id].agent_id
    names = {
        "conv-a7ef7455-e8f1-4802-bd0e-b85b073f89ef": conversation_id,
        "agent-336ee329-58e7-4115-a592-f6b2b1bde92f": agent_id,
    }
    return names | {old: run.id for old, run in zip(real, runs, strict=True)}


async def test_paging_of_runs(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """``after`` and ``before`` are swapped in both orders, so that a walk by ``before`` finds every run."""
    names = four_runs(letta)
    tried = list(listed(between(captured("e_paging"), "## the four", "## conversations"), names))

    for real in tried:
        await assert_same_list(client, real)

    assert len(tried) == 11


async def test_filters_of_runs(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Filters, limits and unknown cursors of the runs list answer as the real server's do."""
    names = four_runs(letta)
    foreground = letta.new_run(letta.new_conversation(), background=False, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    foreground.complete()
    names["run-4d78ea47-3454-47aa-b725-3ff61fb768a3"] = foreground.id
    tried = [real for real in listed(captured("e_runs_listing"), names) if real.path == "/v1/runs/"]

    for real in tried:
        await assert_same_list(client, real)

    assert len(tried) == 22
    refused = await client.get("/v1/runs/", params={"limit": 0})
    assert (
        refused.json()["detail"]
        == ast.literal_eval("{" + between(captured("e_runs_listing"), "'detail': \"[{'type': 'greater", "}\n") + "}")[
            "detail"
        ]
    )


async def test_paging_of_conversations(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Conversations page by ``after`` as named, without an upper limit; ``before`` is ignored."""
    agent_id = letta.new_agent()
    capture = between(
        captured("e_paging"),
        "## conversations",
        "{'agent_id': 'agent-d5ba2944-9832-43bd-8b8e-fba957751996', 'order_by'",
    )
    made = ast.literal_eval(between(capture, "[", "\n"))
    whole = {short(found): found for found in re.findall(r"conv-[0-9a-f]{8}-[-0-9a-f]{27}", capture)}
    names = {whole.get(old, f"conv-{old}"): letta.new_conversation(agent_id) for old in made}
    names["agent-d5ba2944-9832-43bd-8b8e-fba957751996"] = agent_id

    tried = list(listed(capture, names))
    for real in tried:
        await assert_same_list(client, real)

    assert len(tried) == 12


async def test_ties(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """Runs created in the same microsecond are ordered by id, and a cursor between them loses none."""
    now = datetime.now(UTC)
    ids = sorted(letta.new_run(created_at=now).id for _ in range(4))

    listing = (await client.get("/v1/runs/", params={"order": "asc"})).json()
    following = (await client.get("/v1/runs/", params={"order": "asc", "before": ids[1]})).json()

    assert [run["id"] for run in listing] == ids
    assert [run["id"] for run in following] == ids[2:]


@pytest.mark.parametrize(
    ("paging", "after", "before"), [("named", [2, 3], [0]), ("ignored", [0, 1, 2, 3], [0, 1, 2, 3])]
)
async def test_other_pagings(
    client: httpx.AsyncClient, letta: FakeLetta, paging: str, after: list[int], before: list[int]
) -> None:
    """A server that pages as its parameters are named, or not at all, can be had too."""
    letta.paging = paging  # type: ignore[assignment]
    runs = [letta.new_run() for _ in range(4)]

    for cursor, expected in (("after", after), ("before", before)):
        answer = await client.get("/v1/runs/", params={"order": "asc", cursor: runs[1].id})
        assert [run["id"] for run in answer.json()] == [runs[index].id for index in expected]


def test_probe_names_what_it_sees() -> None:
    """The probe of these tests describes an event as the captures do."""
    assert in_short('event: error\ndata: {"error": "e", "code": "c"}') == (
        'event: error None seq=- {"error": "e", "code": "c"}'
    )
