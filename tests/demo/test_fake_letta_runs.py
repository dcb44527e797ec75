"""The runs of FakeLetta: what happens to a run's log, and what a reader and the oracle make of it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

from tests.demo.wire import events, probe, until
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    import httpx

    from worker.demo.fake_run import FakeRun


async def payloads(client: httpx.AsyncClient, run: FakeRun, **body: object) -> list[str]:
    """Read a run to the end; returns the payloads received, in order, without [DONE]."""
    async with client.stream("POST", f"/v1/runs/{run.id}/stream", json=body) as answer:
        received = [event.split("data: ", 1)[1] async for event in events(answer)]
    return [payload for payload in received if payload != "[DONE]"]


async def numbers(client: httpx.AsyncClient, run: FakeRun, **body: object) -> list[int]:
    """Read a run to the end; returns the numbers that showed."""
    return [json.loads(payload)["seq_id"] for payload in await payloads(client, run, **body) if '"seq_id"' in payload]


async def test_oracle_is_what_a_reader_gets(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """expected_rows holds every payload a reader receives, with the numbers the log gives them."""
    run = letta.new_run()
    run.think("hm")
    run.say('odd: \0 \u2028 \u0085 \n \r " \U0001f600 {"seq_id":null,"run_id":null}')
    run.call_tool("roll_dice", '{"sides":6}')
    run.tool_return("4")
    run.write('data: {"message_type":"new","run_id":null,"seq_id":null}\n\n')
    run.complete()

    rows = run.expected_rows()

    assert [payload for _, payload in rows] == await payloads(client, run)
    assert [number for number, _ in rows] == list(range(1, 9))
    assert rows[5][1] == f'{{"message_type":"new","run_id":"{run.id}","seq_id":6}}'


async def test_oracle_of_a_failed_run(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A failed run's rows end with the error event, and nothing follows it."""
    run = letta.new_run()
    run.fail("no more tokens")

    rows = run.expected_rows()

    assert [payload for _, payload in rows] == await payloads(client, run)
    assert rows[-1][0] == json.loads(rows[-1][1])["seq_id"] == 4


async def test_log_as_redis_holds_it(letta: FakeLetta) -> None:
    """The stored text has null where the number goes, and a second [DONE] follows under number 1."""
    run = letta.new_run()
    run.say("a")
    run.complete()

    assert [(entry.seq_id, entry.complete) for entry in run.log] == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (5, True),
        (1, True),
    ]
    assert '"seq_id":null' in run.log[1].data
    assert run.log[4].data == run.log[5].data == "data: [DONE]\n\n"


async def test_live_reader_sees_each_event_at_once(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A reader attached to a live run is woken by each write, and ends with the run."""
    run = letta.new_run(pings=False)
    seen: list[str] = []

    async def follow() -> None:
        async with client.stream("POST", f"/v1/runs/{run.id}/stream", json={"include_pings": False}) as answer:
            async for event in events(answer):
                seen.append(event)  # noqa: PERF401 - looked at while it grows

    following = asyncio.create_task(follow())
    for text in "abc":
        run.say(text)
        await until(lambda: len(seen) == len(run.log))
    run.complete()
    await following

    assert len(seen) == 6


async def test_repeated_batch(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A batch written twice is sent twice, numbers going backwards; the oracle holds it once."""
    run = letta.new_run()
    for text in "abcd":
        run.say(text)
    run.repeat(3, 5)
    run.say("e")
    run.complete()

    assert await numbers(client, run) == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert [number for number, _ in run.expected_rows()] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert await numbers(client, run, starting_after=4) == [5, 5, 6]


async def test_trimmed_log(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """What was trimmed is skipped without a word, whatever the cursor; the oracle can still name it."""
    run = letta.new_run()
    for text in "abcd":
        run.say(text)
    run.trim(before_seq=4)
    run.complete()

    assert await numbers(client, run) == await numbers(client, run, starting_after=2) == [4, 5]
    assert [number for number, _ in run.expected_rows()] == [4, 5, 6, 7]
    assert [number for number, _ in run.expected_rows(ever_logged=True)] == [1, 2, 3, 4, 5, 6, 7]


async def test_slow_reader_loses_what_is_trimmed_ahead_of_it(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A live reader that is overtaken by the trimming finds a hole in the middle of its response."""
    letta.max_length = 10
    run = letta.new_run(pings=False)
    run.say("x")
    first_batch = asyncio.create_task(numbers(client, run, include_pings=False))
    await until(lambda: letta.requests and letta.requests[0].bytes_sent)
    for _ in range(30):
        run.say("x")
    run.complete()

    assert await first_batch == [1, *range(26, 32)]


async def test_vanished_stream(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A run whose key is gone, or that never started, hangs although its run is listed."""
    lost, never = letta.new_run(), letta.new_run()
    lost.say("a")
    lost.forget()
    never.fail_to_start("INTERNAL_SERVER_ERROR: Background streaming requires Redis to be running.")

    for run in (lost, never):
        assert await probe(client, "POST", f"/v1/runs/{run.id}/stream", '{"include_pings":false}', 0.1) == [
            "end: TIMEOUT"
        ]
    shown = (await client.get(f"/v1/runs/{never.id}")).json()
    assert (shown["status"], type(shown["metadata"]["error"])) == ("failed", str)


async def test_reread_of_a_cancelled_run_is_cut_again(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """A re-read that takes longer than the check interval loses its tail each time; resuming gets it all."""
    run = letta.new_run()
    for text in "abcdefgh":
        run.say(text)
    run.cancel()
    run.finish_cancel()
    letta.cancel_check_interval = 0

    cut = await probe(client, "POST", f"/v1/runs/{run.id}/stream", "{}")
    letta.cancel_check_interval = 10
    resumed = await numbers(client, run, starting_after=0)

    assert cut[1:] == ['stop_reason seq=- {"message_type": "stop_reason", "stop_reason": "cancelled"}', "end: EOF"]
    assert resumed == list(range(1, 10))
    assert run.messages == []


async def test_active_runs_are_listed_until_they_end(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """``active`` lists what is running, ``statuses`` overrides it, agent-direct runs have no conversation."""
    running, done = letta.new_run(), letta.new_run(letta.new_conversation())
    done.complete()

    active = (await client.get("/v1/runs/", params={"active": True})).json()
    over = (await client.get("/v1/runs/", params={"active": True, "statuses": "completed"})).json()

    assert [(run["id"], run["conversation_id"]) for run in active] == [(running.id, None)]
    assert [run["id"] for run in over] == [done.id]


def test_ids_are_repeatable_and_look_real() -> None:
    """The same seed makes the same ids, and none makes new ones; an otid differs from its message in 7 bits."""
    first, second, third = FakeLetta(seed=7), FakeLetta(seed=7), FakeLetta()
    runs = [letta.new_run(letta.new_conversation(letta.new_agent())) for letta in (first, second, third)]
    runs[0].say("a")
    chunk = json.loads(runs[0].expected_rows()[1][1])
    uuid4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

    assert runs[0].id == runs[1].id != runs[2].id
    assert all(re.fullmatch(f"run-{uuid4}", run.id) for run in runs)
    assert re.fullmatch(f"agent-{uuid4}", runs[0].agent_id)
    assert int(chunk["id"][-2:], 16) & 0x80 == int(chunk["otid"][-2:], 16)
    assert chunk["id"].removeprefix("message-")[:-2] == chunk["otid"][:-2]
