"""How many runs the store holds in each state, counted there when somebody asks, but seldom. Used by monitor.py.

The count reads every run.
"""

import contextlib

from worker.errors import RefusedError
from worker.metrics import Metrics
from worker.seldom import Seldom
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
        counts = Seldom("census", self._count, rest_seconds=REST_SECONDS, rest_times=REST_TIMES)
        self.refresh = counts.refresh
        self.close = counts.close

    async def _count(self) -> None:
        counts: dict[str, int] = {}
        try:
            with contextlib.suppress(RefusedError):
                counts = await self._reads.runs_by_state()
        finally:
            self._metrics.runs.clear()
            for state, count in counts.items():
                self._metrics.runs.labels(state).set(count)
