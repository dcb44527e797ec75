"""Drives the Letta server as an application does, with its official client: agents, conversations, background runs."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from letta_client import APIStatusError, ConflictError, Letta, omit
from letta_client.types.agents import Run

from tests.real_letta.lab.processes import LabError

MODEL = "openai-proxy/fake-1"
ACTIVE = ("created", "running")
_BUSY_SECONDS = 60
_TOOL_SOURCE = '''
def roll_dice() -> str:
    """Roll one die.

    Returns:
        str: what was rolled
    """
    return "4"
'''


@dataclass(frozen=True)
class Conversation:
    """Where runs happen; `conversation_id` is None for an agent's own default conversation (agent-direct)."""

    agent_id: str
    conversation_id: str | None

    @property
    def name(self) -> str:
        """How the worker's configuration names it."""
        return self.conversation_id or self.agent_id


class Driver:
    """The application. Its methods may be called from several threads."""

    def __init__(self, url: str) -> None:
        # No retries: one that is repeated by itself could start a run twice.
        self._client = Letta(base_url=url, api_key="unused", max_retries=0, timeout=180)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def make_agent(self, *, with_tool: bool = False) -> str:
        """A new agent; with the tool `roll_dice` if wanted."""
        tools = [self._client.tools.upsert(source_code=_TOOL_SOURCE).id] if with_tool else []
        agent = self._client.agents.create(
            agent_type="letta_v1_agent", model=MODEL, include_base_tools=False, memory_blocks=[], tool_ids=tools
        )
        return agent.id

    def make_conversation(self, agent_id: str) -> Conversation:
        """A new named conversation with the agent."""
        return Conversation(agent_id, self._client.conversations.create(agent_id=agent_id).id)

    def start(self, where: Conversation, prompt: str, *, pings: bool = True, background: bool = True) -> str:
        """Start a run, drop the connection at its first event, and return its id; the run goes on by itself.

        While an earlier run of the conversation is under way the server answers 409: asked again until it is over.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._start(where, prompt, pings=pings, background=background)
            except ConflictError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def run(self, run_id: str) -> Run:
        """What the server says of a run."""
        return self._client.runs.retrieve(run_id)

    def run_ids(self, agent_ids: Iterable[str]) -> list[str]:
        """All runs of these agents that the server knows."""
        return [run.id for agent_id in agent_ids for run in self._client.runs.list(agent_id=agent_id, limit=1000).items]

    def messages(self, run_id: str) -> list[dict[str, Any]]:
        """What the server lists as the messages of a run, as it says it."""
        answer = self._client.runs.messages.with_raw_response.list(run_id, limit=1000, order="asc")
        listed: list[dict[str, Any]] = json.loads(answer.text())
        return listed

    def is_active(self, run_id: str) -> bool:
        """Whether the server says the run is not over."""
        return self.run(run_id).status in ACTIVE

    def wait(self, run_ids: Sequence[str], timeout: float = 120) -> None:
        """Return when the server says that all these runs are over."""
        deadline = time.monotonic() + timeout
        for run_id in run_ids:
            while self.is_active(run_id):
                if time.monotonic() > deadline:
                    raise LabError(f"{run_id} was not over after {timeout:.0f} s")
                time.sleep(0.2)

    def cancel(self, where: Conversation) -> None:
        """Cancel what is under way in a conversation."""
        if where.conversation_id is None:
            self._client.conversations.cancel("default", agent_id=where.agent_id)
        else:
            self._client.conversations.cancel(where.conversation_id)

    def _start(self, where: Conversation, prompt: str, *, pings: bool, background: bool) -> str:
        stream = self._client.conversations.messages.create(
            where.conversation_id or "default",
            agent_id=omit if where.conversation_id else where.agent_id,
            messages=[{"role": "user", "content": prompt}],
            streaming=True,
            background=background,
            stream_tokens=True,
            include_pings=pings,
        )
        run_id = None
        # A run that fails at once ends the stream with an error; it happened all the same.
        with stream, suppress(APIStatusError):
            for event in stream:
                run_id = getattr(event, "run_id", None)
                if run_id and background:
                    break
        return run_id or self._newest_run(where)

    def _newest_run(self, where: Conversation) -> str:
        listed = (
            self._client.runs.list(conversation_id=where.conversation_id, limit=1)
            if where.conversation_id
            else self._client.runs.list(agent_id=where.agent_id, limit=1)
        )
        return next(iter(listed)).id
