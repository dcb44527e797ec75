"""What the status page shows, gathered from the running worker and its store. Used by view.py and routes.py."""

import datetime as dt
import math
from collections.abc import Mapping
from typing import get_args

import msgspec

from worker.errors import RefusedError
from worker.logs import Trouble, Troubles
from worker.metrics import PREFIX, FollowerState, Metrics
from worker.monitor import ANSWER_SECONDS, Health
from worker.seldom import Seldom
from worker.status import Status, read_status
from worker.storage.reads import Reads
from worker.storage.transcripts import Told, Transcripts

TICK_SECONDS = 2.0
"""So often a listener is told, and the store asked at most."""
REST_TIMES = 10
"""The store's totals read every run: they never take more than a tenth of the time, however many look."""
NEWEST_RUNS = 10


class Figures(msgspec.Struct, frozen=True):
    """The worker's own figures, since its start. Seconds; points in time are in seconds since 1970, None: never."""

    chunks: int
    duplicates: int
    received_bytes: int
    reconnects: int
    gaps: int
    waiting_chunks: int
    waiting_bytes: int
    lag_half: float | None
    """Half of what was handed over was committed so soon after its receipt, at most; None: there was nothing."""
    lag_most: float | None
    """The same for 99 of 100."""
    commit_at: float | None
    discovery_at: float | None
    expires_at: float | None
    followers: dict[str, int]


class Snapshot(msgspec.Struct, frozen=True):
    """The worker and its store at one moment. `status` None: the store has not been read yet."""

    at: dt.datetime
    started_at: dt.datetime
    is_starting: bool
    stuck: list[str]
    troubles: dict[str, str]
    figures: Figures
    status: Status | None
    newest: list[Told]
    logged: list[Trouble]


class Snapshots:
    """Takes snapshots for whoever looks. The store is asked once for all of them, and not at all for nobody.

    `reads` must not be patient: while the database is away, the page says so.
    """

    def __init__(self, health: Health, metrics: Metrics, reads: Reads, troubles: Troubles) -> None:
        self._health = health
        self._metrics = metrics
        self._reads = reads
        self._transcripts = Transcripts(reads)
        self._logged = troubles
        self._started_at = dt.datetime.now(dt.UTC)
        self._troubles: dict[str, str] = {}
        self._status: Status | None = None
        self._newest: list[Told] = []
        self._readiness = Seldom("page: readiness", self._ask_readiness, rest_seconds=TICK_SECONDS / 2, rest_times=0)
        self._store = Seldom("page: store", self._ask_store, rest_seconds=TICK_SECONDS / 2, rest_times=REST_TIMES)

    async def take(self) -> Snapshot:
        """The state of things now; of the store, as it was read last, when it takes too long to answer."""
        await self._readiness.refresh(ANSWER_SECONDS + 1)
        if "database" not in self._troubles:
            await self._store.refresh(ANSWER_SECONDS)
        return Snapshot(
            at=dt.datetime.now(dt.UTC),
            started_at=self._started_at,
            is_starting=self._health.is_starting,
            stuck=self._health.stuck(),
            troubles=self._troubles,
            figures=figures(self._metrics),
            status=self._status,
            newest=self._newest,
            logged=self._logged.newest(),
        )

    async def close(self) -> None:
        """Ask no more."""
        await self._readiness.close()
        await self._store.close()

    async def _ask_readiness(self) -> None:
        self._troubles = await self._health.troubles()

    async def _ask_store(self) -> None:
        try:
            self._status = await read_status(self._reads, dt.datetime.now(dt.UTC))
            self._newest = await self._transcripts.newest(NEWEST_RUNS)
        except RefusedError as error:
            self._troubles = {**self._troubles, "database": str(error)}


def figures(metrics: Metrics) -> Figures:
    """What /metrics says, as far as a person wants to know it."""
    registry = metrics.registry

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(PREFIX + name, labels) or 0.0

    def moment(name: str) -> float | None:
        found = value(name)
        return found if found and math.isfinite(found) else None

    reconnects = [sample for family in metrics.reconnects.collect() for sample in family.samples]
    lags = [sample for family in metrics.lag_seconds.collect() for sample in family.samples]
    buckets = {float(sample.labels["le"]): sample.value for sample in lags if "le" in sample.labels}
    return Figures(
        chunks=int(value("chunks_stored_total")),
        duplicates=int(value("chunks_duplicate_total")),
        received_bytes=int(value("received_bytes_total")),
        reconnects=int(sum(sample.value for sample in reconnects)),
        gaps=int(value("gaps_total")),
        waiting_chunks=int(value("unacknowledged_chunks")),
        waiting_bytes=int(value("unacknowledged_bytes")),
        lag_half=bound(buckets, 0.5),
        lag_most=bound(buckets, 0.99),
        commit_at=moment("commit_last_success_timestamp_seconds"),
        discovery_at=moment("discovery_last_success_timestamp_seconds"),
        expires_at=moment("nearest_expiry_timestamp_seconds"),
        followers={state: int(value("followers", state=state)) for state in get_args(FollowerState)},
    )


def bound(buckets: Mapping[float, float], share: float) -> float | None:
    """The least bound of a histogram's cumulative buckets that this share is below; None without observations."""
    count = max(buckets.values(), default=0.0)
    return min(at for at, below in buckets.items() if below >= share * count) if count else None
