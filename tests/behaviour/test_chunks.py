"""What a run's stream is made of: numbers, pings, which run is meant (letta-protocol a to d, h)."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.behaviour.server import Script
from tests.demo.wire import between, captured, events, normal, normal_answer, probe, raw

if TYPE_CHECKING:
    import httpx

    from tests.behaviour.server import LettaUnderTest

WITHOUT_PINGS = '{"include_pings":false}'
END_TURN = 'stop_reason seq=- {"message_type":"stop_reason","stop_reason":"end_turn"}'


async def first_events(client: httpx.AsyncClient, path: str, count: int, **body: object) -> list[dict[str, Any]]:
    """Read so many events of a stream that goes on."""
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(30), client.stream("POST", path, json=body) as answer:
        async for event in events(answer):
            seen.append(json.loads(event.removeprefix("data: ")))
            if len(seen) == count:
                break
    return seen


async def test_bytes_of_a_run(letta: LettaUnderTest) -> None:
    """A completed run is sent in the captured bytes: headers, chunk framing, numbers or none, and one [DONE] (a, j)."""
    run = await letta.start(Script(thoughts=2))

    answer = await raw(letta.url, "POST", run.stream, WITHOUT_PINGS)

    assert normal_answer(answer) == normal_answer(captured("a_run_stream_reread_raw"))


async def test_bytes_of_a_run_with_a_tool_call(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Two steps with a tool call are numbered through, and have the captured form (a, f)."""
    run = await letta.start(Script(words=2, thoughts=2, calls_tool=True))

    streamed = await client.post(run.stream, json={})

    said, real = (re.sub(r"_tokens\":\d+", '_tokens":0', text) for text in (streamed.text, captured("f_tool_run")))
    assert normal(said) == normal(between(real, "data: ", "## GET"))


async def test_bytes_of_a_failed_run(letta: LettaUnderTest) -> None:
    """A failed run ends in the captured bytes: stop_reasons, an event: error with a number, and no [DONE] (a)."""
    real = between(captured("g2_llm_failures"), "HTTP/1.1", "(curl").replace("fake mid-stream failure", "fake failure")
    run = await letta.start(Script(words=20, fails_after=3))

    answer = await raw(letta.url, "POST", run.stream, "{}")

    said, expected = (re.sub(r"\n[0-9a-f]+\r\n", "\nLENGTH\r\n", normal_answer(text)) for text in (answer, real))
    assert said == expected


async def test_run_started_without_pings(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """The log of a run that was started without pings begins with its first chunk, whatever its reader wants (a)."""
    run = await letta.start(Script(words=2, pings=False))

    lines = await probe(client, "POST", run.stream, "{}")

    assert lines[1:4] == ["assistant_message seq=1 tok000001", "assistant_message seq=2 tok000002", END_TURN]


async def test_keepalive_pings(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A keepalive ping looks like the stored one and repeats the last number, or has none; it is not stored (b)."""
    run = await letta.start(Script(words=2, holds_after=1))

    seen = await first_events(client, run.stream, 4)
    behind = await first_events(client, run.stream, 1, starting_after=2)
    quiet = await probe(client, "POST", run.stream, WITHOUT_PINGS, letta.silence)

    kinds = [(event["message_type"], event["seq_id"]) for event in [*seen, *behind]]
    assert kinds == [("ping", 1), ("assistant_message", 2), ("ping", 2), ("ping", 2), ("ping", None)]
    assert list(seen[0]) == list(seen[2])
    assert len({event["id"] for event in seen}) == 4
    assert quiet[1:] == ["ping seq=1", "assistant_message seq=2 tok000001", "end: TIMEOUT"]


async def test_broken_reader_with_pings_ends_without_a_word(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """With pings on, the server swallows the error of its own reader: a clean end without any marker (c)."""
    run = await letta.start(Script(words=2, holds_after=1))

    lines = await probe(client, "POST", run.stream, '{"poll_interval":null}')

    assert lines[1:] == ["ping seq=1", "assistant_message seq=2 tok000001", "end: EOF"]


async def test_several_readers(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Readers of a live run do not disturb each other: each gets all there is behind its cursor (h)."""
    run = await letta.start(Script(words=5, holds_after=2))
    bodies = [WITHOUT_PINGS, WITHOUT_PINGS, '{"include_pings":false,"starting_after":2}']
    reading = [asyncio.create_task(probe(client, "POST", run.stream, body, 30)) for body in bodies]
    await letta.go_on(run)

    one, two, resumed = await asyncio.gather(*reading)

    assert one == two
    assert one[1:7] == ["ping seq=1", *(f"assistant_message seq={n + 1} tok00000{n}" for n in range(1, 6))]
    assert [one[7], *one[9:]] == [END_TURN, "[DONE]", "end: EOF"]
    assert resumed[1:] == one[3:]


async def test_odd_characters(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Text is raw UTF-8, line ends of Unicode included, and only NUL is escaped; the message lacks the NUL (j, f)."""
    text = 'a\0b\u2028c\x85d\xe9\U0001f600"\\\n\r\ufffe'
    run = await letta.start(Script(text=text))

    streamed = (await client.post(run.stream, json={})).content
    messages = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    said = re.findall(rb'"content":"(.*?)"}\n\n', streamed, re.DOTALL)
    assert b"".join(said).decode() == text.replace("\\", r"\\").replace('"', r"\"").replace("\0", r"\u0000").replace(
        "\n", r"\n"
    ).replace("\r", r"\r")
    assert messages[-1]["content"] == text.replace("\0", "")


# ---- which run is meant, and whether it may be read ----


async def test_which_run_a_conversation_means(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Without run_id the newest active run is read, for `default` of any conversation; an orphan takes over (d)."""
    orphan = await letta.start(Script(words=2, holds_after=1))
    where = orphan.where
    run = await letta.start(Script(words=2, holds_after=1, pings=False), where)
    path, default = f"/v1/conversations/{where.name}/stream", "/v1/conversations/default/stream"
    of_agent = f'{{"agent_id":"{where.agent_id}","include_pings":false}}'

    newest = await probe(client, "POST", default, of_agent, letta.silence)
    other_cursor = await probe(client, "POST", path, '{"starting_after":1,"include_pings":false}', letta.silence)
    await letta.go_on(run)
    poisoned = await probe(client, "POST", path, WITHOUT_PINGS, letta.silence)
    by_run_id = await probe(client, "POST", default, f'{{"run_id":"{run.id}","starting_after":1}}')
    otid = (await client.get(f"/v1/runs/{run.id}/messages")).json()[0]["otid"]
    by_otid = await probe(client, "POST", path, f'{{"otid":"{otid}","starting_after":1}}')

    assert newest[1:] == ["assistant_message seq=1 tok000001", "end: TIMEOUT"]
    assert other_cursor == ["end: TIMEOUT"]
    assert poisoned[1:] == ["ping seq=1", "assistant_message seq=2 tok000001", "end: TIMEOUT"]
    assert by_run_id == by_otid
    assert by_run_id[1] == "assistant_message seq=2 tok000002"
    assert by_run_id[-2:] == ["[DONE]", "end: EOF"]


@pytest.mark.parametrize("holds_after", [1, None])
async def test_expired(letta: LettaUnderTest, client: httpx.AsyncClient, holds_after: int | None) -> None:
    """A run older than three hours is a 410 everywhere, even while it goes on; its record and messages stay (d)."""
    run = await letta.start(Script(words=2, holds_after=holds_after))
    await letta.set_created(run, datetime.now(UTC) - timedelta(hours=3, minutes=1))
    conversation = f"/v1/conversations/{run.where.name}/stream"

    answers = [
        await client.post(run.stream, json={}),
        await client.post(conversation, json={"run_id": run.id}),
        *([] if holds_after is None else [await client.post(conversation, json={})]),
    ]
    shown = (await client.get(f"/v1/runs/{run.id}")).json()
    messages = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    said = '{"detail":"EXPIRED: Run was created more than 3 hours ago, and is now expired."}'
    assert {(answer.status_code, answer.text) for answer in answers} == {(410, said)}
    assert shown["status"] == ("running" if holds_after else "completed")
    assert len(messages) == (0 if holds_after else 2)
