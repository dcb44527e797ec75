"""Where FakeLetta differs from the real server, each with its reason. docs/quirks.md shows this list.

Used by test_differences.py, which fails for a difference that is none any more. What is not here is the same: the rest
of the suite does not ask which of the two servers it talks to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.behaviour.server import Script
from tests.demo.wire import probe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import httpx

    from tests.behaviour.server import LettaUnderTest

    Ask = Callable[[LettaUnderTest, httpx.AsyncClient], Awaitable[object]]

HANGING = 5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference, in words and as the two answers to what is asked."""

    real_does: str
    fake_does: str
    reason: str
    ask: Ask
    real: object
    fake: object


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
        real_does="Goes on reading for a client that has left",
        fake_does="Stops, and counts it (`abandoned_streams`)",
        reason="Tests look at the count; readers that go on would only cost them time",
        ask=readers_left_behind,
        real=True,
        fake=False,
    ),
    Difference(
        real_does="Starts runs over HTTP",
        fake_does="404: its runs are scripted in Python, word by word",
        reason="The worker starts none",
        ask=starting_a_run,
        real=422,
        fake=404,
    ),
    Difference(
        real_does="Lists the messages of a conversation",
        fake_does="404",
        reason="The worker asks for the messages of runs",
        ask=messages_of_a_conversation,
        real=200,
        fake=404,
    ),
    Difference(
        real_does="Fails when a run is to be deleted: 500",
        fake_does="405",
        reason="The worker deletes nothing",
        ask=deleting_a_run,
        real=500,
        fake=405,
    ),
    Difference(
        real_does="Orders conversations by what `order_by` names, and refuses other names",
        fake_does="Orders them by their creation, whatever is asked",
        reason="The worker does not ask for an order",
        ask=order_of_conversations,
        real=422,
        fake=200,
    ),
]
