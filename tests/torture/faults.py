"""The ways in which a life ends, or stops for a while, and the plan: which of them, how often, in which order.

Each is a function that does it to a worker of the campaign and says whether it really happened; what did not is tried
again, and fails the campaign when it never does.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.torture.boundaries import Boundary, Strike
from tests.torture.campaign import RECENT_SECONDS

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.torture.campaign import Campaign, Worker
    from tests.torture.figures import Side

ATTEMPTS = 20
"""On a busy machine a moment is easily missed."""
LATE_SECONDS = 0.5
"""So long after a worker's last words PostgreSQL may still store what it was sent; it is not the other worker's."""
TABLES = 6
"""So many tables the first migration makes at least; a strike may be at each."""


@dataclass(frozen=True)
class Fault:
    """One way. `share` is how often it is drawn, against the others'; all come at least once."""

    name: str
    share: float
    inflict: Callable[[Campaign], Awaitable[bool]]


async def inflict(campaign: Campaign, fault: Fault) -> None:
    """Do it until it has happened, and check what it left."""
    for _ in range(ATTEMPTS):
        is_done = await fault.inflict(campaign)
        await campaign.check()
        if is_done:
            campaign.figures.fired[fault.name] += 1
            return
    raise AssertionError(f"{fault.name}: in {ATTEMPTS} attempts it did not happen")


def plan(chance: random.Random, *, is_server: bool) -> Iterator[Fault]:
    """Every fault once, then by their shares, without end; the same seed gives the same plan."""
    faults = [*ANYWHERE, *(ON_POSTGRESQL if is_server else ON_SQLITE)]
    yield from chance.sample(faults, len(faults))
    while True:
        yield from chance.choices(faults, [fault.share for fault in faults])


def kinds(*, is_server: bool) -> int:
    """How many different faults the plan has."""
    return len(ANYWHERE) + len(ON_POSTGRESQL if is_server else ON_SQLITE)


# From outside


async def at_any_moment(campaign: Campaign) -> bool:
    """Let it store, for up to a fifth of a second, then until it stores again: the kill must land in the middle."""
    worker = campaign.start("run")
    first = await campaign.until_first_stored(worker)
    until = first + campaign.chance.uniform(0, 0.2)
    while await campaign.until_stored(worker) < until:
        pass
    stored = {run_id: rows for run_id, _, rows in await campaign.look.unsettled()}
    stored_at = await campaign.until_stored(worker)
    await asyncio.sleep(campaign.chance.uniform(0, 0.03))
    worker.check()
    seconds = time.monotonic() - stored_at
    worker.life.kill()
    is_mid_write = seconds <= RECENT_SECONDS and campaign.is_mid_run(stored)
    campaign.count("at any moment", is_mid_write=is_mid_write)
    return is_mid_write


async def while_it_starts(campaign: Campaign) -> bool:
    """Kill it before it has stored anything."""
    before = await campaign.look.stored()
    worker = campaign.start("run")
    await asyncio.sleep(campaign.chance.uniform(0, 0.4))
    worker.check()
    worker.life.kill()
    await campaign.until_alone()
    is_early = await campaign.look.stored() == before
    campaign.count("while it starts" if is_early else "at any moment")
    return is_early


async def while_it_drains(campaign: Campaign) -> bool:
    """Kill it after SIGTERM, before it has ended by itself."""
    worker = campaign.start("run")
    await campaign.until_first_stored(worker)
    worker.send(signal.SIGTERM)
    await worker.logged("worker.stopping")
    await asyncio.sleep(campaign.chance.uniform(0, 0.02))
    return campaign.kill(worker, "while it drains")


async def again_and_again(campaign: Campaign) -> bool:
    """Kill it in its first moments, start it, kill it again."""
    for _ in range(campaign.chance.randint(3, 5)):
        worker = campaign.start("run")
        await asyncio.sleep(campaign.chance.uniform(0, 0.1))
        worker.check()
        assert campaign.kill(worker, "again and again")
    return True


# From within


async def in_migration(campaign: Campaign) -> bool:
    """Kill it while it makes the schema: nothing of it is left."""
    strike = Strike(Boundary.MIGRATION, campaign.testimony, campaign.chance.randrange(TABLES))
    worker = campaign.start("migrate" if campaign.look.is_server else "run", strike=strike)
    await worker.struck()
    await campaign.until_alone()
    assert await campaign.look.tables() == set()
    campaign.count(Boundary.MIGRATION)
    return True


async def while_it_discovers(campaign: Campaign) -> bool:
    """Kill it when it has found runs and not committed them."""
    strike = Strike(Boundary.DISCOVERY, campaign.testimony, campaign.chance.randrange(3))
    await campaign.start("run", strike=strike).struck()
    campaign.count(Boundary.DISCOVERY)
    return True


async def at_boundary(campaign: Campaign, boundary: Boundary, side: Side, skip: int) -> bool:
    """Kill it at a boundary of one of its first transactions, and see on which side of the commit that was."""
    strike = Strike(boundary, campaign.testimony, campaign.chance.randrange(skip))
    worker = campaign.start("run", strike=strike)
    await worker.struck()
    found = await campaign.side(worker)
    assert found == side, f"{boundary}: the transaction is {found}"
    campaign.count(boundary, found, is_mid_write=True)
    return True


# A second worker


async def stopped(campaign: Campaign) -> bool:
    """Stop it for some seconds between two transactions; a second one takes over."""
    first, second = await stopped_at(campaign, Boundary.AFTER)
    await campaign.until_stored(second)
    await asyncio.sleep(campaign.chance.uniform(0.5, 3.0))
    await campaign.until_stored(second)
    await go_on(campaign, first, second, "stopped, a second one took over")
    return True


async def stopped_in_transaction(campaign: Campaign) -> bool:
    """Stop it with its transaction open and its locks held; a second one must come to store all the same."""
    first, second = await stopped_at(campaign, Boundary.BEFORE)
    if campaign.look.is_server:  # which ends a session that is idle in its transaction
        campaign.figures.blocked_seconds.append(await campaign.until_stored(second) - second.born_at)
    else:  # the file is locked as long as the first one is there
        await second.logged("database.unavailable")
    await go_on(campaign, first, second, "stopped in its transaction")
    return True


async def stopped_while_sending(campaign: Campaign) -> bool:
    """Stop it between two messages of its rows, where no time-out of PostgreSQL applies: it must not hold locks."""
    first, second = await stopped_at(campaign, Boundary.COPYING)
    await campaign.until_stored(second)
    await go_on(campaign, first, second, "stopped while it sends rows")
    return True


async def stopped_at(campaign: Campaign, boundary: Boundary) -> tuple[Worker, Worker]:
    """A worker that is stopped at a boundary, and a second one, just started."""
    strike = Strike(boundary, campaign.testimony, campaign.chance.randrange(10), signal.SIGSTOP)
    first = campaign.start("run", strike=strike)
    await first.stopped()
    assert first.testimony.exists()
    await asyncio.sleep(LATE_SECONDS)
    return first, campaign.start("run")


async def go_on(campaign: Campaign, first: Worker, second: Worker, kind: str) -> None:
    """I4: the first continues, beside the second, and, when that is killed, alone."""
    first.send(signal.SIGCONT)
    await campaign.until_stored(second)
    first.check()
    assert campaign.kill(second, kind)
    await asyncio.sleep(LATE_SECONDS)
    await campaign.until_stored(first)
    assert campaign.kill(first, kind)


def at(boundary: Boundary, share: float, side: Side, skip: int) -> Fault:
    """A kill at a boundary of one of the first so many transactions, which then falls on this side of the commit."""
    return Fault(boundary, share, functools.partial(at_boundary, boundary=boundary, side=side, skip=skip))


ANYWHERE = (
    Fault("at any moment", 50, at_any_moment),
    Fault("while it starts", 8, while_it_starts),
    Fault("while it drains", 6, while_it_drains),
    Fault("again and again", 3, again_and_again),
    Fault(Boundary.DISCOVERY, 4, while_it_discovers),
    at(Boundary.ROWS, 6, "gone", 15),
    at(Boundary.BEFORE, 6, "gone", 15),
    at(Boundary.AFTER, 8, "durable", 15),
    Fault("stopped, a second one took over", 2, stopped),
    Fault("stopped in its transaction", 1, stopped_in_transaction),
)
ON_SQLITE = (
    at(Boundary.TORN, 8, "gone", 60),
    at(Boundary.UNSYNCED, 8, "durable", 15),
    at(Boundary.CHECKPOINT, 4, "durable", 30),
)
ON_POSTGRESQL = (
    Fault("stopped while it sends rows", 1, stopped_while_sending),
    at(Boundary.HALF_SENT, 10, "gone", 15),
    at(Boundary.UNANSWERED, 10, "durable", 15),
)
