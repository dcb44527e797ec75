"""FakeLetta as a server under test. Used by conftest.py."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.behaviour.server import FAILED_ENDS, TOOL, TOOL_RESULT, Run, Script
from tests.real_letta.driver import Conversation

if TYPE_CHECKING:
    from datetime import datetime

    from tests.behaviour.differences import Difference
    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


class FakeServer:
    """Everything happens at once, and what the real server does in seconds takes hundredths of them."""

    def __init__(self, letta: FakeLetta) -> None:
        self.url = letta.url
        self.keepalive = letta.keepalive_interval
        self.silence = 0.5
        self._letta = letta

    async def new_conversation(self, agent_id: str | None = None, *, is_direct: bool = False) -> Conversation:
        """Make a conversation with a new agent or this one, or give an agent's own."""
        agent_id = agent_id or self._letta.new_agent()
        return Conversation(agent_id, None if is_direct else self._letta.new_conversation(agent_id))

    async def delete(self, where: Conversation) -> None:
        """Delete a conversation."""
        self._letta.delete_conversation(where.name)

    async def start(self, script: Script, where: Conversation | None = None) -> Run:
        """Play a script up to where it holds."""
        where = where or await self.new_conversation()
        run = self._letta.new_run(
            where.conversation_id, where.agent_id, background=script.background, pings=script.pings
        )
        self._think(run, script)
        if script.calls_tool:
            run.call_tool(TOOL)
            run.tool_return(TOOL_RESULT)
            self._think(run, script)
        for delta in script.deltas[: script.holds_after if script.fails_after is None else script.fails_after]:
            run.say(delta)
        if script.holds_after is None:
            self._end(run, script)
        return Run(run.id, where, script)

    async def go_on(self, run: Run) -> None:
        """Play the rest; of a cancelled run only the stored end is left."""
        fake = self._letta.runs[run.id]
        if fake.status == "cancelled":
            fake.finish_cancel()
            return
        for delta in run.script.deltas[run.script.holds_after :]:
            fake.say(delta)
        self._end(fake, run.script)

    async def set_created(self, run: Run, at: datetime) -> None:
        """Change when the run was created."""
        self._letta.runs[run.id].created_at = at

    async def lose(self, run: Run) -> None:
        """Lose the run's log."""
        self._letta.runs[run.id].forget()

    async def trim(self, run: Run, before: int) -> None:
        """Drop what is in front of this number from the log."""
        self._letta.runs[run.id].trim(before)

    async def repeat(self, run: Run, first: int, last: int) -> None:
        """Write these entries a second time."""
        self._letta.runs[run.id].repeat(first, last)

    async def redis_goes(self) -> None:
        """Take Redis away."""
        self._letta.redis = "down"

    async def redis_comes(self) -> None:
        """Bring Redis back, empty."""
        for run in self._letta.runs.values():
            run.forget()
        self._letta.redis = "up"

    async def restart(self, *, password: str | None = None, has_redis: bool = True) -> None:
        """Break every connection; runs that hold are never heard of again."""
        self._letta.password = password
        self._letta.redis = "up" if has_redis else "none"
        await self._letta.restart()

    async def readers(self) -> float:
        """How many streams are open, once the server has had time to notice who left."""
        await asyncio.sleep(self.silence)
        return self._letta.open_streams

    def own_answer(self, difference: Difference) -> object:
        """What this one of the two servers answers where they differ."""
        return difference.fake

    async def fail_to_start(self, where: Conversation) -> Run:
        """Make a run that fails before it begins."""
        run = self._letta.new_run(where.conversation_id, where.agent_id)
        run.fail_to_start("INTERNAL_SERVER_ERROR: Background streaming requires Redis to be running.")
        return Run(run.id, where, Script())

    def _think(self, run: FakeRun, script: Script) -> None:
        for number in range(1, script.thoughts + 1):
            run.think(f"think{number:06d} ")

    def _end(self, run: FakeRun, script: Script) -> None:
        if script.fails_after is None:
            run.complete()
        else:
            end = FAILED_ENDS[script.failure]
            run.fail(end.detail, stop_reasons=end.stop_reasons, error_type=end.error_type, message=end.message)
