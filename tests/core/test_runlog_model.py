"""RunLog against a model of the server: whatever goes wrong, rows are the server's log less recorded gaps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.server_model import CLEAN, OTHER_RUN, RUN, Entry, Server, Trouble, log_of, written
from worker.core.chunks import parse
from worker.core.runlog import Accepted, Gap, RunLog

if TYPE_CHECKING:
    from worker.core.sse import SseEvent


@dataclass
class Store:
    """What is committed; checks every lot against the server's log as it comes."""

    server: Server
    rows: dict[int, str] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    rejects: list[tuple[int, bytes]] = field(default_factory=list)
    cursor: int = 0
    stored_count: int = 0
    is_finished: bool = False
    is_complete: bool = False

    def commit(self, lot: Accepted) -> None:
        """Take a lot as one transaction would (I1, I3)."""
        self.rows |= {row.seq_id: row.chunk.payload for row in lot.rows}
        self.gaps += lot.gaps
        self.rejects += [(reject.after_seq_id, reject.raw) for reject in lot.rejects]
        self.cursor, self.stored_count = lot.cursor, lot.stored_count
        self.is_finished, self.is_complete = lot.is_finished, lot.is_complete
        assert self.stored_count == len(self.rows)
        self.check_cursor()

    def check_cursor(self) -> None:
        """The cursor is contiguous but for gaps, and one may ask for what comes after it (I2)."""
        accounted = self.rows.keys() | self.missing()
        assert set(range(1, self.cursor + 1)) <= accounted
        entry = self.server.entry(self.cursor)
        assert self.is_finished or self.cursor == 0 or (entry is not None and entry.is_numbered)

    def missing(self) -> set[int]:
        """The numbers recorded as gaps that have not turned up since."""
        gaps = ((gap.first_seq_id, gap.last_seq_id or gap.first_seq_id) for gap in self.gaps)
        return {n for first, last in gaps for n in range(first, last + 1)} - self.rows.keys()


class Client:
    """What follower.py does with a RunLog, and a process that may die."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = Store(server)
        self.uncommitted: list[Accepted] = []
        self.read_count = 0
        self.is_by_run = False
        self.log = RunLog(RUN)

    def crash(self) -> None:
        """Die before the last lots are committed, and start again from what is stored."""
        self.uncommitted.clear()
        self.is_by_run = False
        self.log = RunLog(RUN, self.store.cursor, self.store.stored_count, self.store.gaps)

    def read(self, trouble: Trouble = CLEAN, batch: int = 1, *, commits: bool = True) -> None:
        """Read one response; `batch` events are looked at before what they brought is taken."""
        self.read_count += 1
        self.log.begin_read(is_by_run=self.is_by_run)
        for place, event in enumerate(self.server.read(self.log.cursor, trouble, is_by_run=self.is_by_run), start=1):
            self.accept(event)
            is_over = self.log.is_finished or self.log.is_unproven or self.log.wants_reread
            if is_over or place % batch == 0:
                self.take(commits=commits)
            if is_over:
                break
        self.take(commits=commits)
        self.is_by_run = self.is_by_run or self.log.is_unproven

    def accept(self, event: SseEvent) -> None:
        """Hand one event over; the cursor never goes back, and what is held is bounded (I2, I8)."""
        before = self.log.cursor
        self.log.accept(parse(event))
        assert self.log.cursor >= before
        assert len(self.log._held) <= 1 + len(self.server.entries)

    def take(self, *, commits: bool) -> None:
        """Check what has become storable, and commit it unless the process is to die first."""
        if (lot := self.log.take()) is None:
            return
        self.check(lot)
        self.uncommitted.append(lot)
        if commits or lot.is_finished:
            for ready in self.uncommitted:
                self.store.commit(ready)
            self.uncommitted.clear()

    def check(self, lot: Accepted) -> None:
        """Nothing is ever stored under a wrong number, altered, or called missing without being so (I1, I2, I6)."""
        for row in lot.rows:
            entry = self.server.entry(row.seq_id)
            assert entry is not None
            assert entry.kind not in {"done", "unreadable", "foreign"}
            assert row.chunk.payload == entry.data
            assert row.is_derived == (entry.kind == "hidden")
        for gap in lot.gaps:
            assert gap.last_seq_id is not None
            for number in range(gap.first_seq_id, gap.last_seq_id + 1):
                assert self.may_be_missing(number), gap
        known = {entry.data.encode() for entry in self.server.entries}
        assert all(reject.raw in known for reject in lot.rejects)

    def may_be_missing(self, number: int) -> bool:
        """It is not readable, or gone or late, or without a number and next to something that is gone."""
        entry = self.server.entry(number)
        assert entry is not None
        if entry.kind in {"unreadable", "foreign"} or self.server.is_missing(number):
            return True
        return not entry.is_numbered and any(self.server.is_missing(n) for n in self.stretch_around(number))

    def stretch_around(self, number: int) -> range:
        """The entries from the numbered one before to the numbered one behind."""
        numbered = [entry.number for entry in self.server.entries if entry.is_numbered]
        before = max((n for n in numbered if n < number), default=1)
        behind = min((n for n in numbered if n > number), default=len(self.server.entries))
        return range(before, behind + 1)

    def finish(self) -> None:
        """Read without trouble until the run is finished: 3 readings for each hole are enough."""
        most = self.read_count + 2 + 3 * (1 + self.server.hole_count)
        while not self.log.is_finished:
            assert self.read_count < most, f"{self.log} does not get on"
            self.read()


def check_end(client: Client) -> None:
    """Rows and gaps together are the server's log, and `complete` says so only if nothing is missing (I5)."""
    server, store = client.server, client.store
    chunks = {entry.number: entry.data for entry in server.entries if entry.kind != "done"}
    assert store.is_finished
    assert store.rows == {number: data for number, data in chunks.items() if number in store.rows}
    assert chunks.keys() - store.rows.keys() == store.missing()
    assert store.cursor == len(chunks)
    assert store.is_complete == (not store.missing())
    if server.trimmed == 0:
        unreadable = [entry for entry in server.entries if entry.kind in {"unreadable", "foreign"}]
        assert set(store.rejects) == {(entry.number - 1, entry.data.encode()) for entry in unreadable}
        assert store.missing() == {entry.number for entry in unreadable}


# Any log, any trouble

KINDS = st.sampled_from(["chunk"] * 6 + ["hidden"] * 3 + ["unreadable", "foreign"])
LOGS = st.builds(
    lambda ping, kinds, end: log_of([*ping, *kinds], end),
    st.sampled_from([[], ["ping"]]),
    st.lists(KINDS, max_size=14),
    st.sampled_from(["done", "error"]),
)
FAILED_WRITES = st.lists(st.lists(st.integers(1, 6), max_size=2), max_size=6)
WRITES = st.tuples(st.lists(st.integers(1, 6), max_size=5), st.just([]) | FAILED_WRITES)
PLACES = st.integers(0, 12)
TROUBLES = st.builds(
    Trouble,
    cut=st.none() | PLACES,
    ending=st.sampled_from(["eof", "reader error", "cancelled"]),
    pings=st.frozensets(PLACES, max_size=4),
    trim=st.none() | st.tuples(PLACES, PLACES),
    skip=st.none() | st.tuples(PLACES, PLACES),
)
READINGS = st.lists(st.tuples(TROUBLES, st.integers(1, 5), st.booleans(), st.booleans()), max_size=5)
OTHERS = st.none() | st.builds(
    lambda count, end: Server(log_of([*["chunk"] * count, "hidden", "hidden"], end, OTHER_RUN), run_id=OTHER_RUN),
    st.integers(0, 20),
    st.sampled_from(["done", "error"]),
)


def server_of(entries: list[Entry], writes: tuple[list[int], list[list[int]]], other: Server | None = None) -> Server:
    """A server that wrote the entries in batches, some of them more than once."""
    sizes, failed = writes
    while sum(sizes) > len(entries):
        sizes = sizes[:-1]
    return Server(entries, written(entries, sizes, failed), other)


@settings(max_examples=600)
@given(LOGS, WRITES, OTHERS, READINGS)
def test_the_log_is_stored_whatever_happens(
    entries: list[Entry],
    writes: tuple[list[int], list[list[int]]],
    other: Server | None,
    readings: list[tuple[Trouble, int, bool, bool]],
) -> None:
    """Cuts, crashes, repeated batches, trimming, errors, another run: rows are the log less the gaps (I1-I6, I9)."""
    client = Client(server_of(entries, writes, other))
    for trouble, batch, commits, crashes in readings:
        if client.log.is_finished:
            break
        client.read(trouble, batch, commits=commits)
        if crashes and not client.log.is_finished:
            client.crash()
    client.finish()
    check_end(client)


@settings(max_examples=200)
@given(LOGS, WRITES, st.frozensets(PLACES), st.integers(1, 5))
def test_without_trouble_one_reading_is_enough(
    entries: list[Entry], writes: tuple[list[int], list[list[int]]], pings: frozenset[int], batch: int
) -> None:
    """One response brings everything, keepalive pings change nothing, and repetitions are counted (I1, I5, I9)."""
    server = server_of(entries, writes)
    client = Client(server)
    client.is_by_run = True
    client.read(Trouble(pings=pings), batch)
    check_end(client)
    sent = server.stream[: next(i for i, entry in enumerate(server.stream) if entry.is_end)]
    chunks = [entry.number for entry in sent if entry.kind == "chunk"]
    hidden = [entry.number for entry in sent if entry.kind == "hidden"]
    sure, unsure = (len(numbers) - len(set(numbers)) for numbers in (chunks, hidden))
    assert sure <= client.log.duplicate_count <= sure + unsure


@settings(max_examples=200)
@given(LOGS, WRITES, READINGS, st.frozensets(PLACES, min_size=1))
def test_pings_change_nothing(
    entries: list[Entry],
    writes: tuple[list[int], list[list[int]]],
    readings: list[tuple[Trouble, int, bool, bool]],
    pings: frozenset[int],
) -> None:
    """The same readings with and without keepalive pings give the same lots (I9)."""
    stores = []
    for place in (frozenset[int](), pings):
        client = Client(server_of(entries, writes))
        client.is_by_run = True
        for trouble, _, _, _ in readings:
            if not client.log.is_finished:
                client.read(Trouble(trouble.cut, trouble.ending, place, trouble.trim, trouble.skip))
        stores.append(client.store)
    assert stores[0] == Store(**{**vars(stores[1]), "server": stores[0].server})
