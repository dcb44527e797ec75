"""A thousand followers and a server that restarts: they wait ever longer, each another while, and come back spread.

The worker is a process of its own with the waits it has in the field; the proxy (proxy.py) counts what reaches the
server's address per tenth of a second. While the server is down the proxy resets every connection as it comes: what a
closed port does, but countable.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import resource
import signal
import statistics
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import tenacity

from tests.faults.proxy import Proxy
from tests.support.lives import Life, until
from worker.demo.fake_letta import FakeLetta
from worker.errors import RateLimitedError, TroubleError
from worker.patience import until_it_works

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path

FOLLOWERS = 1000
DOWN_SECONDS = 3.0
WATCHED_SECONDS = 4.0
CONFIG = """\
letta = {{ base_url = "{url}", max_streams = {max_streams} }}
watch = {{ all = true }}
storage = {{ url = "sqlite:///{folder}/letta-ingest.db" }}
service = {{ listen = "127.0.0.1:0" }}
"""


# ---- the waits themselves ----


@pytest.fixture
def same_chance() -> Iterator[None]:
    """The same random numbers every time."""
    state = random.getstate()
    random.seed(1)
    yield
    random.setstate(state)


def waits(attempt: int, error: TroubleError) -> list[float]:
    """How long each of a thousand followers waits after its attempt of this number failed."""
    retrying = until_it_works()
    state = tenacity.RetryCallState(retrying, None, (), {})
    state.attempt_number = attempt
    state.set_exception((type(error), error, None))
    return [float(retrying.wait(state)) for _ in range(FOLLOWERS)]


def busiest(times: Iterable[float]) -> int:
    """The most that happened in one tenth of a second."""
    return max(Counter(int(10 * at) for at in times).values(), default=0)


@pytest.mark.usefixtures("same_chance")
def test_waits_grow_and_differ() -> None:
    """Each wait is about twice the last up to a minute, and half of it is chance: a thousand never come at once."""
    lots = [waits(attempt, TroubleError()) for attempt in range(1, 40)]

    means = [statistics.mean(lot) for lot in lots]
    assert all(later > 1.3 * earlier for earlier, later in itertools.pairwise(means[:8]))
    assert all(40 < mean < 50 for mean in means[9:])
    for number, lot in enumerate(lots):
        least = min(0.2 * 2**number, 30.0)
        assert least <= min(lot) < max(lot) <= 2 * least + 1
        assert max(lot) - min(lot) > 0.8 * (least + 1)
        assert busiest(lot) <= FOLLOWERS * 0.15 / max(1.0, least) + 10


@pytest.mark.usefixtures("same_chance")
@pytest.mark.parametrize("asked", [0.0, 5.0, 3600.0])
def test_retry_after_is_no_appointment(asked: float) -> None:
    """Followers that are all told to come back in so many seconds come no sooner, and not all at that moment."""
    error = RateLimitedError()
    error.retry_after = asked

    lots = [waits(attempt, error) for attempt in (1, 5, 12)]

    assert all(asked <= min(lot) <= asked + 31 for lot in lots)
    assert [busiest(lot) for lot in lots] == sorted([busiest(lot) for lot in lots], reverse=True)
    assert busiest(lots[0]) <= FOLLOWERS * 0.15


# ---- a whole worker ----


@asynccontextmanager
async def a_worker(folder: Path, proxy: Proxy, max_streams: int) -> AsyncIterator[Path]:
    """A worker in a process of its own, which may open as many files as the machine lets it; gives its log."""
    config, log = folder / "config.toml", folder / "log"
    config.write_text(CONFIG.format(url=proxy.url, max_streams=max_streams, folder=folder))
    life = Life(["run", "--config", str(config)], log)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    for process in (os.getpid(), life.pid):
        resource.prlimit(process, resource.RLIMIT_NOFILE, (most_files, most_files))
    try:
        yield log
        os.kill(life.pid, signal.SIGTERM)
        assert await life.wait(15) == 0
    finally:
        life.kill()


def most_attempts(seconds: float) -> int:
    """How often one follower can try in this time if its waits are the shortest; a failed GET is repeated at once."""
    ends = itertools.accumulate(min(0.2 * 2**number, 30.0) for number in itertools.count())
    return 1 + 2 * sum(1 for _ in itertools.takewhile(lambda end: end <= seconds, ends))


@pytest.mark.parametrize("max_streams", [16, pytest.param(FOLLOWERS + 1, marks=pytest.mark.campaign)])
async def test_restart_of_the_server(tmp_path: Path, max_streams: int) -> None:
    """A thousand live runs lose their server for seconds: few attempts meanwhile, and no rush when it is back (I2)."""
    open_count = min(FOLLOWERS, max_streams - 1)
    async with FakeLetta(keepalive_interval=20, seed=1) as letta, Proxy(letta.url) as proxy:
        for _ in range(FOLLOWERS):
            letta.new_run(letta.new_conversation())
        async with a_worker(tmp_path, proxy, max_streams) as log:
            await until(lambda: letta.open_streams == open_count and len(proxy.asked(r"/v1/runs/\?")) > 10, 60)

            went_down = time.monotonic()
            proxy.is_down, before = True, len(proxy.accepted)
            await proxy.reset_all()
            await asyncio.sleep(DOWN_SECONDS)
            await until(lambda: len(proxy.accepted) >= before + open_count, 60)
            proxy.is_down, came_back = False, time.monotonic()
            while_down = proxy.accepted[before:]
            proxy.requests.clear()
            await until(lambda: letta.open_streams == open_count, 120)
            await asyncio.sleep(WATCHED_SECONDS)

            connections = [at for at in proxy.accepted if at > came_back]
            records = [asked.at for asked in proxy.asked(r"/v1/runs/run-[^/]+ ")]
            streams = [asked.at for asked in proxy.asked(r"/stream ")]
            figures = {"down": while_down, "connections": connections, "records": records, "streams": streams}
            print({name: (len(times), busiest(times)) for name, times in figures.items()})
        assert b"worker.task_failed" not in log.read_bytes()

    assert open_count <= len(while_down) <= FOLLOWERS * most_attempts(came_back - went_down)
    assert busiest(while_down) <= FOLLOWERS / 4
    assert max(busiest(times) for times in (connections, records, streams)) <= FOLLOWERS / 10
    assert len({int(10 * at) for at in records}) >= 10
    assert letta.most_open_streams <= max_streams
