"""Log events and metrics as typed names, so that a typo is a type error. Used by everybody outside core/.

A log line is one event with fields, never a sentence; the operator's view of each name is its comment here.
"""

import asyncio
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LogEvent = Literal[
    "worker.started",  # version, what is watched, where it is stored
    "worker.stopping",  # a signal came; reading stops, the commit finishes
    "worker.stopped",  # all is committed
    "worker.stop_unclean",  # the database did not take the last commit in time; the next start goes on from the cursor
    "worker.task_failed",  # a bug: one task ended with an exception nobody expected; the others go on
    "discovery.swept",  # one listing found new runs
    "discovery.failed",  # the listing failed; tried again with growing delays
    "discovery.recovered",  # the listing works again
    "run.following",  # a stream was opened
    "run.reconnecting",  # a stream ended without an end of the run; asked again from the cursor
    "run.silent",  # the run sends nothing; its record was looked up
    "run.gap_found",  # numbers the server does not serve any more
    "run.rejected",  # bytes that could not become a row were kept in rejects
    "run.address_changed",  # the conversation endpoint ignores run_id; the run's own endpoint is used
    "run.differs",  # all chunks are stored, but the server's messages of the run say something else
    "run.finished",  # one wide line per run: state, chunks, reconnects, seconds
    "database.unavailable",  # a commit failed and is tried again; reading stops by itself
    "database.recovered",  # commits go through again
    "schema.upgraded",  # the schema was brought to this version
]


class Log(Protocol):
    """A bound structlog logger that only knows the events above."""

    def debug(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def info(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def warning(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def error(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def bind(self, **fields: Any) -> "Log": ...  # noqa: D102


def set_up_logging(level: str, log_format: Literal["json", "console"]) -> Log:
    """Configure structlog to write to stderr and return the root logger; stdout belongs to the commands."""
    renderers: list[Any] = [structlog.processors.JSONRenderer()]  # it writes ASCII, and spells out all else
    if log_format == "console":
        # Plain tracebacks: the coloured ones show local variables, and a key may be among them (I10).
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        renderers = [_show_fields, console]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    log: Log = structlog.get_logger()
    return log


def shown(text: str) -> str:
    """Text as a terminal may show it: what would move the cursor, change colours or fake a line is spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def shown_lines(text: str) -> str:
    """The same for text whose lines are our own."""
    return "\n".join(map(shown, text.split("\n")))


def _show_fields(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Ids and errors come from a server; what is no text the renderer writes as Python does, which is harmless."""
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = shown_lines(value) if name == "exception" else shown(value)
    return fields


class Metrics:
    """The figures at /metrics, in a registry of their own so that two workers can live in one test process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.chunks = Counter("letta_ingest_chunks_stored", "Chunks committed", registry=self.registry)
        self.duplicates = Counter(
            "letta_ingest_chunks_duplicate", "Chunks the server sent again (normal)", registry=self.registry
        )
        self.rejects = Counter(
            "letta_ingest_rejects", "Events kept in rejects because they cannot be rows", registry=self.registry
        )
        self.gaps = Counter("letta_ingest_gaps", "Gaps recorded", registry=self.registry)
        self.commits = Counter("letta_ingest_commits", "Transactions committed", registry=self.registry)
        self.commit_seconds = Histogram(
            "letta_ingest_commit_seconds",
            "Seconds one transaction took",
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
            registry=self.registry,
        )
        self.runs_finished = Counter(
            "letta_ingest_runs_finished", "Runs that reached a final state", ["state"], registry=self.registry
        )
        self.reconnects = Counter(
            "letta_ingest_reconnects", "Streams that ended before their run did", registry=self.registry
        )
        self.runs_unfinished = Gauge(
            "letta_ingest_runs_unfinished", "Runs known and not finished", registry=self.registry
        )
        self.streams_open = Gauge("letta_ingest_streams_open", "Streams open now", registry=self.registry)
        self.discovery_at = Gauge(
            "letta_ingest_discovery_success_timestamp_seconds", "Last listing that worked", registry=self.registry
        )
        self.commit_at = Gauge(
            "letta_ingest_commit_success_timestamp_seconds", "Last transaction that worked", registry=self.registry
        )
        self.seconds_to_expiry = Gauge(
            "letta_ingest_seconds_to_expiry",
            "Seconds until the server drops the stream of the most endangered unfinished run",
            registry=self.registry,
        )
        tasks = Gauge(
            "letta_ingest_tasks", "Tasks of the worker: grows with the runs, and only so", registry=self.registry
        )
        tasks.set_function(lambda: len(asyncio.all_tasks()))
