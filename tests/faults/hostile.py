"""A server that sends what no server should: bytes in the place of an entry, lists of strange runs, endless answers.

Used by test_hostile_*.py. The server is FakeLetta; the poison is put on the wire behind it, past every check.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.demo.fake_faults import EVENT_STREAM, EndOfAnswerError, Fault
from worker.demo.fake_letta import run_id_in
from worker.demo.fake_run import compact

if TYPE_CHECKING:
    from worker.demo.fake_faults import Exchange, Kind, Request
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

MARK = "(poison goes here)"
BEFORE, PLACE, AFTER = 2, 3, 4
"""Numbers in the log of a poisoned run: the initial ping is 1, then what stands before the poison, and so on."""


@dataclass
class Poison(Fault):
    """Sends these bytes where the run's log has the mark: in its place, or in front of it."""

    sent: bytes
    is_extra: bool = False

    async def send(self, exchange: Exchange, data: bytes) -> None:
        """Let everything else pass."""
        if MARK.encode() not in data:
            await exchange.write(data)
            return
        self.fired += 1
        await self.pour(exchange)
        if self.is_extra:
            await exchange.write(data)

    async def pour(self, exchange: Exchange) -> None:
        """Send the poison."""
        await exchange.write(self.sent)


@dataclass
class Flood(Poison):
    """Sends the bytes again and again, with something once before and once behind."""

    repeat: int = 1
    head: bytes = b""
    tail: bytes = b""

    async def pour(self, exchange: Exchange) -> None:
        """Send all of it, in pieces that are not small."""
        await exchange.write(self.head)
        at_once = max(1, 65536 // len(self.sent))
        for start in range(0, self.repeat, at_once):
            await exchange.write(self.sent * min(at_once, self.repeat - start))
        await exchange.write(self.tail)


@dataclass
class Numbers(Poison):
    """Sends the bytes again and again, each time with the next of these numbers in it, and then something else."""

    numbers: range = field(default_factory=lambda: range(0))
    tail: bytes = b""

    async def pour(self, exchange: Exchange) -> None:
        """Send all of them, in pieces that are not small."""
        for start in range(0, len(self.numbers), 5000):
            await exchange.write(b"".join(self.sent % number for number in self.numbers[start : start + 5000]))
        await exchange.write(self.tail)


@dataclass
class Cutting(Flood):
    """The same once, and then the connection breaks; the next time all is well."""

    async def pour(self, exchange: Exchange) -> None:
        """Send it and break."""
        if self.fired > 1:
            return
        await super().pour(exchange)
        exchange.drop()
        raise EndOfAnswerError


@dataclass
class Raw(Fault):
    """Answers a stream request with these bytes and headers, and nothing else."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    async def begin(self, exchange: Exchange) -> None:
        """Answer."""
        self.fired += 1
        await exchange.start(200, {"content-type": EVENT_STREAM, **self.headers})
        await exchange.write(self.body)
        raise EndOfAnswerError


@dataclass
class EndlessMessages(Fault):
    """Lists messages nobody wrote, page after page, each page with new ones."""

    page: int = 100
    size: int = 1000

    async def begin(self, exchange: Exchange) -> None:
        """Answer with one more page."""
        self.fired += 1
        ids = range(self.fired * self.page, (self.fired + 1) * self.page)
        await exchange.json(200, [{"id": f"message-{n}", "content": "x" * self.size} for n in ids])
        raise EndOfAnswerError


def poisoned_run(letta: FakeLetta, poison: Poison, conversation_id: str | None = None) -> FakeRun:
    """A run that is over: a ping, a chunk, the poisoned entry, two chunks, and the end. RUN in the poison is its id."""
    marked = {"message_type": "assistant_message", "content": MARK, "seq_id": None, "run_id": None}
    run = letta.new_run(conversation_id)
    run.say("before ")
    run.write(f"data: {compact(marked)}\n\n")
    run.say("after ")
    run.say("and more")
    run.complete()
    poison.on, poison.run_id, poison.times = "stream", run.id, None
    poison.sent = poison.sent.replace(b"RUN", run.id.encode())
    letta.faults.append(poison)
    return run


@dataclass
class StrangeRuns(Fault):
    """Serves runs whose ids no real server would give out: a chunk of each, and the end of those that are over."""

    on: Kind = "any"
    times: int | None = None
    runs: dict[str, FakeRun] = field(default_factory=dict)

    def add(self, letta: FakeLetta, run: FakeRun, run_id: str) -> None:
        """Let this run be listed under that id."""
        del letta.runs[run.id]
        run.id = run_id
        letta.runs[run_id] = self.runs[run_id] = run

    def matches(self, record: Request) -> bool:
        """Everything that is asked about a single run, in whatever way its id stands in the path."""
        return record.method == "POST" or record.path.removeprefix("/v1/runs/") not in {record.path, ""}

    async def begin(self, exchange: Exchange) -> None:
        """Stream a strange run; of its record and its messages the server knows nothing, and says so with its id."""
        self.fired += 1
        run = self.runs.get(run_id_in(exchange.record.body) or "")
        if run is None:
            await exchange.json(404, {"detail": f"Run not found: {exchange.record.path}"})
            raise EndOfAnswerError
        said = compact({"message_type": "assistant_message", "seq_id": 1, "run_id": run.id, "id": run.id})
        await exchange.event(f"data: {said}\n\n")
        if run.status == "running":
            await asyncio.Event().wait()  # until the client leaves
        await exchange.event("data: no JSON\n\ndata: [DONE]\n\n")
        raise EndOfAnswerError
