"""The requests of the captures, made again: cursors, status codes, lists are answered as then (letta-protocol c to e).

On the real server this shows that the captures still say what it does; on FakeLetta, that it does the same.
"""

from __future__ import annotations

import ast
import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tests.behaviour.server import Run, Script
from tests.demo.wire import between, captured, normal, probe, probed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

    from tests.behaviour.server import LettaUnderTest
    from tests.demo.wire import Probed

FINISHED = "run-3fcaa9e3-8334-4c88-8836-a9656f2f4eaf"
CAPTURED_RUN = Script(thoughts=2)
"""The run most captures read: ping 1, reasoning 2-3, text 4-7, hidden 8-10."""


async def assert_same(letta: LettaUnderTest, client: httpx.AsyncClient, real: Probed) -> None:
    """Make a captured request and compare; where the server hung then, watch it hang for a moment."""
    hangs, pings = real.answer[-1] == "end: TIMEOUT", "ping seq=None" in real.answer
    patience = letta.silence * (2 if pings else 1) if hangs else 30
    lines = await probe(client, real.method, real.path, real.body, patience)
    if pings:  # how many there were before the probe gave up means nothing
        assert list(dict.fromkeys(lines)) == list(dict.fromkeys(real.answer)), str(real)
        return
    assert [normal(line) for line in lines] == [normal(line) for line in real.answer], str(real)


async def test_cursors_and_batches(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Every starting_after, batch_size and poll_interval has its outcome: sent, refused, or hanging (c)."""
    run = await letta.start(CAPTURED_RUN)

    tried = list(probed(captured("c_cursor_and_batch"), {FINISHED: run.id}))
    await asyncio.gather(*(assert_same(letta, client, real) for real in tried))

    assert len(tried) == 21


async def test_status_codes(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Every refusal of the two stream endpoints has its status and body, and the silent cases hang (d)."""
    finished = await letta.start(CAPTURED_RUN)
    foreground = await letta.start(Script(background=False, holds_after=1))
    names = {
        FINISHED: finished.id,
        "conv-043b9009-458f-4b18-b6b1-a39d2ec9ac00": finished.where.name,
        "conv-aa0fc4d0-d71f-42f9-953c-781e599d0ca5": (await letta.new_conversation()).name,
        "run-4d78ea47-3454-47aa-b725-3ff61fb768a3": foreground.id,
        "conv-afdd8257-c071-4e4b-b778-9620fce6f7c4": foreground.where.name,
    }

    tried = list(probed(captured("d_stream_errors"), names))
    await asyncio.gather(*(assert_same(letta, client, real) for real in tried))

    assert len(tried) == 21


@pytest.mark.parametrize("body", [None, '{"poll_interval":null,"include_pings":false}'])
async def test_null_poll_interval(letta: LettaUnderTest, client: httpx.AsyncClient, body: str | None) -> None:
    """A null poll_interval, which an empty body means too, breaks the reader as soon as it must wait (c)."""
    (real,) = probed(captured("c_poll_null_live"))
    run = await letta.start(Script(holds_after=2))

    assert await probe(client, "POST", f"/v1/conversations/{run.where.name}/stream", body) == real.answer


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


async def assert_same_list(client: httpx.AsyncClient, real: Listed, **scope: str) -> None:
    """Ask for the same list; `scope` keeps out what other tests left on the server."""
    answer = await client.get(real.path, params=real.query | scope)  # type: ignore[arg-type]
    ids = [short(item["id"]) for item in answer.json()] if answer.is_success else []
    assert (answer.status_code, ids) == (real.status, real.ids), str(real)


async def four_runs(letta: LettaUnderTest, agent_id: str | None = None) -> dict[str, str]:
    """Make the four runs of one conversation that the captures page through; returns their ids by real id."""
    where = await letta.new_conversation(agent_id)
    real = [
        "run-9ff0570d-bba5-4ac9-ac2d-a0c76ac65fbd",
        "run-934cb010-ea94-43cd-ab90-a0982767ba41",
        "run-9d8f36f1-2eae-43e3-91e8-7442f1db820e",
        "run-d7f24b7f-8348-4d70-980c-a331555e5a3e",
    ]
    names = {
        "conv-a7ef7455-e8f1-4802-bd0e-b85b073f89ef": where.name,
        "agent-336ee329-58e7-4115-a592-f6b2b1bde92f": where.agent_id,
    }
    return names | {old: (await letta.start(Script(words=1), where)).id for old in real}


async def test_paging_of_runs(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """`after` and `before` are swapped in both orders, so that a walk by `before` finds every run (e)."""
    names = await four_runs(letta)
    tried = list(listed(between(captured("e_paging"), "## the four", "## conversations"), names))

    for real in tried:
        await assert_same_list(client, real)

    assert len(tried) == 11


async def test_filters_of_runs(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Filters, limits and unknown cursors of the runs list select, are refused, or are ignored (e)."""
    foreground = await letta.start(Script(background=False))
    agent_id = foreground.where.agent_id
    names = await four_runs(letta, agent_id) | {"run-4d78ea47-3454-47aa-b725-3ff61fb768a3": foreground.id}
    tried = [real for real in listed(captured("e_runs_listing"), names) if real.path == "/v1/runs/"]

    for real in tried:
        await assert_same_list(client, real, **({} if "agent_id" in real.query else {"agent_id": agent_id}))

    assert len(tried) == 22
    refused = await client.get("/v1/runs/", params={"limit": 0})
    said = "{" + between(captured("e_runs_listing"), "'detail': \"[{'type': 'greater", "}\n") + "}"
    assert refused.json()["detail"] == ast.literal_eval(said)["detail"]


async def test_paging_of_conversations(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Conversations page by `after` as named, without an upper limit; `before` is ignored (e)."""
    capture = between(
        captured("e_paging"),
        "## conversations",
        "{'agent_id': 'agent-d5ba2944-9832-43bd-8b8e-fba957751996', 'order_by'",
    )
    made = ast.literal_eval(between(capture, "[", "\n"))
    whole = {short(found): found for found in re.findall(r"conv-[0-9a-f]{8}-[-0-9a-f]{27}", capture)}
    first = await letta.new_conversation()
    others = [await letta.new_conversation(first.agent_id) for _ in made[1:]]
    names = {whole.get(old, f"conv-{old}"): where.name for old, where in zip(made, [first, *others], strict=True)}
    names["agent-d5ba2944-9832-43bd-8b8e-fba957751996"] = first.agent_id

    tried = list(listed(capture, names))
    for real in tried:
        await assert_same_list(client, real)

    assert len(tried) == 12


async def test_ties(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Runs created in the same microsecond are ordered by id, and a cursor between them loses none (e)."""
    where, at = await letta.new_conversation(), datetime.now(UTC)
    runs: list[Run] = [await letta.start(Script(words=1), where) for _ in range(4)]
    for run in runs:
        await letta.set_created(run, at)
    ids = sorted(run.id for run in runs)
    scope = {"order": "asc", "conversation_id": where.name}

    listing = (await client.get("/v1/runs/", params=scope)).json()
    following = (await client.get("/v1/runs/", params={**scope, "before": ids[1]})).json()

    assert [run["id"] for run in listing] == ids
    assert [run["id"] for run in following] == ids[2:]
