"""The real server of the lab as a server under test. Used by conftest.py."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Any, cast

import httpx
import redis

from tests.behaviour.server import TOOL, Run, Script
from tests.real_letta.driver import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tests.behaviour.differences import Difference
    from tests.real_letta.driver import Driver
    from tests.real_letta.lab.lab import Lab

LONGEST_RUN_SECONDS = 300  # on a busy machine


class RealServer:
    """Things happen as the lab's model says, and in Redis and PostgreSQL behind the server's back."""

    def __init__(self, lab: Lab, driver: Driver) -> None:
        self.url = lab.letta.url
        self.keepalive = 1.0
        self.silence = 2.5
        self._lab = lab
        self._driver = driver
        self._redis = redis.Redis(port=lab.redis.port, decode_responses=True)
        self._names = itertools.count(time.time_ns())
        self._holds: dict[str, str] = {}
        self._foreground: list[asyncio.Task[str]] = []
        self._headers: dict[str, str] = {}
        self._is_altered = False

    async def close(self) -> None:
        """Let everything go on that still holds, and leave the server as it was found."""
        if self._is_altered:
            await self.restart()
        for name in self._holds.values():
            await self._release(name)
        await asyncio.gather(*self._foreground)
        self._redis.close()

    async def new_conversation(self, agent_id: str | None = None, *, is_direct: bool = False) -> Conversation:
        """Make a conversation with a new agent or this one, or give an agent's own."""
        agent_id = agent_id or await asyncio.to_thread(self._driver.make_agent, with_tool=True)
        if is_direct:
            return Conversation(agent_id, None)
        return await asyncio.to_thread(self._driver.make_conversation, agent_id)

    async def delete(self, where: Conversation) -> None:
        """Delete a conversation."""
        async with self._client() as client:
            (await client.delete(f"/v1/conversations/{where.conversation_id}")).raise_for_status()

    async def start(self, script: Script, where: Conversation | None = None) -> Run:
        """Play a script up to where it holds."""
        where = where or await self.new_conversation()
        # An unfinished run locks its conversation; 300 s after a crash the lock goes by itself.
        self._redis.delete(f"conversation:lock:{where.conversation_id}")
        name = f"hold{next(self._names)}"
        starting = asyncio.create_task(
            asyncio.to_thread(
                self._driver.start,
                where,
                prompt_of(script, name),
                pings=script.pings,
                background=script.background,
            )
        )
        if script.background:
            run = Run(await starting, where, script)
        else:
            self._foreground.append(starting)
            run = Run(await self._foreground_run(where) if script.holds_after else await starting, where, script)
        if script.holds_after is None:
            await self._wait_until_over(run)
        else:
            self._holds[run.id] = name
            said = script.pings + script.thoughts + script.holds_after
            await self._wait(lambda: not script.background or self._redis.xlen(key_of(run)) >= said)
        return run

    async def go_on(self, run: Run) -> None:
        """Let the model go on."""
        await self._release(self._holds.pop(run.id))
        await self._wait_until_over(run)

    async def set_created(self, run: Run, at: datetime) -> None:
        """Change when the run was created."""
        statement = f"UPDATE runs SET created_at = '{at.isoformat()}' WHERE id = '{run.id}'"
        await asyncio.to_thread(self._lab.postgres.execute, self._lab.letta.database, statement)

    async def lose(self, run: Run) -> None:
        """Lose the run's log."""
        assert self._redis.delete(key_of(run))

    async def trim(self, run: Run, before: int) -> None:
        """Drop what is in front of this number from the log."""
        for entry, fields in self._entries(run):
            if int(fields["seq_id"]) == before:
                self._redis.xtrim(key_of(run), minid=entry, approximate=False)
                return

    async def repeat(self, run: Run, first: int, last: int) -> None:
        """Write these entries a second time."""
        for _, fields in self._entries(run):
            if first <= int(fields["seq_id"]) <= last:
                self._redis.xadd(key_of(run), cast("Any", fields))

    async def redis_goes(self) -> None:
        """Kill Redis."""
        self._lab.redis.kill()

    async def redis_comes(self) -> None:
        """Start Redis, empty."""
        self._lab.redis.start()

    async def restart(self, *, password: str | None = None, has_redis: bool = True) -> None:
        """SIGKILL it and start it with these settings."""
        settings = {} if password is None else {"LETTA_SERVER_SECURE": "true", "LETTA_SERVER_PASSWORD": password}
        settings |= {} if has_redis else {"LETTA_REDIS_HOST": ""}
        self._headers = {} if password is None else {"Authorization": f"Bearer {password}"}
        self._is_altered = bool(settings)
        self._lab.letta.kill()
        self._lab.letta.start(settings)

    def own_answer(self, difference: Difference) -> object:
        """What this one of the two servers answers where they differ."""
        return difference.real

    async def fail_to_start(self, where: Conversation) -> Run:
        """Ask for a run that fails before it begins."""
        body = {"messages": [{"role": "user", "content": "hi"}], "streaming": True, "background": True}
        async with self._client() as client:
            answer = await client.post(f"/v1/conversations/{where.conversation_id}/messages", json=body)
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            (run,) = (await client.get("/v1/runs/", params={"conversation_id": where.name, "limit": 1})).json()
        return Run(run["id"], where, Script())

    async def readers(self) -> float:
        """How many readers look into Redis, by how often they do in a second."""
        before = self._count_of_reads()
        await asyncio.sleep(1)
        return (self._count_of_reads() - before) / 10

    async def _foreground_run(self, where: Conversation) -> str:
        """The run of a conversation whose start is not answered before the run is over."""
        async with asyncio.timeout(LONGEST_RUN_SECONDS), self._client() as client:
            while True:
                listed = (await client.get("/v1/runs/", params={"conversation_id": where.name, "active": True})).json()
                if listed:
                    return str(listed[0]["id"])
                await asyncio.sleep(0.05)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=60, trust_env=False)

    async def _wait_until_over(self, run: Run) -> None:
        if run.script.background:
            await self._wait(lambda: self._has_second_end(run))
        await asyncio.to_thread(self._driver.wait, [run.id])

    def _has_second_end(self, run: Run) -> bool:
        """Whether the server has appended the [DONE] that comes a moment after the log's end, under number 1."""
        newest = cast("list[tuple[str, dict[str, str]]]", self._redis.xrevrange(key_of(run), count=1))
        return bool(newest) and newest[0][1].get("complete") == "true" and newest[0][1]["seq_id"] == "1"

    async def _wait(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(LONGEST_RUN_SECONDS):
            while not await asyncio.to_thread(is_so):  # noqa: ASYNC110 - it happens in the server
                await asyncio.sleep(0.05)

    async def _release(self, name: str) -> None:
        async with self._client() as client:
            await client.post(f"http://127.0.0.1:{self._lab.model.port}/go_on/{name}")

    def _count_of_reads(self) -> int:
        stats = cast("dict[str, dict[str, int]]", self._redis.info("commandstats"))
        return stats.get("cmdstat_xrange", {}).get("calls", 0)

    def _entries(self, run: Run) -> list[tuple[str, dict[str, str]]]:
        return cast("list[tuple[str, dict[str, str]]]", self._redis.xrange(key_of(run)))


def key_of(run: Run) -> str:
    """Where the server keeps the log of a run."""
    return f"sse:run:{run.id}"


def prompt_of(script: Script, hold: str) -> str:
    """The directives of lab/fake_llm.py that play a script."""
    directives = {
        "n": script.words,
        "delay": 0,
        "think": script.thoughts or None,
        "tool": TOOL if script.calls_tool else None,
        "text": None if script.text is None else script.text.encode("unicode_escape").decode(),
        "hold": None if script.holds_after is None else f"{hold}@{script.holds_after}",
    }
    if script.fails_after is not None:
        failing = {"fail": script.fails_after, "failmode": script.failure}
        directives |= {"text": r"\ud83d"} if script.failure == "surrogate" else failing
    return " ".join(f"[{name}={value}]" for name, value in directives.items() if value is not None)
