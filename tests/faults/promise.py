"""The promise as a machine: all that can happen to a server and to two workers on one database, in any order.

Used by test_promise.py. The rules act on a FakeLetta and on whole workers (promise_life.py) in one event loop, which
runs only while a rule does; after each rule what is stored is compared with the server's logs (promise_oracle.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.faults.promise_life import Life, Moment
from tests.faults.promise_oracle import GARBAGE, Oracle, Picture, looking
from tests.faults.promise_server import AgeingLetta, Ending, Talk, Unreadable
from tests.support.rig import until
from worker.demo.fake_faults import Answer, Cut, EndEarly, Fault, ReaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

WORKERS = 2
MOST_RUNS = 4
WAIT_SECONDS = 15.0
"""What takes hundredths of a second may take so long on a busy machine; longer, and the workers are stuck."""

UNREADABLE: list[Unreadable] = ["no JSON", "no object", "absurd number", "other run"]
ENDINGS: list[Ending] = ["completed", "completed twice", "failed", "failed at its start", "cancelled", "orphaned"]
MOMENTS: list[Moment] = ["in a transaction", "before its commit", "after its commit"]
TROUBLES = ["restarted", "away", "without Redis"]

which = st.integers(0, 7)
"""One of those there are."""
worker = st.integers(0, WORKERS - 1)
stream = st.just("stream")
faults = st.one_of(
    st.builds(Cut, after_bytes=st.integers(0, 3000), on=stream),
    st.builds(EndEarly, after_events=st.integers(0, 6), on=stream),
    st.builds(ReaderError, after_events=st.integers(1, 6), on=stream),
    st.builds(Answer, status=st.sampled_from([500, 503, 429]), on=st.sampled_from(["stream", "runs", "run"])),
    st.builds(Answer, st.just(200), st.just(GARBAGE), content_type=st.just("text/event-stream"), on=stream),
)


def is_open(talk: Talk) -> bool:
    """Its agent goes on writing."""
    return talk.is_open


def has_stream(talk: Talk) -> bool:
    """The server has something of it."""
    return bool(talk.run.log)


def is_half_cancelled(talk: Talk) -> bool:
    """It is called cancelled, and its stored end is still to come."""
    return talk.run.status == "cancelled" and has_stream(talk) and not talk.has_end


def is_young(talk: Talk) -> bool:
    """It has not expired."""
    return not talk.letta.is_expired(talk.run)


def _whenever(wanted: Callable[[Talk], object], least: int = 1) -> Any:
    """A rule for when there are so many such runs."""
    return precondition(lambda machine: sum(1 for talk in machine.talks.values() if wanted(talk)) >= least)


@dataclass
class Campaign:
    """All examples of one test: where each finds an empty database, and how often what happened in all of them."""

    databases: Iterator[str]
    tally: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return "\n".join(f"{count:7} {what}" for what, count in sorted(self.tally.items()))


class Promise(RuleBasedStateMachine):
    """One example: a server, two workers and their database."""

    def __init__(self, campaign: Campaign) -> None:
        super().__init__()
        self.tally = campaign.tally
        self.tally["examples"] += 1
        self.url = next(campaign.databases)
        self.talks: dict[str, Talk] = {}
        self.oracle = Oracle(self.talks)
        self.lives: list[Life | None] = [None] * WORKERS
        self.faults: list[Fault] = []
        self.is_broken = False
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()

    @initialize(
        honours_run_id=st.booleans(),
        new=st.lists(st.integers(0, 6), min_size=1, max_size=2),
        old=st.lists(st.sampled_from(["completed", "failed", "orphaned"]), max_size=1),
        streams=st.sampled_from([16, 2, 1]),
        batch=st.sampled_from([1000, 2]),
    )
    def begin(self, *, honours_run_id: bool, new: list[int], old: list[Ending], streams: int, batch: int) -> None:
        """A server with or without a past, and two workers that start at once."""
        self.letta = AgeingLetta(
            keepalive_interval=0.05, cancel_check_interval=0.01, honours_run_id=honours_run_id, seed=1
        )
        self.conversation = self.letta.new_conversation()
        self.settings = {"max_streams": streams, "batch_size": batch}
        for ending in old:
            talk = self._new_talk(created_at=datetime.now(UTC) - timedelta(hours=4))
            talk.say(2)
            talk.end(ending)
        for count in new:
            self._new_talk().say(count)
        self.do(self._begin())

    async def _begin(self) -> None:
        await self.stack.enter_async_context(self.letta)
        await self._revive()
        self.look = await self.stack.enter_async_context(looking(self.url))

    # ---- the server ----

    @precondition(lambda self: len(self.talks) < MOST_RUNS)
    @rule(pings=st.booleans(), count=st.integers(0, 6))
    def start_run(self, *, pings: bool, count: int) -> None:
        """A run begins."""
        self._new_talk(pings=pings).say(count)
        self._did("run started")

    @rule(which=which, count=st.integers(1, 8))
    def say(self, which: int, count: int) -> None:
        """Chunks are written, one after the other."""
        self.do(self._say(self._open_talk(which), count))
        self._count("chunks written")

    async def _say(self, talk: Talk, count: int) -> None:
        for _ in range(count):
            talk.say(1)
            await asyncio.sleep(0.001)

    @rule(which=which, kind=st.sampled_from(UNREADABLE))
    def garble(self, which: int, kind: Unreadable) -> None:
        """An entry is written that can be no row."""
        self._open_talk(which).garble(kind)
        self._did(f"unreadable: {kind}")

    @rule(which=which, length=st.integers(0, 5))
    def repeat(self, which: int, length: int) -> None:
        """A batch is written twice."""
        self._open_talk(which).repeat(length)
        self._did("chunks doubled")

    @_whenever(Talk.losable)
    @rule(which=which, choice=which)
    def lose(self, which: int, choice: int) -> None:
        """Readers skip a chunk."""
        self._pick(which, Talk.losable).lose(choice)
        self._did("chunk lost")

    @_whenever(Talk.returnable)
    @rule(which=which)
    def give_back(self, which: int) -> None:
        """A chunk that was skipped is there after all."""
        self._pick(which, Talk.returnable).give_back()
        self._did("chunk late")

    @_whenever(Talk.sendable)
    @rule(which=which)
    def send_late(self, which: int) -> None:
        """A chunk that was skipped comes behind later ones."""
        self._pick(which, Talk.sendable).send_late()
        self._did("chunks reordered")

    @_whenever(Talk.trimmable)
    @rule(which=which, choice=which)
    def trim(self, which: int, choice: int) -> None:
        """The head of a stream is dropped."""
        self._pick(which, Talk.trimmable).trim(choice)
        self._did("stream trimmed")

    @_whenever(has_stream, least=2)
    @rule(which=which)
    def forget(self, which: int) -> None:
        """A whole stream is lost."""
        self._pick(which, has_stream).forget()
        self._did("stream lost")

    @rule(which=which, ending=st.sampled_from(ENDINGS))
    def end(self, which: int, ending: Ending) -> None:
        """A run ends, or its server dies and never ends it."""
        self._open_talk(which).end(ending)
        self._did(f"run {ending}")

    @_whenever(is_half_cancelled)
    @rule(which=which)
    def finish_cancel(self, which: int) -> None:
        """A cancelled run gets its stored end."""
        self._pick(which, is_half_cancelled).finish_cancel()
        self._did("cancelled run ended")

    @_whenever(is_young, least=2)
    @rule(which=which)
    def expire(self, which: int) -> None:
        """A run grows too old to be served; whoever reads it already is served on."""
        self.letta.expired.add(self._pick(which, is_young).run.id)
        self._did("run expired")

    @rule(trouble=st.sampled_from(TROUBLES))
    def restart(self, trouble: str) -> None:
        """The server, or its Redis, goes away and comes back with all it had."""
        self.do(self._restart(trouble))
        self._count(f"server {trouble}")

    async def _restart(self, trouble: str) -> None:
        if trouble == "without Redis":
            self.letta.redis = "down"
            await asyncio.sleep(0.01)
            self.letta.redis = "up"
            return
        await self.letta.stop_listening()
        await self.letta.drop_connections()
        await asyncio.sleep(0.01 if trouble == "away" else 0)
        await self.letta.start_listening()

    @rule(fault=faults)
    def break_off(self, fault: Fault) -> None:
        """An answer goes wrong, the next of its kind."""
        self.letta.faults.append(fault)
        self.faults.append(fault)
        self.do()

    # ---- the workers ----

    @rule()
    def revive(self) -> None:
        """Workers that do not live are started again."""
        self.do(self._revive())

    async def _revive(self, **settings: int) -> None:
        for place, life in enumerate(self.lives):
            if life is None:
                begun = self.lives[place] = Life(self.letta, self.url, self.tally, **(settings or self.settings))
                await begun.start()
                self._count("worker started")

    @rule(worker=worker, seconds=st.sampled_from([0.01, 0.0, 0.003, 0.03]), again=st.booleans())
    def kill(self, worker: int, seconds: float, *, again: bool) -> None:
        """A worker dies wherever it is, and is perhaps started again at once."""
        self.do(self._kill(worker, seconds))
        if again:
            self.revive()

    async def _kill(self, worker: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if life := self.lives[worker]:
            await life.kill()

    @rule(which=which, worker=worker, moment=st.sampled_from(MOMENTS), countdown=st.integers(0, 3), again=st.booleans())
    def kill_storing(self, which: int, worker: int, moment: Moment, countdown: int, *, again: bool) -> None:
        """A worker dies at this moment of a transaction, while chunks are written."""
        self.revive()
        self.do(self._kill_storing(self._open_talk(which), worker, moment, countdown))
        if again:
            self.revive()

    async def _kill_storing(self, talk: Talk, worker: int, moment: Moment, countdown: int) -> None:
        if life := self.lives[worker]:
            life.doom(moment, countdown)
            for _ in range(10):  # if it has not come to a transaction by then, death comes in a later step
                if not life.is_dying:
                    await self._say(talk, 1)
                    await asyncio.sleep(0.004)

    @rule(worker=worker, again=st.booleans())
    def stop(self, worker: int, *, again: bool) -> None:
        """A worker is stopped politely, and is perhaps started again at once."""
        if life := self.lives[worker]:
            self.do(life.stop())
            self._count("worker stopped")
        if again:
            self.revive()

    @rule(seconds=st.sampled_from([0.002, 0.01, 0.03]))
    def let_pass(self, seconds: float) -> None:
        """Nothing happens for a moment."""
        self.do(asyncio.sleep(seconds))

    @rule()
    def catch_up(self) -> None:
        """The workers that live get all that can be had, unless death comes first."""
        self.do(self._until(lambda now: not any(self.lives) or not self.oracle.owed(now)))
        self._count("workers caught up", did=any(self.lives))

    # ---- one step ----

    def do(self, what: Coroutine[Any, Any, object] | None = None) -> None:
        """Let the world go on: until this is done, or for a moment."""
        try:
            self.runner.run(self._do(what))
        except BaseException as error:
            self.is_broken = True
            error.add_note(self._story())
            raise

    async def _do(self, what: Coroutine[Any, Any, object] | None) -> None:
        await (asyncio.sleep(0.004) if what is None else what)
        await self._reap()

    async def _reap(self) -> None:
        for place, life in enumerate(self.lives):
            if life is not None:
                if life.is_dying:
                    await life.bury()
                life.check()
                if life.is_over:
                    self.lives[place] = None

    async def _until(self, is_so: Callable[[Picture], bool]) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not is_so(await self.look()):
                    await asyncio.sleep(0.01)
                    await self._reap()
        except TimeoutError:
            raise AssertionError(f"promise 1: nobody gets on with {self.oracle.owed(await self.look())}") from None

    @invariant()
    def holds(self) -> None:
        """Everything that must hold at any time does (I1 to I6)."""
        self.do(self._check())

    async def _check(self) -> None:
        now = await self.look()
        self.oracle.check(now)
        followed = [life.followed for life in self.lives if life]
        self._count("both workers at one run", did=len(followed) > 1 and set.intersection(*followed))
        for stored in now.values():
            self._count(f"state {stored.state}")
            self._count("gap", did=stored.open_gaps)
            self._count("gap closed again", did=len(stored.gaps) > len(stored.open_gaps))
            self._count("reject", did=stored.rejects)

    # ---- the end ----

    def teardown(self) -> None:
        """The server recovers, two new workers do what can still be done, and everything is compared."""
        try:
            if self.talks and not self.is_broken:
                self.do(self._finish())
        finally:
            self.runner.run(self._leave())
            self.runner.close()

    async def _finish(self) -> None:
        for place, life in enumerate(self.lives):
            if life:
                await life.kill()
                self.lives[place] = None
        self.letta.faults.clear()
        for talk in self.talks.values():
            if talk.is_open:
                talk.end("completed")
            elif talk.run.status == "running":
                self.letta.expired.add(talk.run.id)
        await self._revive(max_streams=16, batch_size=1000)
        await self._until(lambda now: all(run_id in now and now[run_id].is_settled for run_id in self.talks))
        for life in self.lives:
            if life:
                await life.stop()
        now = await self.look()
        self.oracle.check(now)
        self.oracle.check_end(now)
        for fault in self.faults:
            self._count(f"answer: {type(fault).__name__}", did=fault.fired)

    async def _leave(self) -> None:
        for life in self.lives:
            if life and not life.is_over:
                await life.kill()
        await self.stack.aclose()
        # SQLite closes the connections of the dead in threads of their own, which tell this loop when they are done.
        await until(lambda: not any("_connection_worker" in thread.name for thread in threading.enumerate()))

    # ---- what the rules share ----

    def _new_talk(self, *, created_at: datetime | None = None, pings: bool = True) -> Talk:
        talk = Talk(self.letta, self.letta.new_run(self.conversation, created_at=created_at, pings=pings))
        self.talks[talk.run.id] = talk
        return talk

    def _open_talk(self, which: int) -> Talk:
        return self._pick(which, is_open) if any(map(is_open, self.talks.values())) else self._new_talk()

    def _pick(self, which: int, wanted: Callable[[Talk], object]) -> Talk:
        found = [talk for talk in self.talks.values() if wanted(talk)]
        return found[which % len(found)]

    def _did(self, what: str) -> None:
        self._count(what)
        self.do()

    def _count(self, what: str, *, did: object = True) -> None:
        if did:
            self.tally[what] += 1

    def _story(self) -> str:
        """What led here, for whoever has to find out why."""
        lines = [f"{self.settings}, honours_run_id={self.letta.honours_run_id}"]
        for talk in self.talks.values():
            lines.append(f"{talk.run!r}, open={talk.is_open}, expired={not is_young(talk)}")
            lines += [f"    {entry.seq_id} {entry.payload[-150:] if entry.data else 'lost'}" for entry in talk.run.log]
        for place, life in enumerate(self.lives):
            lines += [f"worker {place}: {line}" for line in life.last_lines] if life else []
        return "\n".join(lines)
