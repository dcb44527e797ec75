"""Is what is stored of a run sound? The invariants I1, I2 and I5 as a check on stored values. Used by verify.py."""

from collections.abc import Sequence
from typing import Protocol

from worker.core.chunks import Chunk, Ping, parse
from worker.core.sse import SseEvent

Range = tuple[int, int]
"""The first and the last number."""


class Numbered(Protocol):
    """A stored chunk."""

    @property
    def seq_id(self) -> int:
        """Its number."""

    @property
    def payload(self) -> str:
        """Its payload, verbatim."""

    @property
    def seq_source(self) -> str:
        """`wire` or `derived`."""


class Missing(Protocol):
    """A stored gap."""

    @property
    def first_seq_id(self) -> int:
        """The first missing number."""

    @property
    def last_seq_id(self) -> int | None:
        """The last missing number; None: up to the unknown end."""


def faults_of(
    run_id: str,
    *,
    state: str,
    cursor: int,
    chunk_count: int,
    chunks: Sequence[Numbered],
    open_gaps: Sequence[Missing],
) -> list[str]:
    """What contradicts itself in what is stored of one run, in words; empty when it is sound.

    `chunks` are in the order of their numbers. A run that is being followed may hold rows beyond its cursor.
    """
    faults = []
    numbers = [chunk.seq_id for chunk in chunks]
    holes = _holes(numbers, cursor)
    # Ranges, never sets of numbers: a server may have named a number of two thousand millions.
    if unexplained := _without(holes, [(gap.first_seq_id, gap.last_seq_id or cursor) for gap in open_gaps]):
        faults.append(f"the cursor is {cursor}, but {_in_words(unexplained)} are neither stored nor a gap")
    if min(numbers, default=1) < 1:
        faults.append("there is a row with a number below 1")
    stored = sum(1 for number in numbers if number <= cursor)
    if chunk_count != stored:
        faults.append(f"chunk_count is {chunk_count}, but {stored} rows are stored up to the cursor")
    if state == "complete" and (holes or open_gaps):
        faults.append("the run is called complete, but something is missing")
    if state == "complete" and max(numbers, default=cursor) > cursor:
        faults.append("the run is called complete, but there are rows behind its last number")
    faults += [fault for chunk in chunks if (fault := _fault_of_row(run_id, chunk)) is not None]
    return faults


def _fault_of_row(run_id: str, stored: Numbered) -> str | None:
    event = parse(SseEvent(stored.payload.encode()))
    chunk = event.chunk if isinstance(event, Ping) else event
    if not isinstance(chunk, Chunk):
        return f"the payload of {stored.seq_id} is not a chunk"
    if chunk.run_id not in {None, run_id}:
        return f"the payload of {stored.seq_id} names another run"
    is_right = chunk.seq_id is None if stored.seq_source == "derived" else chunk.seq_id == stored.seq_id
    return None if is_right else f"the payload of {stored.seq_id} ({stored.seq_source}) carries number {chunk.seq_id}"


def _holes(numbers: Sequence[int], cursor: int) -> list[Range]:
    """The ranges between 1 and the cursor that are not among these ascending numbers."""
    holes, expected = [], 1
    for number in (*(n for n in numbers if n <= cursor), cursor + 1):
        if number > expected:
            holes.append((expected, number - 1))
        expected = number + 1
    return holes


def _without(ranges: Sequence[Range], explained: Sequence[Range]) -> list[Range]:
    """What is left of the ranges when these are taken away from them."""
    for first, last in explained:
        ranges = [
            part
            for begin, end in ranges
            for part in ((begin, min(end, first - 1)), (max(begin, last + 1), end))
            if part[0] <= part[1]
        ]
    return list(ranges)


def _in_words(ranges: Sequence[Range], shown: int = 5) -> str:
    text = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges[:shown])
    return text + (f" and {len(ranges) - shown} more ranges" if len(ranges) > shown else "")
