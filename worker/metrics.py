"""The figures at /metrics. Kept by whoever does what they count, shown by monitor.py and page/; docs/metrics.md."""

import asyncio
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

FollowerState = Literal[
    "queued",  # wants a stream and waits for a place
    "reading",  # has its stream open
    "waiting",  # waits before it asks again, or for the end of a run that has no stream
    "settling",  # fetches the run's record and messages, and compares them
]
ReconnectReason = Literal[
    "cut",  # the stream ended, or broke, without the run's end
    "trouble",  # the server was in trouble, or the stream brought nothing
    "hole",  # numbers are missing; they may only be late
    "unproven",  # the events cannot be proven to be this run's
    "yielded",  # another run waited for the place
]
BackfillResult = Literal["fetched", "failed"]
FinalState = Literal["complete", "incomplete", "backfilled", "unavailable"]

PREFIX = "letta_ingest_"
LAG_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60),
)
COMMIT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 45)
CHUNKS_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


class Metrics:
    """The figures at /metrics, in a registry of their own so that two workers can live in one test process.

    Their table is docs/metrics.md. What somebody keeps anyway is looked up when it is asked for (`set_function`).
    """

    def __init__(self) -> None:
        # They would be a second series for each counter, which no dashboard reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.chunks = self._counter("chunks_stored", "Chunks committed.")
        self.duplicates = self._counter("chunks_duplicate", "Chunks that the server sent again, which is normal.")
        self.received_bytes = self._counter("received_bytes", "Bytes received on streams, pings and framing included.")
        self.gaps = self._counter("gaps", "Gaps recorded: stretches of a run that the server did not serve.")
        self.rejects = self._counter("rejects", "Events kept as bytes because they cannot be rows.")
        self.reconnects = self._counter(
            "reconnects",
            "Streams asked for again before their run was over, by why the last reading ended.",
            reason=ReconnectReason,
        )
        self.backfills = self._counter(
            "backfills",
            "Runs whose record and messages were asked for over REST, by whether they were had.",
            result=BackfillResult,
        )
        self.runs_finished = self._counter(
            "runs_finished", "Runs with which this worker is done, by the state they ended in.", state=FinalState
        )
        self.runs = self._gauge("runs", "Runs in the store by state, counted there now and then.", state=None)
        self.followers = self._gauge(
            "followers", "Runs being followed now, by what their follower does.", state=FollowerState
        )
        self.expires_at = self._gauge(
            "nearest_expiry_timestamp_seconds",
            "When the server drops the stream of the followed run that has the least time left; +Inf without one.",
        )
        self.discovery_at = self._gauge(
            "discovery_last_success_timestamp_seconds", "When the runs were last listed with success; 0 before."
        )
        self.commits = self._counter("commits", "Transactions committed.")
        self.commit_at = self._gauge(
            "commit_last_success_timestamp_seconds", "When a transaction was last committed; 0 before."
        )
        self.commit_seconds = self._histogram(
            "commit_duration_seconds", "How long a transaction took, from its begin to its commit.", COMMIT_BUCKETS
        )
        self.commit_chunks = self._histogram("commit_chunks", "Chunks in a transaction.", CHUNKS_BUCKETS)
        self.lag_seconds = self._histogram(
            "commit_lag_seconds",
            "From the receipt of chunks by the worker to their commit; observed once for each lot handed over.",
            LAG_BUCKETS,
        )
        self.unacknowledged_chunks = self._gauge("unacknowledged_chunks", "Chunks that wait for their commit.")
        self.unacknowledged_bytes = self._gauge("unacknowledged_bytes", "Memory of what waits for its commit, roughly.")
        tasks = self._gauge("tasks", "Tasks of the worker; they grow with the followed runs, and only so.")
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        build = Info(
            PREFIX + "build", "The version of the worker and of what runs it; always 1.", registry=self.registry
        )
        build.info({"version": version("letta-ingest"), "python": platform.python_version()})

    def _counter(self, name: str, text: str, **labels: Any) -> Counter:
        return _with_values(Counter(PREFIX + name, text, list(labels), registry=self.registry), labels)

    def _gauge(self, name: str, text: str, **labels: Any) -> Gauge:
        return _with_values(Gauge(PREFIX + name, text, list(labels), registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)


Labelled = TypeVar("Labelled", Counter, Gauge)


def _with_values(metric: Labelled, labels: Mapping[str, Any]) -> Labelled:
    """Show every value a label may have from the start, as 0: a counter that begins with 1 has no rate."""
    for values in filter(None, labels.values()):
        for value in get_args(values):
            metric.labels(value)
    return metric
