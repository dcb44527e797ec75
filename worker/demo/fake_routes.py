"""FakeLetta's endpoints: which run a request means, the lists, and every refusal in the server's own words.

Used by fake_letta.py, which hands each request to ``route``.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from worker.demo.fake_stream import WITHOUT_BODY, StreamAnswer, StreamRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from worker.demo.fake_faults import Exchange, Kind
    from worker.demo.fake_letta import FakeConversation, FakeLetta
    from worker.demo.fake_run import FakeRun

UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
CONVERSATION_PATTERN = f"^(default|conv-{UUID4}|agent-{UUID4})$"
STATUSES = ("created", "running", "completed", "failed", "cancelled")
ACTIVE = ("created", "running")
ACTOR = (
    "id='user-00000000-0000-4000-8000-000000000000' organization_id='org-00000000-0000-4000-8000-000000000000'"
    " name='default_user' created_at=datetime.datetime(2026, 11, 22, 15, 0, 24, 695678, tzinfo=TzInfo(0))"
    " updated_at=datetime.datetime(2026, 11, 22, 15, 0, 24, 695678, tzinfo=TzInfo(0)) is_deleted=False"
)
NO_REDIS = (
    "Background streaming requires Redis to be running. Please ensure Redis is properly configured. "
    "LETTA_REDIS_HOST: None, LETTA_REDIS_PORT: 6379"
)

Model = TypeVar("Model", bound=BaseModel)


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """An answer other than 200."""

    def __init__(self, status: int, detail: str, **more: str) -> None:
        super().__init__(detail)
        self.status = status
        self.content = {**more, "detail": detail}


class RunsQuery(BaseModel):
    """Query of GET /v1/runs/."""

    agent_id: str | None = None
    conversation_id: str | None = None
    statuses: list[str] | None = None
    background: bool | None = None
    stop_reason: str | None = None
    before: str | None = None
    after: str | None = None
    limit: int = Field(100, ge=1, le=1000)
    order: Literal["asc", "desc"] = "desc"
    active: bool = False


class MessagesQuery(BaseModel):
    """Query of GET /v1/runs/ID/messages."""

    before: str | None = None
    after: str | None = None
    limit: int = 100
    order: Literal["asc", "desc"] = "asc"


class ConversationsQuery(BaseModel):
    """Query of GET /v1/conversations/."""

    agent_id: str | None = None
    after: str | None = None
    limit: int = 50
    order: Literal["asc", "desc"] = "desc"


@dataclass(frozen=True)
class Route:
    """One endpoint; ``item`` is the id in its path, if it has one."""

    method: Literal["GET", "POST"]
    pattern: str
    kind: Kind
    handle: Callable[[FakeLetta, Exchange, str], Awaitable[None]]

    def item(self, path: str) -> str | None:
        """Return the id in the path, "" for a path without one, None if the path is another's."""
        found = re.fullmatch(self.pattern, path)
        return None if found is None else "".join(found.groups())


def find_route(path: str) -> tuple[Route, str] | None:
    """Return the endpoint of a path, and the id in it."""
    for route in ROUTES:
        item = route.item(path)
        if item is not None:
            return route, item
    return None


def with_other_slash(path: str) -> str:
    """Return the path with its trailing slash added or removed."""
    return path.removesuffix("/") if path.endswith("/") else f"{path}/"


# ---- the endpoints ----


async def health(letta: FakeLetta, exchange: Exchange, _: str) -> None:
    """GET /v1/health/, open to everybody."""
    await exchange.json(200, {"version": letta.version, "status": "ok"})


async def list_runs(letta: FakeLetta, exchange: Exchange, _: str) -> None:
    """GET /v1/runs/."""
    query = validated(RunsQuery, query_of(exchange), "query")
    for status in query.statuses or ():
        if status not in STATUSES:
            raise Refusal(400, f"'{status}' is not a valid RunStatus")
    runs = [run for run in letta.runs.values() if is_wanted(run, query)]
    ascending = query.order == "asc"
    if letta.paging != "ignored":
        # The server swaps them: ``before`` continues a list in its own direction, ``after`` goes back.
        onwards, back = ("before", "after") if letta.paging == "swapped" else ("after", "before")
        runs = beyond(runs, letta.runs.get(getattr(query, onwards) or ""), later=ascending)
        runs = beyond(runs, letta.runs.get(getattr(query, back) or ""), later=not ascending)
    runs.sort(key=place, reverse=not ascending)
    await exchange.json(200, [run.as_json(listed=True) for run in runs[: query.limit]])


async def show_run(letta: FakeLetta, exchange: Exchange, run_id: str) -> None:
    """GET /v1/runs/ID."""
    await exchange.json(200, known_run(letta, run_id).as_json())


async def list_messages(letta: FakeLetta, exchange: Exchange, run_id: str) -> None:
    """GET /v1/runs/ID/messages: the limit counts stored messages, of which one can be several items."""
    query = validated(MessagesQuery, query_of(exchange), "query")
    stored: dict[str, list[dict[str, Any]]] = {}
    for message in known_run(letta, run_id).messages:
        stored.setdefault(message["id"], []).append(message)
    ids = list(stored)
    if query.limit < 0:
        raise Refusal(500, "A database error occurred.")
    for cursor in (query.before, query.after):
        if cursor is not None and cursor not in stored:
            raise Refusal(404, f"No message found with id '{cursor}' for agent 'None'.")
    if query.before is not None:
        ids = ids[: ids.index(query.before)]
    if query.after is not None:
        ids = ids[ids.index(query.after) + 1 :]
    if query.order == "desc":
        ids.reverse()
    step = -1 if query.order == "desc" else 1  # the items of one message are reversed, too
    await exchange.json(200, [item for id_ in ids[: query.limit] for item in stored[id_][::step]])


async def list_conversations(letta: FakeLetta, exchange: Exchange, _: str) -> None:
    """GET /v1/conversations/, whose ``after`` works as named."""
    query = validated(ConversationsQuery, query_of(exchange), "query")
    if query.limit < 0:
        raise Refusal(500, "A database error occurred.")
    found = [c for c in letta.conversations.values() if query.agent_id in (None, c.agent_id)]
    ascending = query.order == "asc"
    if query.after is not None:
        cursor = letta.conversations.get(query.after)
        if cursor is None:
            raise Refusal(404, not_found("Conversation", query.after))
        found = beyond(found, cursor, later=ascending)
    found.sort(key=place, reverse=not ascending)
    await exchange.json(200, [conversation.as_json() for conversation in found[: query.limit]])


async def cancel_conversation(letta: FakeLetta, exchange: Exchange, conversation_id: str) -> None:
    """POST /v1/conversations/ID/cancel."""
    check_conversation_id(conversation_id)
    active = active_runs(letta, conversation_id, exchange.record.query.get("agent_id"))
    if conversation_id.startswith("conv-") and conversation_id not in letta.conversations:
        raise Refusal(404, not_found("Conversation", conversation_id))
    if not active:
        raise Refusal(409, f"CONFLICT: No active runs to cancel for conversation {conversation_id}")
    for run in active:
        run.cancel()
    await exchange.json(200, {run.id: "cancelled" for run in active})


async def stream_run(letta: FakeLetta, exchange: Exchange, run_id: str) -> None:
    """POST /v1/runs/ID/stream."""
    asked = stream_request(exchange)
    run = known_run(letta, run_id)
    check_background(run)
    check_expiry(letta, run)
    check_redis(letta)
    if asked is None:
        raise Refusal(500, "An unknown error occurred")
    await deliver(letta, exchange, run, asked)


async def stream_conversation(letta: FakeLetta, exchange: Exchange, conversation_id: str) -> None:
    """POST /v1/conversations/ID/stream: by run_id, by otid, or the newest active run."""
    check_conversation_id(conversation_id)
    asked = stream_request(exchange) or WITHOUT_BODY
    check_redis(letta)
    if asked.run_id and letta.honours_run_id:
        run = known_run(letta, asked.run_id)
    elif asked.otid and letta.honours_run_id:
        run = await run_of_otid(letta, asked.otid)
    else:
        active = active_runs(letta, conversation_id, asked.agent_id)
        if not active:
            raise Refusal(400, "INVALID_ARGUMENT: No active runs found for this conversation.")
        run = active[0]
        check_background(run)
    check_expiry(letta, run)
    await deliver(letta, exchange, run, asked)


ROUTES = (
    Route("GET", r"/v1/health/", "health", health),
    Route("GET", r"/v1/runs/", "runs", list_runs),
    Route("GET", r"/v1/runs/([^/]+)", "run", show_run),
    Route("GET", r"/v1/runs/([^/]+)/messages", "messages", list_messages),
    Route("POST", r"/v1/runs/([^/]+)/stream", "stream", stream_run),
    Route("GET", r"/v1/conversations/", "conversations", list_conversations),
    Route("POST", r"/v1/conversations/([^/]+)/stream", "stream", stream_conversation),
    Route("POST", r"/v1/conversations/([^/]+)/cancel", "cancel", cancel_conversation),
)


# ---- what they share ----


async def deliver(letta: FakeLetta, exchange: Exchange, run: FakeRun, asked: StreamRequest) -> None:
    """Stream the run, or the one a fault puts in its place."""
    if exchange.fault is not None:
        run = exchange.fault.run_to_serve(run)
    await StreamAnswer(letta, exchange, run, asked).deliver()


def known_run(letta: FakeLetta, run_id: str) -> FakeRun:
    """Return the run, or refuse a malformed or unknown id."""
    if not re.fullmatch(f"run-{UUID4}", run_id):
        detail = f"INVALID_ARGUMENT: Invalid run ID format: {run_id}. Expected format: 'run-<uuid4>'"
        raise Refusal(400, detail)
    if run_id not in letta.runs:
        raise Refusal(404, not_found("Run", run_id))
    return letta.runs[run_id]


async def run_of_otid(letta: FakeLetta, otid: str) -> FakeRun:
    """Return the run a user message started; an unknown one is refused only after three looks."""
    for wait in (0.25, 0.5, 1.0):
        for run in letta.runs.values():
            if run.otid == otid:
                return run
        await asyncio.sleep(wait)
    raise Refusal(404, f"No run found for otid={otid}. The run may have expired or never existed.")


def active_runs(letta: FakeLetta, conversation_id: str, agent_id: str | None) -> list[FakeRun]:
    """Return the active runs, newest first; asked by agent, whatever their conversation."""
    agent = agent_id if conversation_id == "default" else None
    if conversation_id.startswith("agent-"):
        agent = conversation_id
    runs = [run for run in letta.runs.values() if run.status in ACTIVE]
    if agent:
        runs = [run for run in runs if run.agent_id == agent]
    else:
        runs = [run for run in runs if run.conversation_id == conversation_id]
    return sorted(runs, key=place, reverse=True)


def is_wanted(run: FakeRun, query: RunsQuery) -> bool:
    """Apply the filters of GET /v1/runs/; ``statuses`` overrides ``active``."""
    statuses = query.statuses or (ACTIVE if query.active else STATUSES)
    return (
        run.status in statuses
        and query.conversation_id in (None, run.conversation_id)
        and (not query.agent_id or query.agent_id == run.agent_id)
        and query.background in (None, run.background)
        and query.stop_reason in (None, run.ended_with)
    )


Placed = TypeVar("Placed", bound="FakeRun | FakeConversation")


def place(item: Placed) -> tuple[datetime, str]:
    """Return what lists are ordered by."""
    return item.created_at, item.id


def beyond(items: Sequence[Placed], cursor: Placed | None, *, later: bool) -> list[Placed]:
    """Keep what is later (or earlier) than the cursor; an unknown cursor is silently ignored."""
    if cursor is None:
        return list(items)
    return [i for i in items if (place(i) > place(cursor) if later else place(i) < place(cursor))]


def query_of(exchange: Exchange) -> dict[str, Any]:
    """Return the query as FastAPI reads it: the last of a repeated name, all for ``statuses``."""
    query = exchange.wire.query
    return {name: query.getall(name) if name == "statuses" else query.getall(name)[-1] for name in query}


def stream_request(exchange: Exchange) -> StreamRequest | None:
    """Parse the body of a stream request; None if there is none."""
    if not exchange.raw_body:
        return None
    if not re.fullmatch(r"application/([\w.-]+\+)?json", exchange.wire.content_type):
        raise not_an_object(exchange.raw_body)
    try:
        value = json.loads(exchange.raw_body)
    except ValueError as error:
        position, message = getattr(error, "pos", 0), getattr(error, "msg", str(error))
        detail = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error"}
        raise invalid([detail | {"input": {}, "ctx": {"error": message}}]) from error
    if value is None:
        return None
    if not isinstance(value, dict):
        raise not_an_object(value)
    return validated(StreamRequest, value, "body")


def validated(model: type[Model], value: object, where: str) -> Model:
    """Validate as FastAPI does, and refuse with its list of errors."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = [{**e, "loc": (where, *e["loc"])} for e in error.errors(include_url=False)]
        raise invalid(found) from error


def invalid(errors: Sequence[object]) -> Refusal:
    """Return the server's 422, which holds the errors as Python text."""
    return Refusal(422, repr(list(errors)), trace_id="")


def not_an_object(value: object) -> Refusal:
    """Return the 422 for a body that is no JSON object, or that is not called JSON by its content type."""
    message = "Input should be a valid dictionary or object to extract fields from"
    return invalid([{"type": "model_attributes_type", "loc": ("body",), "msg": message, "input": value}])


def check_conversation_id(conversation_id: str) -> None:
    """Refuse a malformed conversation id; one that does not exist is no error."""
    if re.fullmatch(CONVERSATION_PATTERN, conversation_id):
        return
    error = {
        "type": "string_pattern_mismatch",
        "loc": ("path", "conversation_id"),
        "msg": f"String should match pattern '{CONVERSATION_PATTERN}'",
        "input": conversation_id,
        "ctx": {"pattern": CONVERSATION_PATTERN},
    }
    raise invalid([error])


def check_background(run: FakeRun) -> None:
    """Refuse a run whose events are not kept."""
    if not run.background:
        detail = "INVALID_ARGUMENT: Run was not created in background mode, so it cannot be retrieved."
        raise Refusal(400, detail)


def check_expiry(letta: FakeLetta, run: FakeRun) -> None:
    """Refuse a run that is too old, even one that still goes on."""
    if letta.is_expired(run):
        raise Refusal(410, "EXPIRED: Run was created more than 3 hours ago, and is now expired.")


def check_redis(letta: FakeLetta) -> None:
    """Refuse every stream where no Redis is configured."""
    if letta.redis == "none":
        raise Refusal(503, NO_REDIS)


def not_found(what: str, item: str) -> str:
    """Return the text of a 404, with all the server tells about itself."""
    return f"{what} not found with id='['{item}']', access level in ['read'] for actor='{ACTOR}'"
