"""FakeLetta: a loopback server that behaves as letta 0.16.8 does on the wire, slips included.

``letta-ingest demo`` and the tests run the real client against it. It keeps runs (fake_run.py), answers
over HTTP (fake_routes.py, fake_stream.py), goes wrong on request (fake_faults.py) and remembers everything.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Self

from aiohttp import web

from worker.demo.fake_faults import EndOfAnswerError, Exchange, Fault, Request
from worker.demo.fake_routes import Refusal, find_route, with_other_slash
from worker.demo.fake_run import FakeRun, Ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.demo.fake_routes import Route

Paging = Literal["swapped", "named", "ignored"]
Redis = Literal["up", "down", "none"]

HOST = "127.0.0.1"


@dataclass(frozen=True)
class FakeConversation:
    """A conversation, which is little more than its id."""

    id: str
    agent_id: str
    created_at: datetime

    def as_json(self) -> dict[str, Any]:
        """Return it as GET /v1/conversations/ lists it."""
        created_at = self.created_at.isoformat().replace("+00:00", "Z")
        user = "user-00000000-0000-4000-8000-000000000000"
        return {
            "created_by_id": user,
            "last_updated_by_id": user,
            "created_at": created_at,
            "updated_at": created_at,
            "id": self.id,
            "agent_id": self.agent_id,
            "summary": None,
            "in_context_message_ids": [],
            "isolated_block_ids": [],
            "model": None,
            "model_settings": None,
            "last_message_at": None,
        }


class FakeLetta:
    """The server. Every setting is an attribute and may be changed while it runs."""

    def __init__(
        self,
        *,
        keepalive_interval: float = 20.0,
        honours_run_id: bool = True,
        paging: Paging = "swapped",
        password: str | None = None,
        redis: Redis = "up",
        version: str = "0.16.8",
        max_stream_silence: float = 1800.0,
        retention: timedelta = timedelta(hours=3),
        max_length: int = 10_000,
        cancel_check_interval: float = 0.5,
        seed: int | None = None,
    ) -> None:
        self.keepalive_interval = keepalive_interval
        self.honours_run_id = honours_run_id
        self.paging = paging
        self.password = password
        self.version = version
        self.max_stream_silence = max_stream_silence
        self.retention = retention
        self.max_length = max_length
        self.cancel_check_interval = cancel_check_interval
        self.ids = Ids(random.Random(seed))
        self.runs: dict[str, FakeRun] = {}
        self.conversations: dict[str, FakeConversation] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.open_streams = 0
        self.most_open_streams = 0
        self.abandoned_streams = 0
        self._redis: Redis = redis
        self._port = 0
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None

    # ---- the server's life ----

    async def __aenter__(self) -> Self:
        server = web.Server(self._handle, handler_cancellation=True, access_log=None, keepalive_timeout=5.0)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.start_listening()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_listening()
        await self.drop_connections()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The base URL; the port stays the same over stop_listening and start_listening."""
        return f"http://{HOST}:{self._port}"

    async def start_listening(self) -> None:
        """Accept connections, on the port of the last time if there was one."""
        if self._runner is None:
            raise RuntimeError("enter the server's context first")
        self._site = web.TCPSite(self._runner, HOST, self._port, reuse_address=True)
        await self._site.start()
        self._port = self._runner.addresses[0][1]

    async def stop_listening(self) -> None:
        """Refuse new connections; those that are open go on (see drop_connections)."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def drop_connections(self) -> None:
        """Abort every open connection, idle or in the middle of an answer."""
        if self._runner is None or self._runner.server is None:
            return
        for _ in range(5):  # a connection accepted just now is only known some turns of the loop later
            for connection in list(self._runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)

    async def restart(self) -> None:
        """Go away and come back on the same port; what Redis and the database hold is kept."""
        await self.stop_listening()
        await self.drop_connections()
        await self.start_listening()

    # ---- what it holds ----

    @property
    def redis(self) -> Redis:
        """Whether Redis is up, down, or was never configured."""
        return self._redis

    @redis.setter
    def redis(self, state: Redis) -> None:
        self._redis = state
        for run in self.runs.values():
            run.wake_readers()

    def new_agent(self) -> str:
        """Return the id of a new agent."""
        return self.ids.new("agent")

    def new_conversation(self, agent_id: str | None = None) -> str:
        """Make a conversation and return its id."""
        made = FakeConversation(self.ids.new("conv"), agent_id or self.new_agent(), datetime.now(UTC))
        self.conversations[made.id] = made
        return made.id

    def delete_conversation(self, conversation_id: str) -> None:
        """Delete a conversation: its runs stay, and so do their streams, but not their messages."""
        del self.conversations[conversation_id]
        for run in self.runs.values():
            run.is_deleted |= run.conversation_id == conversation_id

    def new_run(
        self,
        conversation_id: str | None = None,
        agent_id: str | None = None,
        *,
        background: bool = True,
        pings: bool = True,
        created_at: datetime | None = None,
        prompt: str = "hi",
    ) -> FakeRun:
        """Start a run in a conversation; without one it is agent-direct."""
        if agent_id is None and conversation_id in self.conversations:
            agent_id = self.conversations[conversation_id].agent_id
        run = FakeRun(
            self.ids,
            conversation_id=conversation_id,
            agent_id=agent_id or self.new_agent(),
            background=background,
            pings=pings,
            created_at=created_at or datetime.now(UTC),
            prompt=prompt,
            max_length=lambda: self.max_length,
        )
        self.runs[run.id] = run
        return run

    def is_expired(self, run: FakeRun) -> bool:
        """Tell whether the run's stream is refused for its age."""
        return run.created_at < datetime.now(UTC) - self.retention

    @contextmanager
    def counted_stream(self) -> Iterator[None]:
        """Count a stream as open; the real server goes on reading for one whose client left (abandoned)."""
        self.open_streams += 1
        self.most_open_streams = max(self.most_open_streams, self.open_streams)
        try:
            yield
        except asyncio.CancelledError:
            self.abandoned_streams += 1
            raise
        finally:
            self.open_streams -= 1

    # ---- answering ----

    async def _handle(self, wire: web.BaseRequest) -> web.StreamResponse:
        raw_body = await wire.read()
        query = {name: ",".join(wire.query.getall(name)) for name in wire.query}
        record = Request(wire.method, wire.path, query, parsed(raw_body))
        self.requests.append(record)
        exchange = Exchange(wire, record, raw_body)
        try:
            await self._answer(exchange)
        except (EndOfAnswerError, ConnectionError):
            pass  # the fault has had its way, or the client has left
        finally:
            record.closed_at = time.monotonic()
        return exchange.response or web.Response(status=500)

    async def _answer(self, exchange: Exchange) -> None:
        record = exchange.record
        found = find_route(record.path)
        if found is not None:
            route, item = found
            record.kind = route.kind
            record.run_id = item if item.startswith("run-") else run_id_in(record.body)
        exchange.fault = self._take_fault(record)
        if exchange.fault is not None:
            await exchange.fault.begin(exchange)
        try:
            await self._obey(exchange, found)
        except Refusal as refusal:
            await exchange.json(refusal.status, refusal.content)

    async def _obey(self, exchange: Exchange, found: tuple[Route, str] | None) -> None:
        if not self._lets_in(exchange):
            raise Refusal(401, "Unauthorized")
        if found is None:
            await self._redirect(exchange)
            return
        route, item = found
        if route.method != exchange.record.method:
            raise Refusal(405, "Method Not Allowed")
        await route.handle(self, exchange, item)

    def _take_fault(self, record: Request) -> Fault | None:
        for fault in self.faults:
            if fault.matches(record):
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                return fault
        return None

    def _lets_in(self, exchange: Exchange) -> bool:
        if self.password is None or exchange.record.path == "/v1/health/":
            return True
        headers = exchange.wire.headers
        return (
            headers.get("Authorization") == f"Bearer {self.password}"
            or headers.get("X-BARE-PASSWORD") == f"password {self.password}"
        )

    async def _redirect(self, exchange: Exchange) -> None:
        other = with_other_slash(exchange.record.path)
        if find_route(other) is None:
            raise Refusal(404, "Not Found")
        query = f"?{exchange.wire.query_string}" if exchange.wire.query_string else ""
        await exchange.start(307, {"location": f"http://{exchange.wire.host}{other}{query}"}, 0)


def parsed(raw_body: bytes) -> Any:
    """Return the JSON value of a body, or its text if it is none; None for no body."""
    if not raw_body:
        return None
    try:
        return json.loads(raw_body)
    except ValueError:
        return raw_body.decode(errors="replace")


def run_id_in(body: object) -> str | None:
    """Return the run a request's body names."""
    run_id = body.get("run_id") if isinstance(body, dict) else None
    return run_id if isinstance(run_id, str) else None
