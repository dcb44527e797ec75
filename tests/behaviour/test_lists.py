"""What is listed: runs, the messages of a run, and what is left of both when they end badly (letta-protocol e, f)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.behaviour.server import Script
from tests.demo.wire import between, captured, normal

if TYPE_CHECKING:
    import httpx

    from tests.behaviour.server import LettaUnderTest, Run


async def messages_of(client: httpx.AsyncClient, run: Run, **query: str | int) -> list[dict[str, Any]]:
    """Get the messages REST lists for a run."""
    answer = await client.get(f"/v1/runs/{run.id}/messages", params=query)
    assert answer.status_code == 200
    listed: list[dict[str, Any]] = answer.json()
    return listed


async def test_record_of_a_run(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A run has the captured fields in their order, listed and shown; only created_at has a zone (e)."""
    (real,) = json.loads(between(captured("e_runs_listing"), "[\n", "/v1/runs/ "))
    run = await letta.start(Script(words=1))

    (listed,) = (await client.get("/v1/runs/", params={"conversation_id": run.where.name})).json()
    shown = (await client.get(f"/v1/runs/{run.id}")).json()

    assert normal(json.dumps(listed | {"total_duration_ns": 0})) == normal(json.dumps(real | {"total_duration_ns": 0}))
    assert shown == listed | {"total_duration_ns": None}
    assert listed["created_at"].endswith("Z")
    assert listed["completed_at"][-1].isdigit()


async def test_active_and_agent_direct_runs(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """`active` lists what is running, `statuses` overrides it; an agent-direct run names no conversation (e)."""
    where = await letta.new_conversation(is_direct=True)
    done = await letta.start(Script(words=1), where)
    running = await letta.start(Script(words=2, holds_after=1), await letta.new_conversation(where.agent_id))
    scope = {"agent_id": where.agent_id}

    active = (await client.get("/v1/runs/", params={**scope, "active": True})).json()
    over = (await client.get("/v1/runs/", params={**scope, "active": True, "statuses": "completed"})).json()
    default = (await client.get("/v1/runs/", params={**scope, "conversation_id": "default"})).json()

    assert [(run["id"], run["status"]) for run in active] == [(running.id, "running")]
    assert [(run["id"], run["conversation_id"]) for run in over] == [(done.id, None)]
    assert default == []


async def test_messages_of_a_run(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """REST lists the prompt and whole messages, in the captured form and with the ids the chunks had (f)."""
    real = json.loads(between(captured("f_messages"), "[\n", "## GET /v1/conversations"))
    run = await letta.start(Script(thoughts=2))

    messages = await messages_of(client, run)
    streamed = (await client.post(run.stream, json={})).text

    messages[0]["content"] = real[0]["content"]
    assert normal(json.dumps(messages)) == normal(json.dumps(real))
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n") if '"step_id":"' in line]
    keys = ("id", "otid", "step_id", "run_id", "message_type")
    assert len(chunks) == 6
    assert {tuple(chunk[key] for key in keys) for chunk in chunks} == {
        tuple(message[key] for key in keys) for message in messages[1:]
    }


async def test_messages_of_a_run_with_a_tool_call(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """The messages of two steps have the captured form: a tool call is a list here, and an object in its chunk (f)."""
    real = [json.loads(line) for line in captured("f_tool_run").splitlines() if line.startswith("{")][:6]
    run = await letta.start(Script(words=2, thoughts=2, calls_tool=True))

    messages = await messages_of(client, run)

    messages[0]["content"] = real[0]["content"]
    assert normal(json.dumps(messages)) == normal(json.dumps(real))


async def test_pages_of_messages(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """`limit` counts stored messages, of which one is several items; cursors work as named or are a 404 (f)."""
    run = await letta.start(Script(thoughts=1))
    prompt, thought, said = await messages_of(client, run)

    assert await messages_of(client, run, limit=1) == [prompt]
    assert await messages_of(client, run, limit=2) == [prompt, thought, said]
    assert await messages_of(client, run, limit=1, order="desc") == [said, thought]
    assert await messages_of(client, run, after=prompt["id"]) == [thought, said]
    assert await messages_of(client, run, after=said["id"]) == []
    assert await messages_of(client, run, before=said["id"]) == [prompt]
    for cursor in ("after", "before"):
        unknown = await client.get(f"/v1/runs/{run.id}/messages", params={cursor: "message-of-nobody"})
        assert unknown.status_code == 404
        assert unknown.json()["detail"] == "No message found with id 'message-of-nobody' for agent 'None'."


async def test_deleted_conversation(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A deleted conversation is listed no more; its runs are, and can be read, but not their messages (e)."""
    run = await letta.start(Script(words=1))
    await letta.delete(run.where)
    scope = {"agent_id": run.where.agent_id}

    conversations = (await client.get("/v1/conversations/", params=scope)).json()
    (listed,) = (await client.get("/v1/runs/", params=scope)).json()
    streamed = await client.post(run.stream, json={})

    assert conversations == []
    assert (listed["id"], listed["conversation_id"]) == (run.id, run.where.name)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert await messages_of(client, run) == []
