"""Log events as typed names, so that a typo is a type error. Used by everybody outside core/.

A log line is one event with fields, never a sentence; the operator's view of each name is in EVENTS, and docs/logs.md.
"""

import datetime as dt
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TextIO

import msgspec
import structlog

LogEvent = Literal[
    "config.reloaded",
    "config.rejected",
    "config.needs_restart",
    "worker.started",
    "worker.stopping",
    "worker.stopped",
    "worker.stop_unclean",
    "worker.task_failed",
    "discovery.swept",
    "discovery.failed",
    "discovery.recovered",
    "run.following",
    "run.reconnecting",
    "run.silent",
    "run.gap_found",
    "run.rejected",
    "run.address_changed",
    "run.differs",
    "run.finished",
    "database.unavailable",
    "database.recovered",
    "schema.upgraded",
]


class Event(NamedTuple):
    """What docs/logs.md says of an event. `is_repeated`: a thousand runs may have it at once; see `Repeats`."""

    levels: str
    fields: str
    meaning: str
    is_repeated: bool = False


EVENTS: dict[LogEvent, Event] = {
    "config.reloaded": Event("info", "changed", "SIGHUP: read again; what has changed in the running worker"),
    "config.rejected": Event(
        "error", "faults", "SIGHUP: the configuration is wrong, with every fault; the worker goes on with the old one"
    ),
    "config.needs_restart": Event(
        "warning", "settings", "these settings have changed, and take effect only when the worker is started again"
    ),
    "worker.started": Event(
        "info", "version server watching database", "the database is ready, and the address is listened on"
    ),
    "worker.stopping": Event("info", "", "a signal came; reading stops, the commit finishes"),
    "worker.stopped": Event("info", "", "what could be committed is"),
    "worker.stop_unclean": Event(
        "warning", "reason", "the database did not take the last commit in time; the next start goes on from the cursor"
    ),
    "worker.task_failed": Event(
        "error", "task error exception", "a bug, please report it: one task ended as nobody expected"
    ),
    "discovery.swept": Event("info", "new_runs", "one listing found new runs"),
    "discovery.failed": Event(
        "warning", "error attempt wait", "the listing failed; it is tried again after `wait` seconds", is_repeated=True
    ),
    "discovery.recovered": Event("info", "", "the listing works again"),
    "run.following": Event("debug", "cursor by_run", "a stream was opened", is_repeated=True),
    "run.reconnecting": Event(
        "debug info warning",
        "cursor reason error attempt wait",
        "a stream ended before its run; asked again from the cursor. info: the server or the network is in trouble;"
        " warning: the server does not accept the request",
        is_repeated=True,
    ),
    "run.silent": Event(
        "info", "seconds status error", "the run sends nothing; its record was looked up", is_repeated=True
    ),
    "run.gap_found": Event("warning", "first last cause", "chunks that the server does not serve any more"),
    "run.rejected": Event(
        "warning",
        "after reason more",
        "bytes that could not become a row were kept in `rejects`; `more` were not logged",
    ),
    "run.address_changed": Event(
        "info",
        "reason",
        "the conversation endpoint ignores `run_id`; the run's own endpoint is used",
        is_repeated=True,
    ),
    "run.differs": Event(
        "warning", "differences", "all chunks are stored, but the server's messages of the run say something else"
    ),
    "run.finished": Event(
        "info", "state status cursor missing duplicates reconnects seconds", "one wide line for each run"
    ),
    "database.unavailable": Event(
        "warning", "error waiting", "a commit failed and is tried again; reading stops by itself", is_repeated=True
    ),
    "database.recovered": Event("info", "", "commits go through again"),
    "schema.upgraded": Event("info", "before after", "the schema was brought to this version"),
}
"""The operator's view of each event; docs/logs.md is made of it, and a test holds it against the calls."""

_REPEATED = frozenset(name for name, event in EVENTS.items() if event.is_repeated)
MINUTE = 60.0
LINES_A_MINUTE = 20
"""So many lines of one repeated event and level are logged in a minute; a thousand runs that lose their server at the
same moment would hide every other line."""

KEPT_TROUBLES = 20
KEPT_CHARS = 500
"""Of each field."""
_NOT_TOLD = {"event", "exc_info"}


class Log(Protocol):
    """A bound structlog logger that only knows the events above."""

    def debug(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def info(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def warning(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def error(self, event: LogEvent, **fields: Any) -> Any: ...  # noqa: D102
    def bind(self, **fields: Any) -> "Log": ...  # noqa: D102


class Trouble(msgspec.Struct, frozen=True):
    """A warning or an error, as it was logged."""

    at: dt.datetime
    level: str
    event: str
    fields: dict[str, str]


class Troubles:
    """A structlog processor that keeps the last warnings and errors in memory, whatever level is written."""

    def __init__(self) -> None:
        self._kept: deque[Trouble] = deque(maxlen=KEPT_TROUBLES)

    def __call__(self, _: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Keep it, if it is one; pass everything on."""
        if _rank(method) >= logging.WARNING:
            told = {name: str(value)[:KEPT_CHARS] for name, value in fields.items() if name not in _NOT_TOLD}
            self._kept.append(Trouble(dt.datetime.now(dt.UTC), method, fields["event"], told))
        return fields

    def newest(self) -> list[Trouble]:
        """What is kept, newest first."""
        return list(reversed(self._kept))


def set_up_logging(level: str, log_format: Literal["json", "console", "none"], troubles: Troubles | None = None) -> Log:
    """Configure structlog to write to stderr and return the root logger; stdout belongs to the commands.

    With `none` nothing is written: `troubles` are kept all the same, and shown by somebody else.
    """
    renderers: list[Any] = [structlog.processors.JSONRenderer()]  # it writes ASCII, and spells out all else
    if log_format == "console":
        # Plain tracebacks: the coloured ones show local variables, and a key may be among them (I10).
        plain = structlog.dev.plain_traceback
        has_colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        console = structlog.dev.ConsoleRenderer(colors=has_colours, exception_formatter=plain)
        renderers = [_show_fields, console]
    if log_format == "none":
        renderers = [_drop]
    elif _is_journal(sys.stderr):
        renderers.append(_with_priority)
    structlog.configure(
        processors=[
            *([troubles] if troubles is not None else []),
            _Threshold(level),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            Repeats(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    log: Log = structlog.get_logger()
    return log


class _Threshold:
    """Drops what is below the level. Not structlog's own filter: a logger that was bound with it keeps its level."""

    def __init__(self, level: str) -> None:
        self.least = _rank(level)

    def __call__(self, _: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if _rank(method) < self.least:
            raise structlog.DropEvent
        return fields


def set_level(level: str) -> None:
    """Change the level of every logger there is; `set_up_logging` must have been called."""
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, _Threshold):
            processor.least = _rank(level)


def _rank(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _is_journal(stream: TextIO) -> bool:
    """Whether journald reads it at the other end; systemd says which file that is."""
    journal = os.environ.get("JOURNAL_STREAM")
    if journal is None:
        return False
    found = os.fstat(stream.fileno())
    return journal == f"{found.st_dev}:{found.st_ino}"


def _drop(_: Any, __: str, ___: MutableMapping[str, Any]) -> NoReturn:
    raise structlog.DropEvent


_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}


def _with_priority(_: Any, level: str, line: str) -> str:
    """So that `journalctl -p warning` finds it; journald takes the prefix off."""
    return f"<{_PRIORITIES[level]}>{line}"


class Repeats:
    """Drops what an event says over and over; the next line after that minute says in `left_out` how often it did."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._minutes: dict[tuple[str, str], tuple[float, int]] = {}
        """When the minute of an event and level began, and how many lines there were in it."""

    def __call__(self, _: Any, level: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor of structlog. Raises DropEvent."""
        name = fields["event"]
        if name not in _REPEATED:
            return fields
        now = self._now()
        begun_at, count = self._minutes.get((name, level), (now, 0))
        left_out = 0
        if now - begun_at >= MINUTE:
            begun_at, count, left_out = now, 0, max(0, count - LINES_A_MINUTE)
        self._minutes[name, level] = begun_at, count + 1
        if count >= LINES_A_MINUTE:
            raise structlog.DropEvent
        return {**fields, "left_out": left_out} if left_out else fields


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
