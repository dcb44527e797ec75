"""Agents that talk: scripts that keep FakeLetta's runs growing at a given pace, all kinds of them.

Used by demo.py and by the crash campaign (tests/torture). The same seed gives the same scripts.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun

Kind = Literal["text", "tool call", "failed", "cancelled", "repeated"]

KINDS: tuple[Kind, ...] = (
    "text",
    "tool call",
    "text",
    "failed",
    "tool call",
    "text",
    "cancelled",
    "tool call",
    "text",
    "repeated",
    "text",
    "tool call",
)
STEP = 5  # coprime to len(KINDS), so that every speaker goes through all kinds

# Besides ordinary words: what breaks a careless reader of event streams or of JSON.
WORDS = (
    *("The night train leaves at ten past nine and calls at every coast town on its way , " * 2).split(),
    *("naïve", "café", "☕", "東京", 'a "quoted" word', "two\nlines", "\u2028", "\x85", "\0", "data: [DONE]", "tab\t"),
)


@dataclass
class Speaker:
    """One conversation; without an id of its own it is its agent's (agent-direct)."""

    conversation_id: str | None
    agent_id: str
    chance: random.Random
    number: int
    runs: list[FakeRun] = field(default_factory=list)
    kind: Kind = "text"

    @property
    def id(self) -> str:
        """What it is watched by."""
        return self.conversation_id or self.agent_id


class Talk:
    """A number of conversations that go on, run after run, until they are told to finish."""

    def __init__(
        self,
        letta: FakeLetta,
        *,
        speakers: int,
        seed: int,
        chunks_per_second: float,
        longest: int,
        direct_every: int = 6,
    ) -> None:
        self.longest = longest
        self._letta = letta
        self._pause = speakers / chunks_per_second
        self._is_finishing = asyncio.Event()
        self.speakers = [self._new_speaker(number, seed, direct_every) for number in range(speakers)]

    async def speak(self) -> None:
        """Keep all of them talking; return when everyone has ended the run that was going on at `finish`."""
        async with asyncio.TaskGroup() as group:
            for speaker in self.speakers:
                group.create_task(self._converse(speaker))

    def finish(self) -> None:
        """Begin no more runs."""
        self._is_finishing.set()

    async def speak_at_once(self, speaker: Speaker) -> FakeRun:
        """Make a whole run in no time: one that was over before anybody looked."""
        return await self._speak_run(speaker, pause=0)

    @property
    def live_runs(self) -> list[FakeRun]:
        """The runs that have not ended yet."""
        return [run for speaker in self.speakers for run in speaker.runs[-1:] if run.status == "running"]

    def _new_speaker(self, number: int, seed: int, direct_every: int) -> Speaker:
        agent_id = self._letta.new_agent()
        is_direct = number % direct_every == direct_every - 1
        conversation_id = None if is_direct else self._letta.new_conversation(agent_id)
        return Speaker(conversation_id, agent_id, random.Random(f"{seed} {number}"), number)

    async def _converse(self, speaker: Speaker) -> None:
        await asyncio.sleep(speaker.chance.uniform(0, 1))
        while not self._is_finishing.is_set():
            await self._speak_run(speaker, self._pause)
            await asyncio.sleep(speaker.chance.uniform(0, 0.2))

    async def _speak_run(self, speaker: Speaker, pause: float) -> FakeRun:
        run = self._letta.new_run(speaker.conversation_id, speaker.agent_id)
        speaker.kind = KINDS[(speaker.number + STEP * len(speaker.runs)) % len(KINDS)]
        speaker.runs.append(run)
        length = speaker.chance.randint(self.longest // 3, self.longest - 10)
        if speaker.kind == "tool call":
            await self._use_tool(run, speaker.chance, pause, length // 4)
            length -= length // 4
        await self._say(run, speaker.chance, pause, length // 2)
        if speaker.kind == "repeated":
            # What redis-py does with a batch whose reply got lost: it writes it again, with the numbers it had.
            last = run.log[-1].seq_id
            run.repeat(max(1, last - 12), last)
        await self._say(run, speaker.chance, pause, length - length // 2)
        await self._end(run, speaker, pause)
        return run

    async def _use_tool(self, run: FakeRun, chance: random.Random, pause: float, length: int) -> None:
        for _ in range(length):
            run.think(f"{chance.choice(WORDS)} ")
            await self._wait(chance, pause)
        run.call_tool("timetable", '{"from":"Aberdeen","to":"Kirkwall"}')
        await self._wait(chance, 4 * pause)
        run.tool_return("21:10, 23:40")

    async def _say(self, run: FakeRun, chance: random.Random, pause: float, length: int) -> None:
        for _ in range(length):
            run.say(f"{chance.choice(WORDS)} ")
            await self._wait(chance, pause)

    async def _end(self, run: FakeRun, speaker: Speaker, pause: float) -> None:
        if speaker.kind == "failed":
            run.fail("the model's API answered 529: overloaded")
        elif speaker.kind == "cancelled":
            run.cancel()
            await self._wait(speaker.chance, 10 * pause)
            run.finish_cancel()
        else:
            run.complete()

    async def _wait(self, chance: random.Random, pause: float) -> None:
        """Tokens come in bursts: mostly at once after each other, sometimes after a while."""
        if pause and chance.random() < 0.25:
            await asyncio.sleep(min(chance.expovariate(0.25 / pause), 20 * pause))
