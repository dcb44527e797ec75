"""A server that is killed and comes back with other settings (letta-protocol d, g3, g8, j).

One test, as it takes minutes on the real server; and the last of the suite there, as it ends what others left hanging.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.behaviour.server import Script
from tests.demo.wire import probe

if TYPE_CHECKING:
    from tests.behaviour.server import LettaUnderTest, Run

PASSWORD = "sesame"
LETS_IN = [{"Authorization": f"Bearer {PASSWORD}"}, {"X-BARE-PASSWORD": f"password {PASSWORD}"}]
REFUSED = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"bearer {PASSWORD}"},
    {"Authorization": PASSWORD},
    {"X-BARE-PASSWORD": PASSWORD},
]
WITHOUT_PINGS = '{"include_pings":false}'
NO_REDIS = (
    r"Background streaming requires Redis to be running\. Please ensure Redis is properly configured\. "
    r"LETTA_REDIS_HOST: (None)?, LETTA_REDIS_PORT: \d+"
)
UNKNOWN = "run-00000000-0000-4000-8000-000000000000"


async def test_killed_and_started_otherwise(letta: LettaUnderTest) -> None:
    """A killed server breaks its readers off and orphans its runs; it comes back with a password and without Redis."""
    orphan = await letta.start(Script(words=2, holds_after=1))
    finished = await letta.start(Script(words=1))
    began = asyncio.Event()
    reading = asyncio.create_task(read_until_broken(letta, orphan, began))
    await asyncio.wait_for(began.wait(), 30)
    await asyncio.sleep(letta.silence)
    await letta.restart(password=PASSWORD, has_redis=False)
    assert (await reading).endswith("\n\n")

    await assert_password_is_needed(letta, finished)
    async with plain_client(letta, **LETS_IN[0]) as client:
        await assert_no_streams(client, finished)
    never = await letta.fail_to_start(finished.where)

    await letta.restart()
    async with plain_client(letta) as client:
        await assert_never_started(letta, client, never)
        await assert_orphaned(letta, client, orphan)


def plain_client(letta: LettaUnderTest, **headers: str) -> httpx.AsyncClient:
    """A client whose connections are all made since the last restart."""
    return httpx.AsyncClient(base_url=letta.url, headers=headers, timeout=30, trust_env=False)


async def read_until_broken(letta: LettaUnderTest, run: Run, began: asyncio.Event) -> str:
    """Read a stream until the server dies; say when its first bytes have come."""
    arrived = ""
    async with plain_client(letta) as client:
        with pytest.raises(httpx.TransportError):  # noqa: PT012 - it breaks while being read
            async with client.stream("POST", run.stream, json={}) as answer:
                async for text in answer.aiter_text():
                    arrived += text
                    began.set()
    return arrived


async def assert_password_is_needed(letta: LettaUnderTest, run: Run) -> None:
    """Everything but the health is a 401 until the header is exactly right (j)."""
    asked = [("GET", "/v1/runs/?limit=1"), ("GET", "/v1/runs"), ("POST", run.stream)]
    async with plain_client(letta) as client:
        refused = [await client.request(*request, headers=headers) for request in asked for headers in REFUSED]
        let_in = [await client.get("/v1/runs/", params={"limit": 1}, headers=headers) for headers in LETS_IN]
        health = await client.get("/v1/health/")
    assert {(answer.status_code, answer.text) for answer in refused} == {(401, '{"detail":"Unauthorized"}')}
    assert [answer.status_code for answer in let_in] == [200, 200]
    assert health.text == '{"version":"0.16.8","status":"ok"}'


async def assert_no_streams(client: httpx.AsyncClient, run: Run) -> None:
    """Without Redis every stream is a 503 that says so, but an unknown run is still a 404 on its own endpoint (d)."""
    conversation = f"/v1/conversations/{run.where.name}/stream"
    answers = [
        await client.post(run.stream, json={}),
        await client.post(conversation, json={}),
        await client.post(conversation, json={"run_id": run.id}),
    ]
    unknown = await client.post(f"/v1/runs/{UNKNOWN}/stream", json={})
    assert {answer.status_code for answer in answers} == {503}
    for answer in answers:
        assert re.fullmatch(NO_REDIS, answer.json()["detail"])
    assert (unknown.status_code, unknown.json()["detail"][:17]) == (404, "Run not found wit")


async def assert_never_started(letta: LettaUnderTest, client: httpx.AsyncClient, run: Run) -> None:
    """A run whose start failed is listed as one in the background, with a text for its error, and hangs (g8)."""
    shown = (await client.get(f"/v1/runs/{run.id}")).json()
    assert (shown["status"], shown["background"], shown["completed_at"] is None) == ("failed", True, False)
    assert shown["metadata"]["error"].startswith("INTERNAL_SERVER_ERROR: Background streaming requires Redis")
    assert await probe(client, "POST", run.stream, WITHOUT_PINGS, letta.silence) == ["end: TIMEOUT"]


async def assert_orphaned(letta: LettaUnderTest, client: httpx.AsyncClient, run: Run) -> None:
    """An orphan runs for ever: its stream has what was written and no end, not even when it is cancelled (g3)."""
    running = (await client.get(f"/v1/runs/{run.id}")).json()
    served = await probe(client, "POST", run.stream, WITHOUT_PINGS, letta.silence)
    cancelled = await client.post(f"/v1/conversations/{run.where.name}/cancel")
    shown = (await client.get(f"/v1/runs/{run.id}")).json()
    behind = await probe(client, "POST", run.stream, '{"starting_after":2,"include_pings":false}', letta.silence)
    assert (running["status"], running["completed_at"]) == ("running", None)
    assert served[1:] == ["ping seq=1", "assistant_message seq=2 tok000001", "end: TIMEOUT"]
    assert (cancelled.json(), shown["status"]) == ({run.id: "cancelled"}, "cancelled")
    assert behind == ["end: TIMEOUT"]
