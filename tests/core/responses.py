"""Responses of a server written as words, and what a RunLog makes of them.

A response is written as words: `3` a chunk and its number, `p3` a ping with a number, `p` one without, `s` stop_reason,
`u` usage_statistics, `E7` the run's own error, `D` [DONE], `c` the stop_reason a cancelled reader makes up,
`x` bytes that are no JSON, `f6` a chunk that names another run, `!` an error of the reader inside the server.
What comes of it is written the same way: `~8` is a row whose number was derived.
"""

from __future__ import annotations

import re

from tests.core.server_model import HIDDEN, MADE_UP_STOP, OTHER_RUN, READER_ERROR, RUN
from worker.core.chunks import Event, parse
from worker.core.runlog import Accepted, RunLog
from worker.core.sse import SseEvent

FIXED = {
    "s": SseEvent(HIDDEN[0].encode()),
    "t": SseEvent(HIDDEN[2].encode()),
    "u": SseEvent(HIDDEN[1].encode()),
    "D": SseEvent(b"[DONE]"),
    "c": MADE_UP_STOP,
    "x": SseEvent(b"no JSON"),
    "!": READER_ERROR,
}
TYPES = {"": "assistant_message", "p": "ping", "E": "error_message", "f": "assistant_message"}


def event(word: str) -> Event:
    """One word of a response."""
    if word in FIXED:
        return parse(FIXED[word])
    kind, number = re.fullmatch(r"([pEf]?)(\d*)", word).groups()  # type: ignore[union-attr]
    run_id = OTHER_RUN if kind == "f" else RUN
    data = f'{{"message_type":"{TYPES[kind]}","seq_id":{number or "null"},"run_id":"{run_id}"}}'
    return parse(SseEvent(data.encode(), "error" if kind == "E" else ""))


def words(text: str) -> list[str]:
    """`1-3 s` is `1 2 3 s`."""
    return re.sub(r"\b(\d+)-(\d+)\b", lambda m: " ".join(map(str, range(int(m[1]), int(m[2]) + 1))), text).split()


def read_whole(log: RunLog, response: str, *, is_by_run: bool = True) -> Accepted:
    """Read a response to its end and return what has become storable."""
    log.begin_read(is_by_run=is_by_run)
    for word in words(response):
        log.accept(event(word))
    return taken(log)


def read(log: RunLog, response: str, *, is_by_run: bool = True) -> str:
    """Read a response and return the new rows as words."""
    return rows(read_whole(log, response, is_by_run=is_by_run))


def taken(log: RunLog) -> Accepted:
    """What has become storable, which may be nothing."""
    return log.take() or Accepted([], [], [], log.cursor, 0, False, False, False)  # noqa: FBT003


def rows(lot: Accepted) -> str:
    """The rows of a lot as words."""
    return " ".join(f"{'~' if row.is_derived else ''}{row.seq_id}" for row in lot.rows)
