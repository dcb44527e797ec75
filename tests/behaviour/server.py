"""A Letta server under test: what the behaviour suite asks of one, besides what it says over HTTP.

FakeLetta (fake_server.py) and the real server (real_server.py) are both one, so that every test runs on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from datetime import datetime

    from tests.behaviour.differences import Difference
    from tests.real_letta.driver import Conversation

TOOL = "roll_dice"
TOOL_RESULT = "4"

Failure = Literal["error", "close", "status", "surrogate"]


@dataclass(frozen=True)
class FailedEnd:
    """How the log of a failed run ends."""

    stop_reasons: tuple[str, ...]
    detail: str
    error_type: str = "internal_error"
    message: str = "An error occurred during agent execution."


FAILED_ENDS: dict[Failure, FailedEnd] = {
    "error": FailedEnd(("error", "llm_api_error"), "INVALID_ARGUMENT: OpenAI API error: fake failure"),
    "close": FailedEnd(
        ("error", "llm_api_error"),
        "INTERNAL_SERVER_ERROR: Connection error during OpenAI streaming: peer closed connection without sending"
        " complete message body (incomplete chunked read)",
    ),
    "status": FailedEnd(
        ("llm_api_error",),
        "INTERNAL_SERVER_ERROR: OpenAI API error: Error code: 500 - "
        "{'error': {'message': 'fake failure', 'type': 'server_error'}}",
        "llm_error",
        "An error occurred with the LLM request.",
    ),
    "surrogate": FailedEnd(
        ("error",),
        "Error serializing to JSON: UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud83d' in position 0:"
        " surrogates not allowed",
        message="An unknown error occurred with the LLM streaming request.",
    ),
}
"""What the server makes of a model that sends an error, hangs up, answers 500, or says half a character."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens in a run: thoughts, perhaps a tool call, then the words tok000001, tok000002 ..., one a chunk.

    `text` is said in place of the words, one character a chunk. `holds_after` so many words the model says nothing
    until the run is told to go on; `fails_after` so many it fails.
    """

    words: int = 4
    thoughts: int = 0
    text: str | None = None
    calls_tool: bool = False
    fails_after: int | None = None
    failure: Failure = "error"
    holds_after: int | None = None
    pings: bool = True
    background: bool = True

    @property
    def deltas(self) -> list[str]:
        """What is said, chunk by chunk."""
        return [f"tok{number:06d} " for number in range(1, self.words + 1)] if self.text is None else list(self.text)


@dataclass(frozen=True)
class Run:
    """A run that was started on the server."""

    id: str
    where: Conversation
    script: Script

    @property
    def stream(self) -> str:
        """The path of its own stream endpoint."""
        return f"/v1/runs/{self.id}/stream"


class LettaUnderTest(Protocol):
    """A server, and whatever makes things happen in it."""

    url: str
    keepalive: float
    """Seconds between two keepalive pings."""
    silence: float
    """A request that says nothing for so many seconds is taken to say nothing for ever."""

    async def new_conversation(self, agent_id: str | None = None, *, is_direct: bool = False) -> Conversation:
        """Make a conversation with a new agent or this one, or give an agent's own."""
        ...

    async def delete(self, where: Conversation) -> None:
        """Delete a conversation."""
        ...

    async def start(self, script: Script, where: Conversation | None = None) -> Run:
        """Start a run; returns once its log holds all there is before it is told to go on."""
        ...

    async def go_on(self, run: Run) -> None:
        """Let a run that holds come to its end; returns once its log has it."""
        ...

    async def set_created(self, run: Run, at: datetime) -> None:
        """Change when the run was created."""
        ...

    async def lose(self, run: Run) -> None:
        """Lose the run's log."""
        ...

    async def trim(self, run: Run, before: int) -> None:
        """Drop what is in front of this number from the log."""
        ...

    async def repeat(self, run: Run, first: int, last: int) -> None:
        """Write these entries a second time, as happens when the answer to a write gets lost."""
        ...

    async def redis_goes(self) -> None:
        """Take Redis away."""
        ...

    async def redis_comes(self) -> None:
        """Bring Redis back, empty."""
        ...

    async def restart(self, *, password: str | None = None, has_redis: bool = True) -> None:
        """Kill the server in the middle of whatever it does, and start it with these settings."""
        ...

    async def readers(self) -> float:
        """How many streams the server works for at the moment, whether or not somebody still listens."""
        ...

    def own_answer(self, difference: Difference) -> object:
        """What this one of the two servers answers where they differ."""
        ...

    async def fail_to_start(self, where: Conversation) -> Run:
        """Ask a server without Redis for a run, which fails before it begins."""
        ...
