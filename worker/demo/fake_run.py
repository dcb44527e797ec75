"""One run of FakeLetta: its log as the real server keeps it in Redis, and the script that fills it.

Used by fake_letta.py, which makes runs, by fake_stream.py and fake_routes.py, which serve them, and by every
test that scripts a run.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

Status = Literal["created", "running", "completed", "failed", "cancelled"]

REQUEST_CONFIG = {
    "use_assistant_message": True,
    "assistant_message_tool_name": "send_message",
    "assistant_message_tool_kwarg": "message",
    "include_return_message_types": None,
}


def compact(value: object) -> str:
    """Render JSON as the server does: no spaces, raw UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Ids:
    """Makes ids of the real shape; seedable, so that a demo can be repeated."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def uuid(self) -> str:
        """A version 4 UUID."""
        return str(uuid.UUID(int=self._source.getrandbits(128), version=4))

    def new(self, kind: str) -> str:
        """An id such as ``run-<uuid4>``."""
        return f"{kind}-{self.uuid()}"

    def part_of(self, message_id: str, index: int) -> str:
        """The otid of a message's part: the message's uuid with its last 7 bits replaced by the index."""
        number = uuid.UUID(message_id.removeprefix("message-")).int
        return str(uuid.UUID(int=(number & ~0x7F) | index))


def this_second() -> str:
    """Return the date of a chunk: whole seconds, with a zone."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()


def message_head(
    kind: str,
    identity: str,
    run_id: str,
    *,
    otid: str | None = None,
    step_id: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Return the fields every message and ping begins with, in the server's order."""
    return {
        "id": identity,
        "date": this_second(),
        "name": name,
        "message_type": kind,
        "otid": otid,
        "sender_id": None,
        "step_id": step_id,
        "is_err": None,
        "seq_id": None,
        "run_id": run_id,
    }


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a run's log. ``index`` is its place in the Redis stream and is never reused."""

    index: int
    seq_id: int
    data: str
    complete: bool

    @property
    def payload(self) -> str:
        """What follows ``data: `` in the stored text."""
        lines = [line for line in self.data.split("\n") if line.startswith("data:")]
        return "\n".join(line.removeprefix("data:").removeprefix(" ") for line in lines)


@dataclass(slots=True)
class Part:
    """One message as REST lists it once the run is over, and the deltas it was streamed in."""

    message: dict[str, Any]
    text_field: str | None = None
    deltas: list[str] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """Return the stored message: deltas joined, U+0000 dropped as PostgreSQL cannot hold it."""
        if self.text_field is None:
            return dict(self.message)
        return self.message | {self.text_field: "".join(self.deltas).replace("\0", "")}


class FakeRun:
    """A run under script control. Every verb writes to the log at once and wakes its readers."""

    def __init__(
        self,
        ids: Ids,
        *,
        conversation_id: str | None,
        agent_id: str,
        background: bool,
        pings: bool,
        created_at: datetime,
        prompt: str,
        max_length: Callable[[], int],
    ) -> None:
        self.id = ids.new("run")
        self.conversation_id = conversation_id
        self.agent_id = agent_id
        self.background = background
        self.created_at = created_at
        self.completed_at: datetime | None = None
        self.status: Status = "running"
        self.ended_with: str | None = None
        self.is_deleted = False
        """Its conversation was: then its messages are gone, but neither its record nor its stream."""
        self.metadata: dict[str, Any] = {
            "run_type": "send_conversation_message" if conversation_id else "send_message",
        }
        self.log: list[Entry] = []
        self.history: list[Entry] = []
        self.grown = asyncio.Event()
        self._ids = ids
        self._max_length = max_length
        self._removed = 0
        self._next_seq_id = 1
        self._step_ids = [ids.new("step")]
        self._message_id = ids.new("message")
        self._parts: list[Part] = []
        self._tool_call_id = ""
        self._tool_name = ""
        user = message_head("user_message", ids.new("message"), self.id, otid=ids.uuid(), step_id=self._step_ids[0])
        self._prompt: dict[str, Any] = user | {"content": prompt}
        if pings:
            self.write_json(message_head("ping", ids.new("ping"), self.id))

    def __repr__(self) -> str:
        return f"<FakeRun {self.id} {self.status}, {len(self.log)} entries>"

    # ---- the script: what the agent does ----

    def think(self, text: str) -> int:
        """Stream one delta of a reasoning message."""
        return self._delta(
            "reasoning_message", "reasoning", text, source="reasoner_model", reasoning=text, signature=None
        )

    def say(self, text: str) -> int:
        """Stream one delta of an assistant message."""
        return self._delta("assistant_message", "content", text, content=text)

    def call_tool(self, name: str, arguments: str = "{}") -> int:
        """Stream a whole tool call; in the stored message ``tool_calls`` is a list, in the chunk an object."""
        self._tool_name, self._tool_call_id = name, f"call_{self._ids.uuid().replace('-', '')[:20]}"
        call = {"name": name, "arguments": arguments, "tool_call_id": self._tool_call_id}
        head = self._part_head("tool_call_message")
        self._parts.append(Part(head | {"tool_call": call, "tool_calls": [call]}))
        return self.write_json(head | {"tool_call": call, "tool_calls": call})

    def tool_return(self, value: str, status: str = "success") -> int:
        """Stream the answer to the last tool call; what follows belongs to the next step."""
        own = self._ids.new("message")
        result: dict[str, Any] = {"tool_return": value, "status": status, "tool_call_id": self._tool_call_id}
        result |= {"stdout": [], "stderr": []}
        head = message_head(
            "tool_return_message",
            own,
            self.id,
            otid=self._ids.part_of(own, 0),
            step_id=self._step_ids[-1],
            name=self._tool_name,
        )
        message = head | result | {"tool_returns": [{"type": "tool"} | result]}
        self._parts.append(Part(message))
        seq_id = self.write_json(message)
        self._step_ids.append(self._ids.new("step"))
        self._message_id = self._ids.new("message")
        return seq_id

    def stop_reason(self, word: str) -> int:
        """Write a stop_reason, which holds a number in the log but shows none on the wire."""
        return self.write_json({"message_type": "stop_reason", "stop_reason": word})

    def usage(self, **figures: int) -> int:
        """Write the usage statistics, counted from the script unless given."""
        said = sum(len(part.deltas) for part in self._parts if part.text_field == "content")
        steps = len(self._step_ids)
        counted: dict[str, int | None] = {"completion_tokens": said, "prompt_tokens": 11 * steps}
        counted |= {"total_tokens": said + 11 * steps, "step_count": steps, "run_ids": None}
        counted |= {"cached_input_tokens": None, "cache_write_tokens": None, "reasoning_tokens": None}
        counted |= {"context_tokens": said + 11}
        return self.write_json({"message_type": "usage_statistics"} | counted | figures)

    # ---- the script: how it ends ----

    def complete(self, word: str = "end_turn") -> None:
        """End well: stop_reason, usage, [DONE]; then the second [DONE] the server appends under seq 1."""
        self.stop_reason(word)
        self.usage()
        self.write_done()
        self._end("completed", word)
        self.write_done()

    def fail(
        self,
        detail: str,
        *,
        stop_reasons: tuple[str, ...] = ("error", "llm_api_error"),
        error_type: str = "internal_error",
        message: str = "An error occurred during agent execution.",
    ) -> None:
        """Fail, by default in mid-stream: stop_reasons and an ``event: error`` that is the last thing sent."""
        error = {
            "message_type": "error_message",
            "run_id": self.id,
            "error_type": error_type,
            "message": message,
            "detail": detail,
            "seq_id": None,
        }
        for word in stop_reasons:
            self.stop_reason(word)
        self.write(f"event: error\ndata: {compact(error)}\n\n", complete=True)
        self.metadata["error"] = error
        self._end("failed", stop_reasons[-1])
        self.write_done()

    def fail_to_start(self, detail: str) -> None:
        """Fail before anything was streamed: listed as failed, but its stream never existed."""
        self.forget()
        self.metadata["error"] = detail
        self._end("failed", "error")

    def cancel(self) -> None:
        """Be cancelled: the status changes at once, the log gets its terminal only with finish_cancel."""
        self._end("cancelled", "cancelled")

    def finish_cancel(self) -> None:
        """Write the stored end of a cancelled run (with spaces, as json.dumps makes it)."""
        self.write('data: {"message_type": "stop_reason", "stop_reason": "cancelled"}\n\n')
        self.write_done()
        self.write_done()

    # ---- the script: what happens to the log ----

    def write(self, data: str, *, complete: bool = False) -> int:
        """Append a raw entry, SSE framing and all; after a complete one the numbers start at 1 again."""
        seq_id = self._next_seq_id
        self._next_seq_id = 1 if complete else seq_id + 1
        self._append(seq_id, data, complete=complete)
        return seq_id

    def write_json(self, payload: dict[str, Any]) -> int:
        """Append one ``data:`` event holding this JSON."""
        return self.write(f"data: {compact(payload)}\n\n")

    def write_done(self) -> int:
        """Append a [DONE], at which a reader stops."""
        return self.write("data: [DONE]\n\n", complete=True)

    def repeat(self, first: int, last: int) -> None:
        """Append entries first..last again, as redis-py does with a batch whose reply got lost."""
        batch = {entry.seq_id: entry for entry in self.log if first <= entry.seq_id <= last}
        for entry in batch.values():
            self._append(entry.seq_id, entry.data, complete=entry.complete)

    def trim(self, before_seq: int) -> None:
        """Drop the entries in front of this number, silently, as Redis does with a long stream."""
        numbers = [entry.seq_id for entry in self.log]
        self._drop(next((place for place, seq_id in enumerate(numbers) if seq_id >= before_seq), len(numbers)))

    def forget(self) -> None:
        """Lose the stream: the key expired, was evicted, or Redis restarted without persistence."""
        self._drop(len(self.log))

    # ---- what is read from it ----

    def read(self, start: int | None, count: int | None) -> list[Entry]:
        """XRANGE: at most ``count`` entries from the one with index ``start``, itself included."""
        place = 0 if start is None else max(0, start - self._removed)
        return self.log[place : None if count is None else place + count]

    def on_the_wire(self, entry: Entry) -> str:
        """Return the entry's text as a reader gets it: the two nulls replaced in the text."""
        named = entry.data.replace('"run_id":null', f'"run_id":"{self.id}"')
        return named.replace('"seq_id":null', f'"seq_id":{entry.seq_id}')

    def expected_rows(self, *, ever_logged: bool = False) -> list[tuple[int, str]]:
        """Return what a perfect ingester holds: (seq_id, payload as received) of every entry but [DONE].

        Of the log as it is now, or with ``ever_logged`` of all that was written before a trim or a loss too.
        """
        rows: dict[int, str] = {}
        for entry in self.history if ever_logged else self.log:
            served = Entry(entry.index, entry.seq_id, self.on_the_wire(entry), entry.complete)
            if served.payload != "[DONE]":
                rows.setdefault(served.seq_id, served.payload)
            if served.complete:
                break
        return sorted(rows.items())

    @property
    def otid(self) -> str:
        """The id the client gave the user message that started this run."""
        return str(self._prompt["otid"])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What REST lists: nothing unless the run completed, or once its conversation was deleted."""
        if self.status != "completed" or self.is_deleted:
            return []
        return [dict(self._prompt), *(part.whole() for part in self._parts)]

    def as_json(self, *, listed: bool = False) -> dict[str, Any]:
        """Return the run as GET /v1/runs/ lists it, or as GET /v1/runs/ID shows it."""
        ended = self.completed_at
        taken = int((ended - self.created_at).total_seconds() * 1e9) if ended and listed else None
        return {
            "id": self.id,
            "status": self.status,
            "created_at": self.created_at.isoformat().replace("+00:00", "Z"),
            "completed_at": ended.replace(tzinfo=None).isoformat() if ended else None,
            "agent_id": self.agent_id,
            "conversation_id": self.conversation_id,
            "base_template_id": None,
            "background": self.background,
            "metadata": self.metadata,
            "request_config": REQUEST_CONFIG,
            "stop_reason": self.ended_with,
            "callback_url": None,
            "callback_sent_at": None,
            "callback_status_code": None,
            "callback_error": None,
            "ttft_ns": None,
            "total_duration_ns": taken,
        }

    def wake_readers(self) -> None:
        """Let waiting readers look again."""
        self.grown.set()
        self.grown = asyncio.Event()

    # ---- inside ----

    def _end(self, status: Status, word: str) -> None:
        self.status, self.ended_with, self.completed_at = status, word, datetime.now(UTC)

    def _part_head(self, kind: str) -> dict[str, Any]:
        index = sum(part.message["id"] == self._message_id for part in self._parts)
        otid = self._ids.part_of(self._message_id, index)
        return message_head(kind, self._message_id, self.id, otid=otid, step_id=self._step_ids[-1])

    def _delta(self, kind: str, text_field: str, text: str, **fields: Any) -> int:
        part = self._parts[-1] if self._parts else None
        if part is None or part.message["message_type"] != kind or part.message["id"] != self._message_id:
            part = Part(self._part_head(kind) | fields, text_field)
            self._parts.append(part)
        part.deltas.append(text)
        return self.write_json(part.message | fields | {"date": this_second()})

    def _append(self, seq_id: int, data: str, *, complete: bool) -> None:
        if not self.background:
            return  # its events go to whoever started it, and nowhere else
        entry = Entry(len(self.history), seq_id, data, complete)
        self.history.append(entry)
        self.log.append(entry)
        limit = self._max_length()
        node = max(1, limit // 100)  # Redis trims by whole nodes: 13,004 entries were cut to 10,004, not 10,000
        if len(self.log) - node >= limit:
            self._drop(node)
        self.wake_readers()

    def _drop(self, count: int) -> None:
        del self.log[:count]
        self._removed += count
