"""How runs and their streams go wrong: cancels, the model's failures, and what Redis loses (letta-protocol g)."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.behaviour.server import FAILED_ENDS, Failure, Script
from tests.demo.wire import normal, probe
from tests.support.lives import until

if TYPE_CHECKING:
    import httpx

    from tests.behaviour.server import LettaUnderTest, Run

WITHOUT_PINGS = '{"include_pings":false}'
CANCELLED = 'stop_reason seq=- {"message_type": "stop_reason", "stop_reason": "cancelled"}'


def words(first: int, last: int, ahead: int = 1) -> list[str]:
    """How the words of a run show, numbered behind so many entries."""
    return [f"assistant_message seq={number + ahead} tok{number:06d}" for number in range(first, last + 1)]


def numbers(lines: list[str]) -> list[int]:
    """The numbers that show."""
    return [int(found[1]) for line in lines if (found := re.search(r" seq=(\d+)", line))]


async def cancel(client: httpx.AsyncClient, run: Run) -> httpx.Response:
    """Cancel a run as an application does."""
    return await client.post(f"/v1/conversations/{run.where.name}/cancel")


async def readings_to_the_end(client: httpx.AsyncClient, run: Run, after: int) -> list[list[str]]:
    """Read a cancelled run, behind the last number each time, until its stored end is sent."""
    readings: list[list[str]] = []
    while not readings or readings[-1][-2] != "[DONE]":
        seen = [after, *(number for lines in readings for number in numbers(lines))]
        body = f'{{"batch_size":null,"starting_after":{max(seen)}}}'
        readings.append(await probe(client, "POST", run.stream, body, 60))
        assert len(readings) < 100
    return readings


async def test_cancelled_while_read(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A cancelled run's reader gets a made-up stop_reason and no [DONE]; resuming gives the stored end (g1)."""
    run = await letta.start(Script(words=3, holds_after=2))
    reading = asyncio.create_task(probe(client, "POST", run.stream, WITHOUT_PINGS, 60))
    await asyncio.sleep(letta.silence)  # the server looks for a cancel only now and then

    cancelled = await cancel(client, run)
    again = await cancel(client, run)
    status = (await client.get(f"/v1/runs/{run.id}")).json()["status"]
    unended = await probe(client, "POST", run.stream, '{"starting_after":3,"include_pings":false}', letta.silence)
    await letta.go_on(run)
    broken_off = await reading
    resumed = (await readings_to_the_end(client, run, 3))[-1]
    messages = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    assert (cancelled.status_code, cancelled.json(), status) == (200, {run.id: "cancelled"}, "cancelled")
    assert (again.status_code, normal(again.text)) == (
        409,
        '{"detail":"CONFLICT: No active runs to cancel for conversation conv-ID0"}',
    )
    assert unended == ["end: TIMEOUT"]
    assert broken_off[1:] == ["ping seq=1", *words(1, 2), CANCELLED, "end: EOF"]
    assert resumed[-3:] == [CANCELLED, "[DONE]", "end: EOF"]
    assert messages == []


async def test_cancelled_and_read_again(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Reading a cancelled run is cut off after a while; whoever gets to the cursor too slowly never gets on (g1)."""
    run = await letta.start(Script(words=6001, holds_after=6000))  # a word a look: too many for the quickest machine
    await cancel(client, run)
    await asyncio.sleep(letta.silence)  # the server looks for a cancel only now and then, and the next word is the last
    await letta.go_on(run)

    slow = await probe(client, "POST", run.stream, '{"batch_size":2}', 60)
    rest = await readings_to_the_end(client, run, numbers(slow)[-1])
    too_late = await probe(client, "POST", run.stream, '{"batch_size":2,"starting_after":6001}', 60)

    assert {tuple(lines[-2:]) for lines in [slow, *rest[:-1]]} == {(CANCELLED, "end: EOF")}
    assert rest[-1][-3:] == [CANCELLED, "[DONE]", "end: EOF"]
    heard = [number for lines in [slow, *rest] for number in numbers(lines)]
    assert heard == list(range(1, 6002))
    unheard = [line for line in too_late[1:] if not line.startswith("ping")]
    assert (set(unheard[:-1]), unheard[-1]) == ({CANCELLED}, "end: EOF")


@pytest.mark.parametrize("failure", list(FAILED_ENDS))
async def test_model_fails(letta: LettaUnderTest, client: httpx.AsyncClient, failure: Failure) -> None:
    """A failed run ends with a numbered error and no [DONE]; behind it is silence, and no message is kept (g2)."""
    said, end = 1 if failure in {"error", "close"} else 0, FAILED_ENDS[failure]
    run = await letta.start(Script(fails_after=said, failure=failure))

    lines = await probe(client, "POST", run.stream, "{}")
    last = numbers(lines)[-1]
    (error,) = (await client.post(run.stream, json={"starting_after": last - 1})).text.splitlines()[1::3]
    behind = await probe(
        client, "POST", run.stream, f'{{"starting_after":{last},"include_pings":false}}', letta.silence
    )
    shown = (await client.get(f"/v1/runs/{run.id}")).json()
    messages = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    reasons = [
        f'stop_reason seq=- {{"message_type":"stop_reason","stop_reason":"{word}"}}' for word in end.stop_reasons
    ]
    assert lines[1:] == ["ping seq=1", *words(1, said), *reasons, f"event: error error_message seq={last}", "end: EOF"]
    assert last == 1 + said + len(reasons) + 1
    said_of_it = {"error_type": end.error_type, "message": end.message, "detail": end.detail}
    whole = {"message_type": "error_message", "run_id": run.id, **said_of_it, "seq_id": last}
    assert json.loads(error.removeprefix("data: ")) == whole
    assert shown["metadata"]["error"] == whole | {"seq_id": None}
    assert (shown["status"], shown["stop_reason"]) == ("failed", end.stop_reasons[-1])
    assert messages == []
    assert behind == ["end: TIMEOUT"]


async def test_vanished_stream(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A run whose log is lost hangs, although its record and its messages say that it is complete (d, g4)."""
    run = await letta.start(Script(words=2))
    await letta.lose(run)

    silent = await probe(client, "POST", run.stream, WITHOUT_PINGS, letta.silence)
    shown = (await client.get(f"/v1/runs/{run.id}")).json()
    messages = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    assert silent == ["end: TIMEOUT"]
    assert (shown["status"], len(messages)) == ("completed", 2)


async def test_repeated_batch(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """A batch that was written twice is sent twice, numbers going backwards; a cursor filters both copies (g5)."""
    run = await letta.start(Script(words=5, holds_after=4))
    await letta.repeat(run, 3, 5)
    await letta.go_on(run)

    whole = await probe(client, "POST", run.stream, "{}")
    resumed = await probe(client, "POST", run.stream, '{"starting_after":4}')

    assert numbers(whole) == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert numbers(resumed) == [5, 5, 6]
    assert whole[-2:] == resumed[-2:] == ["[DONE]", "end: EOF"]


async def test_trimmed_log(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """What was trimmed away is skipped without a word, also behind a cursor that lies in it (g6)."""
    run = await letta.start(Script(words=5))
    await letta.trim(run, before=4)

    whole = await probe(client, "POST", run.stream, "{}")
    resumed = await probe(client, "POST", run.stream, '{"starting_after":2}')

    assert numbers(whole) == numbers(resumed) == [4, 5, 6]
    assert whole[-2:] == ["[DONE]", "end: EOF"]


async def test_log_longer_than_10000(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """Of 13,000 words the log keeps the last 10,000 or so, the message all of them (g6)."""
    run = await letta.start(Script(words=13_000))

    seen = numbers(await probe(client, "POST", run.stream, '{"batch_size":1000}', 120))
    (_, message) = (await client.get(f"/v1/runs/{run.id}/messages")).json()

    assert 2_900 < seen[0] < 3_100
    assert seen == list(range(seen[0], 13_002))
    assert message["content"].count("tok") == 13_000


async def test_redis_goes_and_comes(letta: LettaUnderTest, client: httpx.AsyncClient) -> None:
    """When Redis goes, readers without pings are told, others just end; then a stream is an empty 500 (d, g4)."""
    run = await letta.start(Script(words=2, holds_after=1))
    heard: dict[str, list[str]] = {WITHOUT_PINGS: [], "{}": []}
    reading = [
        asyncio.create_task(probe(client, "POST", run.stream, body, 60, lines=lines)) for body, lines in heard.items()
    ]
    await until(lambda: all(len(lines) >= 3 for lines in heard.values()), 30)
    await letta.redis_goes()
    try:
        told, ended = await asyncio.gather(*reading)
        down = await probe(client, "POST", run.stream, "{}", 60)
        listed = await client.get(f"/v1/runs/{run.id}")
    finally:
        await letta.redis_comes()
    lost = await probe(client, "POST", run.stream, WITHOUT_PINGS, letta.silence)

    assert told[1:3] == ended[1:3] == ["ping seq=1", "assistant_message seq=2 tok000001"]
    assert re.fullmatch(
        r'event: error None seq=- \{"error": "Error 111 connecting .*", "code": "INTERNAL_SERVER_ERROR"\}', told[3]
    )
    assert told[4:] == ["end: EOF"]
    assert set(ended[3:-1]) <= {"ping seq=2"}
    assert ended[-1] == "end: EOF"
    assert down == ["HTTP 500 text/event-stream; charset=utf-8", "end: EOF"]
    assert listed.json()["status"] == "running"
    assert lost == ["end: TIMEOUT"]
