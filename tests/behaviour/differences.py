"""Where FakeLetta differs from the real server, each with its reason. docs/quirks.md shows this list.

Used by test_differences.py, which fails for a difference that is none any more. What is not here is the same: the rest
of the suite does not ask which of the two servers it talks to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.behaviour.server import Script
from tests.demo.wire import probe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import httpx

    from tests.behaviour.server import LettaUnderTest

    Ask = Callable[[LettaUnderTest, httpx.AsyncClient], Awaitable[Any]]

HANGING = 5


@dataclass(frozen=True)
class Difference:
    """One difference: what is asked, and what each of the two answers."""

    name: str
    reason: str
    ask: Ask
    fake: Any
    real: Any


async def readers_left_behind(letta: LettaUnderTest, client: httpx.AsyncClient) -> bool:
    """Leave requests that hang, and see whether the server still works for them."""
    run = await letta.start(Script(words=1))
    before = await letta.readers()
    hanging = [
        probe(client, "POST", run.stream, '{"starting_after":99,"include_pings":false}', letta.silence)
        for _ in range(HANGING)
    ]
    assert await asyncio.gather(*hanging) == [["end: TIMEOUT"]] * HANGING
    return await letta.readers() - before > HANGING / 2


async def starting_a_run(letta: LettaUnderTest, client: httpx.AsyncClient) -> int:
    """Send something that is no message to a conversation."""
    where = await letta.new_conversation()
    return (await client.post(f"/v1/conversations/{where.name}/messages", json=[])).status_code


async def messages_of_a_conversation(letta: LettaUnderTest, client: httpx.AsyncClient) -> int:
    """List the messages of a conversation, not of a run."""
    where = await letta.new_conversation()
    return (await client.get(f"/v1/conversations/{where.name}/messages")).status_code


async def deleting_a_run(letta: LettaUnderTest, client: httpx.AsyncClient) -> int:
    """Delete a run, which no server can."""
    run = await letta.start(Script(words=1))
    return (await client.delete(f"/v1/runs/{run.id}")).status_code


async def order_of_conversations(letta: LettaUnderTest, client: httpx.AsyncClient) -> int:
    """Order conversations by something there is not."""
    return (await client.get("/v1/conversations/", params={"order_by": "nothing"})).status_code


KNOWN_DIFFERENCES = [
    Difference(
        "A reader whose client left goes on",
        "Tests count the readers that were left (`abandoned_streams`); that they go on would only cost them time.",
        readers_left_behind,
        fake=False,
        real=True,
    ),
    Difference(
        "Runs are started over HTTP",
        "Runs of FakeLetta are scripted in Python, word by word; the worker never starts one.",
        starting_a_run,
        fake=404,
        real=422,
    ),
    Difference(
        "The messages of a conversation are listed",
        "The worker asks for the messages of runs only: those of a conversation cannot be had run by run.",
        messages_of_a_conversation,
        fake=404,
        real=200,
    ),
    Difference(
        "Deleting a run is an error of the server's",
        "The worker deletes nothing.",
        deleting_a_run,
        fake=405,
        real=500,
    ),
    Difference(
        "Conversations are ordered by other things than their creation",
        "The worker lists conversations only to see whether one exists.",
        order_of_conversations,
        fake=200,
        real=422,
    ),
]
