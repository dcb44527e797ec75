"""A model of what a Letta server does with one run's log, written from letta-protocol alone.

It knows nothing of RunLog. Sections named below are those of letta-protocol (docs/protocol.md).

What it assumes, because nobody could decide otherwise from the bytes on the wire:

- A1. Entries without a number that stand next to each other differ. Two equal ones cannot be told from one that the
  server wrote twice (g10). Real runs keep to it: `stop_reason error`, `stop_reason llm_api_error`, then usage.
- A2. Nothing is lost between the last numbered chunk and `[DONE]`: what stands there has no number, and a loss would
  only shift it. Real servers keep to it: trimming takes the oldest of 10,000 entries, and a crash leaves no `[DONE]`.
- A3. Where the server wrote a batch twice, loss begins and ends at numbered entries: of `A A` with one entry missing
  behind it nobody can say whether the second is a repetition or what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from worker.core.sse import SseEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RUN = "run-own"
OTHER_RUN = "run-other"
Kind = Literal["ping", "chunk", "hidden", "unreadable", "foreign", "error", "done"]

HIDDEN = [
    '{"message_type":"stop_reason","stop_reason":"end_turn"}',
    '{"message_type":"usage_statistics","total_tokens":15,"run_ids":null}',
    '{"message_type":"stop_reason","stop_reason":"error"}',
]
UNREADABLE = ["no JSON", '{"message_type":"assistant_message","seq_id":-1}', "[1, 2]"]
MADE_UP_STOP = SseEvent(b'{"message_type": "stop_reason", "stop_reason": "cancelled"}')
READER_ERROR = SseEvent(b'{"error":"Error 111 connecting","code":"INTERNAL_SERVER_ERROR"}', "error")


@dataclass(frozen=True)
class Entry:
    """One entry of the log; its number shows on the wire for some kinds only (a)."""

    number: int
    kind: Kind
    data: str

    @property
    def is_numbered(self) -> bool:
        """Its number on the wire is beyond doubt. A foreign run's entry shows one, but of whose log?"""
        return self.kind in {"ping", "chunk", "error"}

    @property
    def is_end(self) -> bool:
        """Nothing is sent after it."""
        return self.kind in {"error", "done"}

    @property
    def event(self) -> SseEvent:
        """What goes over the wire."""
        return SseEvent(self.data.encode(), "error" if self.kind == "error" else "")


@dataclass(frozen=True)
class Trouble:
    """What happens during one reading; places count the entries sent in it."""

    cut: int | None = None
    """The response ends here."""
    ending: Literal["eof", "reader error", "cancelled"] = "eof"
    pings: frozenset[int] = frozenset()
    trim: tuple[int, int] | None = None
    """(place, choice): entries up to one of the allowed positions are gone from here on (g6)."""
    skip: tuple[int, int] | None = None
    """(place, choice): this reader does not see some entries, the next one does."""


CLEAN = Trouble()


def log_of(kinds: Sequence[Kind], end: Literal["done", "error"], run_id: str = RUN) -> list[Entry]:
    """Number the entries from 1 and write their payloads."""
    entries: list[Entry] = []
    unnumbered: dict[str, int] = {}
    for number, kind in enumerate([*kinds, end], start=1):
        if kind in {"ping", "chunk"}:
            unnumbered.clear()
        place = unnumbered[kind] = unnumbered.get(kind, -1) + 1
        if kind == "hidden":
            text = (
                HIDDEN[place] if place < len(HIDDEN) else f'{{"message_type":"stop_reason","stop_reason":"s{place}"}}'
            )
        elif kind == "unreadable":
            text = UNREADABLE[place] if place < len(UNREADABLE) else f"no JSON {place}"
        else:
            text = _numbered_data(kind, number, run_id)
        entries.append(Entry(number, kind, text))
    return entries


def _numbered_data(kind: str, number: int, run_id: str) -> str:
    if kind == "done":
        return "[DONE]"
    owner = OTHER_RUN if kind == "foreign" else run_id
    message_type = {"ping": "ping", "error": "error_message"}.get(kind, "assistant_message")
    return f'{{"message_type":"{message_type}","seq_id":{number},"run_id":"{owner}","content":"tok{number} é"}}'


def written(entries: Sequence[Entry], sizes: Sequence[int], failed: Sequence[Sequence[int]]) -> list[Entry]:
    """The log as batches were written to it: of each failed attempt a beginning is there too (g10)."""
    stream: list[Entry] = []
    starts = [0, *accumulate(sizes), len(entries)]
    for i, start in enumerate(starts[:-1]):
        batch = entries[start : starts[i + 1]]
        for length in failed[i] if i < len(failed) else ():
            stream += batch[:length]
        stream += batch
    return stream


@dataclass
class Server:
    """Serves one run's log, as it was written; `other` is what it serves when it ignores the run_id asked for."""

    entries: list[Entry]
    stream: list[Entry] = field(default_factory=list)
    other: Server | None = None
    run_id: str = RUN
    trimmed: int = 0
    hole_count: int = 0

    def __post_init__(self) -> None:
        self.stream = self.stream or list(self.entries)

    @property
    def has_repeats(self) -> bool:
        """A batch was written twice."""
        return len(self.stream) > len(self.entries)

    def entry(self, number: int) -> Entry | None:
        """The entry with that number."""
        return self.entries[number - 1] if 1 <= number <= len(self.entries) else None

    def is_missing(self, number: int) -> bool:
        """No copy of the entry is left, or the first one left stands behind a higher number."""
        left = (entry.number for entry in self.stream[self.trimmed :] if entry.is_numbered or entry.number == number)
        return next((n for n in left if n >= number), None) != number

    def read(self, after: int, trouble: Trouble, *, is_by_run: bool) -> Iterator[SseEvent]:
        """One response: every entry numbered above `after` (exclusive, c), in the order they were written."""
        if self.other is not None and not is_by_run:
            yield from self.other.read(after, trouble, is_by_run=True)
            return
        position, sent, shown, last = 0, 0, None, None
        while True:
            if sent in trouble.pings:
                yield self._keepalive(shown)
            if sent == trouble.cut:
                yield from self._ending(trouble)
                return
            if trouble.trim and sent == trouble.trim[0]:
                self._trim(trouble.trim[1], last)
            position = max(position, self.trimmed)
            if trouble.skip and sent == trouble.skip[0]:
                position = self._skip(position, trouble.skip[1], last)
            while position < len(self.stream) and self.stream[position].number <= after:
                position += 1
            if position == len(self.stream):
                # Past the terminal: nothing but pings for ever (c); after the first one the client goes away.
                yield self._keepalive(None)
                return
            entry = last = self.stream[position]
            position, sent = position + 1, sent + 1
            shown = entry.number if entry.is_numbered or entry.kind == "foreign" else shown
            yield entry.event
            if entry.is_end:
                return

    def _keepalive(self, shown: int | None) -> SseEvent:
        """A ping made by the reader: it repeats the last number of this response, or has none (b)."""
        number = "null" if shown is None else shown
        data = f'{{"id":"ping-x","message_type":"ping","seq_id":{number},"run_id":"{self.run_id}"}}'
        return SseEvent(data.encode())

    def _ending(self, trouble: Trouble) -> Iterator[SseEvent]:
        if trouble.ending == "cancelled":
            yield MADE_UP_STOP
        elif trouble.ending == "reader error":
            yield READER_ERROR

    def _allowed(self, position: int, last: Entry | None) -> list[int]:
        """Positions the log may be cut to, or a reader may skip to (A2, A3)."""
        if last is not None and not last.is_numbered and self.has_repeats:
            return []
        numbered = [at for at, entry in enumerate(self.stream) if entry.is_numbered]
        if self.has_repeats:
            return [at for at in numbered if at > position]
        return list(range(position + 1, numbered[-1] + 1)) if numbered else []

    def _trim(self, choice: int, last: Entry | None) -> None:
        if allowed := self._allowed(self.trimmed, last):
            self.trimmed = allowed[choice % len(allowed)]
            self.hole_count += 1

    def _skip(self, position: int, choice: int, last: Entry | None) -> int:
        # Behind a numbered entry of this response only: else it would be the second response without them.
        allowed = self._allowed(position, last) if last is not None and last.is_numbered else []
        self.hole_count += bool(allowed)
        return allowed[choice % len(allowed)] if allowed else position
