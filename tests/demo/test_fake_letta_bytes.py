"""FakeLetta's answers, byte by byte, beside what a real letta 0.16.8 sent."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

from tests.demo.wire import between, captured, events, normal, normal_answer, probe, probed, raw

if TYPE_CHECKING:
    import httpx

    from worker.demo.fake_letta import FakeLetta
    from worker.demo.fake_run import FakeRun


def plain_run(letta: FakeLetta) -> FakeRun:
    """Play the run of a_run_stream_reread_raw.txt: two reasoning deltas, four of text."""
    run = letta.new_run(letta.new_conversation(), prompt="[n=4] [think=2] hi")
    for number in (1, 2):
        run.think(f"think{number:06} ")
    for number in (1, 2, 3, 4):
        run.say(f"tok{number:06} ")
    return run


async def test_plain_run(letta: FakeLetta) -> None:
    """A completed run is streamed in the real server's bytes: headers, chunk framing, events and [DONE]."""
    run = plain_run(letta)
    run.complete()

    answer = await raw(letta.url, "POST", f"/v1/runs/{run.id}/stream", '{"include_pings":false}')

    assert normal_answer(answer) == normal_answer(captured("a_run_stream_reread_raw"))


async def test_failed_run(letta: FakeLetta) -> None:
    """A failed run ends with two stop_reasons and a numbered event: error, without [DONE]."""
    real = captured("g2_llm_failures")
    run = letta.new_run(letta.new_conversation())
    for number in (1, 2, 3):
        run.say(f"tok{number:06} ")
    run.fail("INVALID_ARGUMENT: OpenAI API error: fake mid-stream failure")

    answer = await raw(letta.url, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert normal_answer(answer) == normal_answer(between(real, "HTTP/1.1", "(curl"))


async def test_failed_run_is_listed_with_its_error(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """GET /v1/runs/ID shows a failed run as the real server does, error object and all; no message is kept."""
    real = between(captured("g2_llm_failures"), '{"id":"run-c7a4c9ab', "\n\nmessages")
    run = letta.new_run(letta.new_conversation())
    run.fail("INVALID_ARGUMENT: OpenAI API error: fake mid-stream failure")

    answer = await client.get(f"/v1/runs/{run.id}")
    messages = await client.get(f"/v1/runs/{run.id}/messages")

    assert normal(answer.text) == normal(real)
    assert messages.json() == []


async def test_cancelled_run_is_broken_off_and_resumed(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A live reader of a cancelled run gets the made-up stop_reason and no [DONE]; resuming gives the stored end."""
    made_up, stored = re.findall("stop_reason seq=-.*", captured("g1_cancel"))[:2]
    run = plain_run(letta)

    reading = asyncio.create_task(probe(client, "POST", f"/v1/runs/{run.id}/stream", '{"include_pings":false}'))
    await asyncio.sleep(2 * letta.cancel_check_interval)
    cancelled = await client.post(f"/v1/conversations/{run.conversation_id}/cancel")
    run.say("never sent to the live reader")
    broken_off = await reading
    run.finish_cancel()
    resumed = await probe(client, "POST", f"/v1/runs/{run.id}/stream", '{"starting_after":7}')

    assert cancelled.json() == {run.id: "cancelled"}
    assert broken_off[-3:] == ["assistant_message seq=7 tok000004", made_up, "end: EOF"]
    assert resumed[1:] == [
        "assistant_message seq=8 never sent to the live reader",
        stored,
        "[DONE]",
        "end: EOF",
    ]


async def test_cancel_of_a_finished_conversation(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A second cancel is refused with 409, in the real server's words."""
    run = plain_run(letta)
    run.cancel()
    real = list(probed(captured("g1_cancel")))[-1]

    lines = await probe(client, "POST", f"/v1/conversations/{run.conversation_id}/cancel")

    assert real.path.endswith("/cancel")
    assert [normal(line) for line in lines] == [normal(line) for line in real.answer]


async def test_tool_run(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A run of two steps with a tool call has the real events, and its messages the real form."""
    real = captured("f_tool_run")
    run = letta.new_run(letta.new_conversation(), prompt="[tool=roll_dice] [n=2] [think=2]")
    for _ in range(2):
        run.think("think000001 ")
        run.think("think000002 ")
        if run.log[-1].seq_id == 3:
            run.call_tool("roll_dice")
            run.tool_return("4")
    run.say("tok000001 ")
    run.say("tok000002 ")
    run.stop_reason("end_turn")
    run.usage(completion_tokens=4, total_tokens=26)
    run.write_done()
    run.status = "completed"

    streamed = await client.post(f"/v1/runs/{run.id}/stream", json={})
    messages = await client.get(f"/v1/runs/{run.id}/messages")

    expected = [json.loads(line) for line in real.splitlines() if line.startswith("{")][:6]
    assert normal(streamed.text) == normal(between(real, "data: ", "## GET"))
    assert normal(json.dumps(messages.json()[:6])) == normal(json.dumps(expected))


async def test_messages_of_a_run(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """REST lists the prompt and whole messages, with the ids the chunks had."""
    real = json.loads(between(captured("f_messages"), "[\n", "## GET /v1/conversations"))
    run = plain_run(letta)
    run.complete()

    answer = await client.get(f"/v1/runs/{run.id}/messages")
    limited = await client.get(f"/v1/runs/{run.id}/messages", params={"limit": 2})
    newest = await client.get(f"/v1/runs/{run.id}/messages", params={"limit": 1, "order": "desc"})
    rest = await client.get(f"/v1/runs/{run.id}/messages", params={"after": answer.json()[0]["id"]})

    assert normal(json.dumps(answer.json())) == normal(json.dumps(real))
    assert len(limited.json()) == 3
    assert newest.json() == rest.json() == answer.json()[1:]


async def test_listed_run(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A listed run has the real fields in the real order; only created_at has a zone."""
    real = json.loads(between(captured("e_runs_listing"), "[\n", "/v1/runs/ "))
    run = plain_run(letta)
    run.complete()

    (listed,) = (await client.get("/v1/runs/")).json()

    assert normal(json.dumps(listed | {"total_duration_ns": 0})) == normal(
        json.dumps(real[0] | {"total_duration_ns": 0})
    )
    assert listed["created_at"].endswith("Z")
    assert listed["completed_at"][-1].isdigit()


async def test_keepalive_pings(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A keepalive ping looks like the stored one, repeats the last number and is not stored."""
    run = letta.new_run()
    run.say("once ")

    seen: list[dict[str, object]] = []
    async with client.stream("POST", f"/v1/runs/{run.id}/stream", json={}) as answer:
        async for event in events(answer):
            seen.append(json.loads(event.removeprefix("data: ")))
            if len(seen) == 4:
                break

    assert [(event["message_type"], event["seq_id"]) for event in seen] == [
        ("ping", 1),
        ("assistant_message", 2),
        ("ping", 2),
        ("ping", 2),
    ]
    assert list(seen[0]) == list(seen[2])
    assert len({str(event["id"]) for event in seen}) == 4
    assert len(run.log) == 2


async def test_silent_stream_is_cut_without_a_word(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """After max_stream_silence of nothing but pings the response just ends."""
    letta.max_stream_silence = 0.05
    run = letta.new_run(pings=False)

    lines = await probe(client, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert lines[0] == "HTTP 200 text/event-stream; charset=utf-8"
    assert set(lines[1:-1]) == {"ping seq=None"}
    assert lines[-1] == "end: EOF"


async def test_redis_down(letta: FakeLetta) -> None:
    """With Redis down a stream is a 500 that says text/event-stream and has no body."""
    real = between(captured("d_redis_down"), "HTTP/1.1", "(curl")
    run = plain_run(letta)
    letta.redis = "down"

    answer = await raw(letta.url, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert normal_answer(answer) == normal_answer(real)


async def test_health_and_password(letta: FakeLetta) -> None:
    """With a password everything but the health answers 401 until the header is exactly right."""
    letta.password = "sesame"
    listing = [
        await raw(letta.url, "GET", "/v1/runs/", authorization="Bearer wrong"),
        await raw(letta.url, "GET", "/v1/runs/", authorization="bearer sesame"),
        await raw(letta.url, "GET", "/v1/runs"),
    ]

    assert all(answer.startswith("HTTP/1.1 401 Unauthorized\r\n") for answer in listing)
    assert all(answer.endswith('\r\n\r\n{"detail":"Unauthorized"}') for answer in listing)
    assert "200 OK" in await raw(letta.url, "GET", "/v1/runs/", authorization="Bearer sesame")
    assert "200 OK" in await raw(letta.url, "GET", "/v1/runs/", X_BARE_PASSWORD="password sesame")
    assert (await raw(letta.url, "GET", "/v1/health/")).endswith('{"version":"0.16.8","status":"ok"}')


async def test_wrong_slash(letta: FakeLetta) -> None:
    """A wrong trailing slash is a 307 to an absolute location made of the Host header, without a body."""
    run = plain_run(letta)

    listing = await raw(letta.url, "GET", "/v1/runs?limit=1")
    stream = await raw(letta.url, "POST", f"/v1/runs/{run.id}/stream/", "{}")

    assert listing.startswith("HTTP/1.1 307 Temporary Redirect\r\n")
    assert "\r\nlocation: http://letta/v1/runs/?limit=1\r\n" in listing
    assert f"\r\nlocation: http://letta/v1/runs/{run.id}/stream\r\n" in stream
    assert "\r\ncontent-length: 0\r\n" in stream.lower()
