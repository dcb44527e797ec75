"""The oracle: what the server's Redis holds for a run, and from that what must be stored. Knows nothing of the worker.

The server keeps each run's events as entries of the Redis stream `sse:run:<run id>`, each with its number and its text
as server-sent event. On the way out it puts the number and the run's id where the text says null; an event without
such a place is sent unnumbered, and holds the number of its entry all the same.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import redis

_DONE = "[DONE]"


@dataclass(frozen=True)
class Row:
    """One chunk as it must be stored."""

    seq_id: int
    payload: str
    seq_source: str
    message_type: str | None
    otid: str | None
    step_id: str | None


@dataclass(frozen=True)
class RunLog:
    """The log of one run: the rows it must become, and whether it says that the run is over."""

    rows: tuple[Row, ...]
    is_over: bool

    @property
    def holes(self) -> list[tuple[int, int]]:
        """The ranges of numbers missing between 1 and the last one."""
        holes, expected = [], 1
        for row in self.rows:
            if row.seq_id > expected:
                holes.append((expected, row.seq_id - 1))
            expected = row.seq_id + 1
        return holes


class ServerLog:
    """Reads the logs of runs."""

    def __init__(self, redis_port: int) -> None:
        self._redis = redis.Redis(host="127.0.0.1", port=redis_port, decode_responses=True)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def read(self, run_id: str) -> RunLog:
        """Everything up to the entry that ends the run; what the server appends behind it is never sent."""
        rows: dict[int, Row] = {}
        is_over = False
        entries = cast("list[tuple[str, dict[str, str]]]", self._redis.xrange(f"sse:run:{run_id}"))
        for _, fields in entries:
            number = int(fields["seq_id"])
            row = row_of_entry(run_id, number, fields["data"])
            if row is not None:
                rows.setdefault(number, row)  # after a cut connection to Redis the server writes a batch twice
            if fields.get("complete") == "true":
                is_over = True
                break
        return RunLog(tuple(rows[number] for number in sorted(rows)), is_over)

    def is_over(self, run_id: str) -> bool:
        """Whether the log has its end; cheaper than reading all of it."""
        newest = cast("list[tuple[str, dict[str, str]]]", self._redis.xrevrange(f"sse:run:{run_id}", count=1))
        return bool(newest) and newest[0][1].get("complete") == "true"

    def wait_until_over(self, run_ids: Iterable[str], timeout: float) -> None:
        """Return when all these logs have their end."""
        deadline = time.monotonic() + timeout
        for run_id in run_ids:
            while not self.is_over(run_id):
                if time.monotonic() > deadline:
                    raise AssertionError(f"the log of {run_id} has no end after {timeout:.0f} s")
                time.sleep(0.1)

    def length(self, run_id: str) -> int:
        """How many entries the log has at the moment."""
        return self._redis.xlen(f"sse:run:{run_id}")


def row_of_entry(run_id: str, number: int, event: str) -> Row | None:
    """The row of one entry; None for the end marker."""
    # Split on LF only: the text may hold U+2028 and its like, unescaped.
    lines = [line.removeprefix("data: ") for line in event.split("\n") if line.startswith("data: ")]
    if len(lines) != 1:
        raise AssertionError(f"{run_id} {number}: an event of {len(lines)} data lines: {event!r}")
    if lines[0] == _DONE:
        return None
    payload = lines[0].replace('"run_id":null', f'"run_id":"{run_id}"')
    is_numbered = '"seq_id":null' in payload
    payload = payload.replace('"seq_id":null', f'"seq_id":{number}')
    said: dict[str, Any] = json.loads(payload)
    return Row(
        seq_id=number,
        payload=payload,
        seq_source="wire" if is_numbered else "derived",
        message_type=said.get("message_type"),
        otid=said.get("otid"),
        step_id=said.get("step_id"),
    )
