"""RunLog: accepts a run's events in any order and says what to store (I1, I2, I5, I6, I9).

The server's log of a run is a list of entries numbered from 1. The wire shows most numbers, hides those of
stop_reason and usage_statistics, repeats entries, and skips silently what was trimmed away. RunLog puts the log
together again: numbered chunks by their number, unnumbered ones by their place, and only once it is certain.
Used by follower.py, one RunLog a run.
"""

from collections.abc import Iterable, Sequence

import msgspec

from worker.core.chunks import Chunk, Done, Event, Ping, Unparsable

MAX_UNNUMBERED = 1000
"""So many unnumbered events in a row are kept waiting for their number; a healthy run has two (I8)."""
MAX_UNNUMBERED_BYTES = 64 * 1024 * 1024
"""And so large may they be together; a single event has a limit of its own, in sse.py."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """A chunk and the number it holds in the server's log; `is_derived` when the wire did not show it."""

    seq_id: int
    chunk: Chunk
    is_derived: bool = False


class Gap(msgspec.Struct, frozen=True):
    """Numbers proven to be missing. `last_seq_id` None: up to the run's unknown end."""

    first_seq_id: int
    last_seq_id: int | None
    cause: str


class Reject(msgspec.Struct, frozen=True):
    """Bytes that became no row. They stood somewhere after the entry `after_seq_id`."""

    after_seq_id: int
    raw: bytes
    reason: str


class Accepted(msgspec.Struct, frozen=True):
    """What became storable since the last take, to be committed in one transaction (I3)."""

    rows: Sequence[Row]
    gaps: Sequence[Gap]
    rejects: Sequence[Reject]
    cursor: int
    stored_count: int
    """Chunks stored at or below the cursor, this lot included."""
    has_late_rows: bool
    """Some rows fill numbers that were recorded as a gap before."""
    is_finished: bool
    is_complete: bool


_Place = Row | Reject


class RunLog:
    """The log of one run as far as it is known; starts from what the store holds.

    Begin every response with `begin_read`, then `accept` its events one by one, and after each one look at
    `is_finished` (stop), `is_unproven` (ask again at the run's own endpoint) and `wants_reread` (ask again from the
    cursor: missing chunks may only be late, and a repetition may hide a number). `take` gives what has become
    storable.
    """

    def __init__(self, run_id: str, cursor: int = 0, stored_count: int = 0, gaps: Iterable[Gap] = ()) -> None:
        self.cursor = cursor
        self.is_finished = False
        self.duplicate_count = 0
        self._run_id = run_id
        self._stored_count = stored_count
        self.is_complete = False
        self._open_gaps = {(g.first_seq_id, g.last_seq_id or g.first_seq_id): set[int]() for g in gaps}
        self._is_end_seen = False
        self._held: dict[int, _Place] = {}
        self.begin_read(is_by_run=False)
        self._start_lot()

    def __repr__(self) -> str:
        """Show the state a person debugging a run asks for first."""
        return (
            f"<RunLog {self._run_id} cursor={self.cursor} held={len(self._held)} tail={len(self._tail)}"
            f" finished={self.is_finished}>"
        )

    @property
    def _confirms_hole(self) -> bool:
        """This response was asked for because of the hole behind the cursor, and has not closed it."""
        return self._confirming_at == self.cursor

    def begin_read(self, *, is_by_run: bool) -> None:
        """A new response, asked for after the cursor, begins.

        What the last one left unproven is dropped: it comes again. `is_by_run` says that the address itself names
        the run, so that even events that name no run are known to be its own.
        """
        self.is_unproven = False
        self.wants_reread = False
        self._is_own = is_by_run
        self._asked_after = self._anchor = self.cursor
        self._tail: list[Chunk | Unparsable] = []
        self._tail_bytes = 0
        self._is_tail_broken = False
        self._holds_unknown = False
        self._confirming_at = self.cursor if self._held else None

    def accept(self, event: Event) -> None:
        """Take in one event. A response that cannot be proven to be this run's changes nothing."""
        if self.is_finished or self.is_unproven or self.wants_reread:
            return
        if isinstance(event, Chunk):
            self._accept_chunk(event)
        elif isinstance(event, Ping):
            self._accept_ping(event.chunk)
        elif isinstance(event, Done):
            self._accept_end()
        elif isinstance(event, Unparsable):
            self._await_number(event)
        # What is left, a ServerError, is the reader's own and holds no place in the log.

    def give_up(self, cause: str) -> None:
        """The server serves nothing more: what is missing becomes a gap, up to the run's unknown end."""
        if self.is_finished:
            return
        if self._held:
            self._record_gaps_before(max(self._held), cause)
        self._reject_tail("was the last thing served, but its number cannot be proven")
        self._gaps.append(Gap(self.cursor + 1, None, cause))
        self.is_finished = True

    def take(self) -> Accepted | None:
        """Return what has become storable since the last call; None when that is nothing."""
        if not (self._rows or self._gaps or self._rejects or self.is_finished):
            return None
        accepted = Accepted(
            self._rows,
            self._gaps,
            self._rejects,
            self.cursor,
            self._stored_count,
            self._has_late_rows,
            self.is_finished,
            self.is_complete,
        )
        self._start_lot()
        return accepted

    def _start_lot(self) -> None:
        self._rows: list[Row] = []
        self._gaps: list[Gap] = []
        self._rejects: list[Reject] = []
        self._has_late_rows = False

    # One event of each kind

    def _accept_chunk(self, chunk: Chunk) -> None:
        if chunk.run_id is not None and chunk.run_id != self._run_id:
            if self._is_own:
                self._await_number(Unparsable(chunk.payload.encode(), f"names another run: {chunk.run_id}"))
            else:
                self.is_unproven = True
        elif chunk.seq_id is None:
            self._is_own = self._is_own or chunk.run_id is not None
            self._await_number(chunk)
            if chunk.ends_run:
                self._accept_end()
        elif chunk.run_id is None and not self._is_own:
            self.is_unproven = True
        else:
            self._is_own = True
            self._accept_numbered(chunk.seq_id, chunk)

    def _accept_ping(self, chunk: Chunk) -> None:
        """A ping with a number never seen in this response is an entry of the log; any other is a keepalive (I9)."""
        if chunk.run_id is not None and chunk.run_id != self._run_id:
            self.is_unproven = self.is_unproven or not self._is_own
            return
        self._is_own = self._is_own or chunk.run_id is not None
        is_keepalive = chunk.seq_id is None or chunk.seq_id <= self._anchor or self._holds_unknown
        if not is_keepalive:
            self._accept_chunk(chunk)

    def _accept_numbered(self, seq_id: int, chunk: Chunk) -> None:
        if self._tail:
            self._place_tail_before(seq_id)
        self._anchor = seq_id
        self._holds_unknown = False
        self._is_tail_broken = False
        self._is_end_seen = self._is_end_seen or chunk.ends_run
        if seq_id == self.cursor + 1 and not self._held:
            self._store(Row(seq_id, chunk))
        else:
            self._hold(seq_id, Row(seq_id, chunk))
            if self._confirms_hole:
                self._record_gaps_before(seq_id)
            self._release_held()
        self._finish_if_whole()
        self.wants_reread = seq_id > self.cursor

    def _await_number(self, event: Chunk | Unparsable) -> None:
        """Keep an event without a number until a later one proves which number it holds."""
        self._holds_unknown = self._holds_unknown or isinstance(event, Unparsable)
        self._tail_bytes = _size(event) + (self._tail_bytes if self._tail else 0)
        self._tail.append(event)
        if len(self._tail) <= MAX_UNNUMBERED and self._tail_bytes <= MAX_UNNUMBERED_BYTES:
            return
        self._is_tail_broken = True
        if self._is_own:
            self._reject_tail("too many events in a row have no number")
        else:
            self.is_unproven = True

    def _accept_end(self) -> None:
        """The terminal marker: what has no number yet stands between the last numbered chunk and the end."""
        if not self._is_own:
            self.is_unproven = True
            return
        if self._held and self._confirms_hole:
            self._record_gaps_before(max(self._held))
            self._release_held()
        if self._held:
            self._tail.clear()
            self.wants_reread = True
            return
        if self._anchor == self.cursor and not self._is_tail_broken:
            for event in _without_repeats(self._tail):
                self._hold(self.cursor + 1, self._as_place(self.cursor + 1, event))
                self._release_held()
            self._tail.clear()
        elif self._tail and not self._is_tail_broken and self._asked_after < self.cursor:
            # A repetition stands before the end; asked after the cursor, the server skips it.
            self.wants_reread = True
            return
        elif self._tail or self._is_tail_broken:
            self._reject_tail("stands before the end, but its number cannot be proven")
            self._open_gap(Gap(self.cursor + 1, None, "rejected"))
        self._is_end_seen = True
        self._finish_if_whole()

    # Numbers

    def _place_tail_before(self, seq_id: int) -> None:
        """Number the unnumbered events between the last numbered chunk and this one, if they fit exactly."""
        free = seq_id - self._anchor - 1
        if free < 0:  # the server repeats a batch: the same events come again, with the numbers around them
            self._tail.clear()
            return
        tail = self._tail if len(self._tail) == free else _without_repeats(self._tail)
        if len(tail) == free and not self._is_tail_broken:
            for number, event in enumerate(tail, start=self._anchor + 1):
                self._hold(number, self._as_place(number, event))
            self._tail.clear()
            self._release_held()
        elif len(tail) > free or self._confirms_hole:
            self._reject_tail(f"stands before {seq_id}, but its number cannot be proven")
        else:
            self._tail.clear()

    def _as_place(self, seq_id: int, event: Chunk | Unparsable) -> _Place:
        if isinstance(event, Chunk):
            return Row(seq_id, event, is_derived=True)
        return Reject(seq_id - 1, event.raw, event.reason)

    def _hold(self, seq_id: int, place: _Place) -> None:
        if seq_id > self.cursor:
            self._held.setdefault(seq_id, place)
        elif isinstance(place, Row):
            self._store_late(place)

    def _release_held(self) -> None:
        while (place := self._held.pop(self.cursor + 1, None)) is not None:
            if isinstance(place, Row):
                self._store(place)
            else:
                self.cursor += 1
                self._rejects.append(place)
                self._open_gap(Gap(self.cursor, self.cursor, "rejected"))

    def _store(self, row: Row) -> None:
        self._rows.append(row)
        self._stored_count += 1
        self.cursor = row.seq_id

    def _store_late(self, row: Row) -> None:
        """A number at or below the cursor fills a gap that was recorded too early, or is a duplicate."""
        for (first, last), filled in self._open_gaps.items():
            if first <= row.seq_id <= last and row.seq_id not in filled:
                filled.add(row.seq_id)
                self._rows.append(row)
                self._stored_count += 1
                self._has_late_rows = True
                return
        self.duplicate_count += 1

    def _record_gaps_before(self, seq_id: int, cause: str = "not served") -> None:
        """A second response from the same cursor did not have them either: they are lost (I2)."""
        self._release_held()
        while self.cursor + 1 < seq_id:
            behind = min(self._held)
            self._open_gap(Gap(self.cursor + 1, behind - 1, cause))
            self.cursor = behind - 1
            self._release_held()

    def _open_gap(self, gap: Gap) -> None:
        self._gaps.append(gap)
        self._open_gaps[gap.first_seq_id, gap.last_seq_id or gap.first_seq_id] = set()

    def _reject_tail(self, reason: str) -> None:
        for event in self._tail:
            raw = event.raw if isinstance(event, Unparsable) else event.payload.encode()
            why = f"{event.reason}; {reason}" if isinstance(event, Unparsable) else reason
            self._rejects.append(Reject(self._anchor, raw, why))
        self._tail.clear()

    def _finish_if_whole(self) -> None:
        if not self._is_end_seen or self._held:
            return
        self.is_finished = True
        self.is_complete = all(len(filled) == last - first + 1 for (first, last), filled in self._open_gaps.items())


def _size(event: Chunk | Unparsable) -> int:
    return len(event.raw if isinstance(event, Unparsable) else event.payload)


def _without_repeats(tail: list[Chunk | Unparsable]) -> list[Chunk | Unparsable]:
    """Undo a batch the server wrote twice (letta-protocol g10): a block that follows itself is a redelivery."""
    kept: list[Chunk | Unparsable] = []
    for event in tail:
        kept.append(event)
        for size in range(1, len(kept) // 2 + 1):
            if event == kept[-1 - size] and kept[-size:] == kept[-2 * size : -size]:
                del kept[-size:]
                break
    return kept
