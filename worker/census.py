"""How many runs the store holds in each state, counted there when somebody asks, but seldom. Used by monitor.py.

The count reads every run. It may be wanted every second, by anybody who can reach the port: what it costs is bounded.
"""

import asyncio
import contextlib
import time

from worker.errors import RefusedError
from worker.observe import Metrics
from worker.storage.reads import Reads

REST_SECONDS = 10.0
"""Between two counts at least so long."""
REST_TIMES = 50
"""And so many times as long as the last one took: counting never takes more than a fiftieth of the time."""


class Census:
    """Counts runs by state. `reads` must not be patient: while the database is away there are no figures."""

    def __init__(self, reads: Reads, metrics: Metrics) -> None:
        self._reads = reads
        self._metrics = metrics
        self._due_at = 0.0
        self._counting: asyncio.Task[None] | None = None

    async def refresh(self, seconds: float) -> None:
        """Count again if it is time to, and wait so long for it; a count that takes longer is there the next time."""
        if self._counting is None and time.monotonic() >= self._due_at:
            self._counting = asyncio.create_task(self._count(), name="census")
        if self._counting is not None:
            await asyncio.wait({self._counting}, timeout=seconds)

    async def close(self) -> None:
        """Count no more."""
        if self._counting is not None:
            self._counting.cancel()
            await asyncio.wait({self._counting})

    async def _count(self) -> None:
        began_at = time.monotonic()
        counts: dict[str, int] = {}
        try:
            with contextlib.suppress(RefusedError):
                counts = await self._reads.runs_by_state()
        finally:
            self._metrics.runs.clear()
            for state, count in counts.items():
                self._metrics.runs.labels(state).set(count)
            ended_at = time.monotonic()
            self._due_at = ended_at + max(REST_SECONDS, REST_TIMES * (ended_at - began_at))
            self._counting = None
