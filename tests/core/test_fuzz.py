"""The parsing core as a whole, SseDecoder -> parse -> RunLog, on real captures after every kind of accident.

`LETTA_INGEST_EXAMPLES=100000 make test ARGS=tests/core/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.core.server_model import RUN
from tests.support.mutations import mutated
from worker.core.chunks import (
    Chunk,
    Done,
    Event,
    Ping,
    ServerError,
    Unparsable,
    _parse_plain,
    _parse_with_care,
    parse,
)
from worker.core.runlog import MAX_UNNUMBERED, Gap, Reject, Row, RunLog, _without_repeats
from worker.core.sse import SseDecoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

EXAMPLES = int(os.environ.get("LETTA_INGEST_EXAMPLES") or "150")
PLENTY = 1 << 20
KEPT = 64
CAPTURES = [
    re.sub(rb'"run-[0-9a-f-]{36}"', b'"%s"' % RUN.encode(), path.read_bytes())
    for path in sorted((Path(__file__).parent / "captures").glob("*.sse"))
]
RESPONSES = st.lists(mutated(CAPTURES), min_size=1, max_size=3)
CUTS = st.lists(st.integers(0, 5000), max_size=12)


@settings(max_examples=EXAMPLES)
@given(RESPONSES)
@example([b'data: {"seq_id":1.0}\n\n', b'data: {"id":"a\\u0000"}\n\n', b'data: {"id":"\\ud800"}\n\n'])
@example([b'data: {"id":"%s"}\n\n' % (b"x" * 256), b'data: {"seq_id":true}\n\n', b'data: {"seq_id":1,"a":NaN}\n\n'])
def test_the_short_way_is_only_shorter(responses: list[bytes]) -> None:
    """What is read in one go is what careful reading makes of it (I6, I9)."""
    for response in responses:
        for event in SseDecoder(PLENTY, KEPT).feed(response):
            assert _parse_plain(event) in {None, _parse_with_care(event)}


def pieces(received: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The bytes, cut at these places."""
    places = sorted({0, len(received), *(cut for cut in cuts if cut < len(received))})
    return [received[start:end] for start, end in pairwise(places)]


@dataclass
class Reading:
    """What a follower makes of these responses; every event's fate is written down as it is accepted."""

    is_by_run: bool = True
    limit: int = PLENTY
    rows: list[Row] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    log: RunLog = field(default_factory=lambda: RunLog(RUN))

    def read(self, received: bytes, cuts: Sequence[int]) -> None:
        """Read one response, up to where a follower leaves it."""
        decoder = SseDecoder(self.limit, KEPT)
        self.log.begin_read(is_by_run=self.is_by_run)
        for piece in pieces(received, cuts):
            events = decoder.feed(piece)
            assert len(decoder._buffer) <= max(self.limit, 3) + 2
            for event in map(parse, events):
                self.accept(event)
                if self.log.is_finished or self.log.is_unproven or self.log.wants_reread:
                    break
            self.take()
        self.endings.append(f"{self.log.is_finished} {self.log.is_unproven} {self.log.wants_reread} {self.log.cursor}")
        self.is_by_run = self.is_by_run or self.log.is_unproven

    def take(self) -> None:
        """Take what has become storable, as one transaction would."""
        if (lot := self.log.take()) is not None:
            self.rows += lot.rows
            self.gaps += lot.gaps
            self.rejects += lot.rejects
            assert lot.cursor == self.log.cursor
            assert lot.stored_count == len(self.rows)

    def accept(self, event: Event) -> None:
        """Hand one event over: nothing that holds a place may vanish (I6)."""
        was_dead = self.log.is_finished or self.log.is_unproven or self.log.wants_reread
        before, excused = self._held_somewhere(), self._may_be_dropped(event)
        self.log.accept(event)
        assert len(self.log._tail) <= MAX_UNNUMBERED
        vanished = before + isinstance(event, Chunk | Ping | Unparsable) - self._held_somewhere()
        if not (was_dead or excused or self.log.wants_reread or self.log.is_unproven):
            assert vanished == 0, (event, self.log)
        assert vanished >= 0

    def _held_somewhere(self) -> int:
        log = self.log
        stored = len(self.rows) + len(log._rows) + len(self.rejects) + len(log._rejects)
        return stored + log.duplicate_count + len(log._tail) + len(log._held)

    def _may_be_dropped(self, event: Event) -> bool:
        """What the server sends again anyway: keepalives, repetitions of a batch, or of what is held already."""
        chunk = event.chunk if isinstance(event, Ping) else event
        goes_back = isinstance(chunk, Chunk) and chunk.seq_id is not None and chunk.seq_id <= self.log._anchor
        is_held = isinstance(chunk, Chunk) and chunk.seq_id in self.log._held
        repeats = isinstance(chunk, Chunk | Done) and _without_repeats(self.log._tail) != self.log._tail
        return goes_back or is_held or repeats or isinstance(event, Ping)


def read_all(responses: Sequence[bytes], cuts: Sequence[int], limit: int, *, is_by_run: bool) -> Reading:
    """Read the responses one after the other."""
    reading = Reading(is_by_run, limit)
    for received in responses:
        reading.read(received, cuts)
    return reading


@settings(max_examples=EXAMPLES)
@given(RESPONSES, CUTS, st.sampled_from([40, 400, PLENTY]), st.booleans())
@example([b'data: {"seq_id":1,"run_id":"RUN"}\n\ndata: x\n\ndata: [DONE]\n\n'], [3], PLENTY, True)  # noqa: FBT003
def test_any_bytes_become_what_they_say(
    responses: list[bytes],
    cuts: list[int],
    limit: int,
    is_by_run: bool,  # noqa: FBT001
) -> None:
    """Whatever comes, nothing fails, nothing vanishes, and a row holds what was sent under its number (I1, I2, I6)."""
    reading = read_all(responses, cuts, limit, is_by_run=is_by_run)
    check_rows(reading, b"\n".join(responses))
    reading.log.give_up("not served")
    reading.take()
    check_rows(reading, b"\n".join(responses))
    assert reading.log.is_finished


@settings(max_examples=EXAMPLES // 2)
@given(RESPONSES, CUTS, st.sampled_from([40, 400, PLENTY]), st.booleans())
def test_where_the_bytes_are_cut_changes_nothing(
    responses: list[bytes],
    cuts: list[int],
    limit: int,
    is_by_run: bool,  # noqa: FBT001
) -> None:
    """One read or a thousand: the same rows, gaps, rejects and endings (I2, I6)."""
    whole, cut, bytewise = (
        read_all(responses, places, limit, is_by_run=is_by_run) for places in ([], cuts, range(20_000))
    )
    for other in (cut, bytewise):
        assert (other.rows, other.gaps, other.rejects) == (whole.rows, whole.gaps, whole.rejects)
        assert other.endings == whole.endings


def check_rows(reading: Reading, sent: bytes) -> None:
    """By the standard library's JSON and by counting: rows are whole, right, and every number is accounted for."""
    sent = sent.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for row in reading.rows:
        fields = json.loads(row.chunk.payload)
        assert fields.get("run_id") in {None, RUN}
        assert fields.get("seq_id") == (None if row.is_derived else row.seq_id)
        assert all(line in sent for line in row.chunk.payload.encode().split(b"\n"))
    for reject in reading.rejects:
        assert all(line in sent for line in reject.raw.split(b"\n"))
    stored = [row.seq_id for row in reading.rows]
    missing = list(numbers_of(reading.gaps, most=20_000))
    assert len(stored) == len(set(stored))
    assert len(missing) == len(set(missing))
    cursor = min(reading.log.cursor, 20_000)
    assert {*stored, *missing} >= set(range(1, cursor + 1))
    assert max(stored, default=0) <= reading.log.cursor


def numbers_of(gaps: Sequence[Gap], most: int) -> Iterator[int]:
    """The missing numbers; of a gap of millions the first."""
    for gap in gaps:
        yield from range(gap.first_seq_id, min(gap.last_seq_id or gap.first_seq_id - 1, most) + 1)


def test_captures_are_read_whole() -> None:
    """The seeds are healthy: each is one complete run, without gap or reject."""
    for received in CAPTURES:
        reading = read_all([received], [], PLENTY, is_by_run=False)
        assert reading.log.is_finished
        assert reading.rows
        assert (reading.gaps, reading.rejects) == ([], [])
        assert not any(isinstance(parse(event), ServerError) for event in SseDecoder(PLENTY).feed(received))
