"""The status page of a real worker process: what it shows, that it stays true, and that nothing can be done with it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from tests.faults.hostile import StrangeRuns
from tests.faults.test_hostile_ids import TRICKS, assert_harmless, spelt_out
from tests.support.pages import Seen, heard, listening, page_of, talk, watching
from tests.support.rig import SECRET as KEY
from tests.support.rig import working
from tests.support.shell import SECRET
from worker.demo.fake_letta import FakeLetta
from worker.page import routes, snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.support.shell import Shell
    from worker.demo.fake_run import FakeRun

HTML_TRICKS = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></script><h1>",
    "javascript:alert(1)",
    "$state ${figures} &lt;b&gt;",
    "' onmouseover='alert(1)",
]


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


def client_of(shell: Shell) -> httpx.AsyncClient:
    """A browser."""
    return httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False, timeout=10.0)


async def until_ready(client: httpx.AsyncClient) -> None:
    """Wait until the worker is ready."""
    async with asyncio.timeout(15):
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.ConnectError:
                pass
            await asyncio.sleep(0.05)


def figure(event: dict[str, Any], label: str) -> str:
    """A figure's value."""
    (value,) = [figure["value"] for figure in event["figures"] if figure["label"] == label]
    return str(value)


def followed_at(run: FakeRun) -> Callable[[dict[str, Any]], bool]:
    """The run is shown as followed, with all that it has said."""
    cursor = str(len(run.expected_rows()))
    return lambda event: [(row[0]["text"], row[4]["text"]) for row in event["followed"]] == [(run.id, cursor)]


async def test_page_is_what_happens(letta: FakeLetta, sqlite_url: str, tmp_path: Path) -> None:
    """A run is followed, says more, ends, the server goes away: the page says so, without a reload; then by one."""
    shell, config = watching(letta, tmp_path, sqlite_url)
    run = letta.new_run(letta.new_conversation())
    run.say("hello")
    life = shell.start("run", config=config)
    async with client_of(shell) as client:
        await until_ready(client)
        async with asyncio.timeout(30), listening(client) as events:
            event = await heard(events, followed_at(run))
            assert (event["state"], event["reasons"], event["logged"]) == ("ready", [], [])
            assert (figure(event, "Streams open"), figure(event, "Open gaps")) == ("1", "0")
            assert figure(event, "Nearest expiry") == "in 2 h 59 min"
            assert event["followed"][0][1] == {"text": run.conversation_id, "href": "", "tone": ""}
            at = event["at"]
            run.say("and more")
            assert (await heard(events, followed_at(run)))["at"] > at

            seen = Seen((await client.get("/")).text)
            for text in (
                run.id,
                "Ready: the Letta server and the database work.",
                "Every unfinished run; the one that",
            ):
                assert text in seen.text

            run.complete()
            event = await heard(events, lambda event: not event["followed"])
            assert [cell["text"] for cell in event["newest"][0]][-2:] == ["complete", ""]
            assert event["followed_note"] == "No run is unfinished."

            await letta.stop_listening()
            await letta.drop_connections()
            event = await heard(events, lambda event: bool(event["logged"]))
            assert event["state"] == "degraded"
            assert event["reasons"][0].startswith("letta: ")
            assert [cell["text"] for cell in event["logged"][0]][1:3] == ["warning", "discovery.failed"]
            seen = Seen((await client.get("/")).text)
            assert "Degraded: letta in trouble." in seen.text
            assert "discovery.failed" in seen.texts
            await letta.start_listening()
            await heard(events, lambda event: event["state"] == "ready")
    assert await shell.stop(life) == 0


async def test_what_is_stuck_is_named(letta: FakeLetta, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4: what /healthz calls stuck, the page does too; a database that is away is in trouble by its name."""
    letta.password = KEY
    async with working(letta, sqlite_url) as rig, page_of(rig) as (client, health):
        seen = Seen((await client.get("/")).text)
        assert "Starting: the server's runs are listed for the first time." in seen.texts
        assert "letta: no sweep has succeeded yet" in seen.texts
        health.discovery_failed("refused")
        assert "Degraded: letta in trouble." in Seen((await client.get("/")).text).text
        health.discovery_succeeded()
        monkeypatch.setattr(health, "_discovery_moved_at", -1000.0)
        assert "Stuck: discovery should move and does not." in Seen((await client.get("/")).text).texts
        health.discovery_succeeded()
        await rig.query("SELECT 1")
        await asyncio.sleep(snapshot.TICK_SECONDS / 2)
        async with rig.engine.begin() as connection:
            await connection.execute(sa.text("ALTER TABLE rejects RENAME TO gone"))
        seen = Seen((await client.get("/")).text)
        assert "Degraded: database in trouble." in seen.text
        assert "no such table: rejects" in seen.text


async def test_headers(letta: FakeLetta, sqlite_url: str) -> None:
    """The page needs nothing from anywhere else: a strict policy names its style and its script by their content."""
    letta.password = KEY
    async with working(letta, sqlite_url) as rig, page_of(rig) as (client, _):
        answer = await client.get("/")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")
        assert not re.search(r"(?:src|href|action)=\"(?!/)", answer.text)
        assert "url(" not in answer.text
        assert "@import" not in answer.text
        head = await client.head("/")
        assert (head.status_code, head.content, head.headers["content-type"]) == (
            200,
            b"",
            answer.headers["content-type"],
        )
        assert (await client.head("/events")).headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_nothing_is_done(letta: FakeLetta, sqlite_url: str, method: str) -> None:
    """Every path of the port only answers GET and HEAD."""
    letta.password = KEY
    paths = ("/", "/events", "/conversations", "/conversations/conv-1", "/healthz", "/readyz", "/metrics")
    async with working(letta, sqlite_url) as rig, page_of(rig) as (client, _):
        answers = [await client.request(method, path) for path in paths]
    assert {(answer.status_code, answer.headers["allow"]) for answer in answers} == {(405, "GET,HEAD")}


async def test_tricks_stay_text(letta: FakeLetta, sqlite_url: str, tmp_path: Path) -> None:
    """I6: ids, states and words made to be markup, script, links or to turn the text around are shown as they are."""
    fault = StrangeRuns()
    tricks = [*TRICKS[:14], *HTML_TRICKS]
    for number, trick in enumerate(tricks):
        run = letta.new_run(f"conv-{trick}", f"agent-{trick}")
        fault.add(letta, run, f"run-{number}-{trick}")
        run.say(trick)
    letta.faults.append(fault)
    shell, config = watching(letta, tmp_path, sqlite_url, "transcripts = true, ")
    life = shell.start("run", config=config.replace("letta = {", "letta = { max_streams = 40,"))
    async with client_of(shell) as client:
        await until_ready(client)
        plain = Seen((await client.get("/")).text)
        async with asyncio.timeout(20), listening(client) as events:
            event = await heard(events, lambda event: len(event["followed"]) == len(tricks))
        page = (await client.get("/")).text
        seen = Seen(page)
        assert set(seen.tags) <= {*plain.tags, "a", "td", "tr", "li"}
        assert (seen.tags.count("script"), seen.tags.count("style")) == (1, 1)
        assert seen.attributes <= {*plain.attributes, "href", "data-label", "class"}
        assert all(link.startswith("/") for link in seen.links)
        for number, trick in enumerate(tricks):
            assert f"run-{number}-{spelt_out(trick)}" in seen.texts
        assert_harmless(page)
        assert_harmless(json.dumps(event, ensure_ascii=False))

        links = {cell["text"]: cell["href"] for row in event["followed"] for cell in row if cell["href"]}
        assert len(links) == len(tricks)
        for text, link in links.items():
            answer = await client.get(link)
            assert answer.status_code == 200, text
            conversation = Seen(answer.text)
            assert text in conversation.texts
            assert "script" not in conversation.tags
            assert_harmless(answer.text)
    assert await shell.stop(life) == 0


async def test_listeners_are_bounded(letta: FakeLetta, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: so many pages are live at once and no more, and one that is closed makes room."""
    letta.password = KEY
    monkeypatch.setattr(routes, "MAX_LISTENERS", 3)
    monkeypatch.setattr(routes, "TICK_SECONDS", 0.05)
    async with working(letta, sqlite_url) as rig, page_of(rig) as (client, _), AsyncExitStack() as stack:
        for _ in range(2):
            await heard(await stack.enter_async_context(listening(client)), bool)
        async with listening(client) as events:
            await heard(events, bool)
            refused = await client.get("/events")
            assert (refused.status_code, refused.text) == (503, "3 pages are live already.\n")
            assert (await client.get("/")).status_code == 200
        async with asyncio.timeout(5):
            while not await admitted(client):  # noqa: ASYNC110 - the server finds out at its next tick
                await asyncio.sleep(0.05)


async def test_listeners_hold_nothing_up(letta: FakeLetta, sqlite_url: str) -> None:
    """A worker that stops does not wait for who looks at its page; their events end."""
    letta.password = KEY
    async with working(letta, sqlite_url) as rig, AsyncExitStack() as stack:
        async with page_of(rig) as (client, _):
            browser = await stack.enter_async_context(httpx.AsyncClient(base_url=client.base_url, trust_env=False))
            events = await stack.enter_async_context(listening(browser))
            await heard(events, bool)
            began_at = time.monotonic()
        assert time.monotonic() - began_at < 0.8
        assert [event async for event in events] == []


async def admitted(client: httpx.AsyncClient) -> bool:
    """There is room for one more listener."""
    async with client.stream("GET", "/events") as answer:
        return answer.status_code == 200


async def test_store_is_asked_once_for_all(letta: FakeLetta, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: many listeners, however often they are told, cost the store what one does; and nobody costs it nothing."""
    letta.password = KEY
    monkeypatch.setattr(routes, "TICK_SECONDS", 0.02)
    asked: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        asked.extend([statement] if "FROM rejects" in statement else [])

    async with working(letta, sqlite_url) as rig, page_of(rig) as (client, _):
        sa.event.listen(rig.engine.sync_engine, "before_cursor_execute", note)
        try:
            await asyncio.sleep(0.3)
            assert asked == []
            began_at = time.monotonic()
            async with AsyncExitStack() as stack:
                for events in [await stack.enter_async_context(listening(client)) for _ in range(8)]:
                    assert len([await anext(events) for _ in range(20)]) == 20
            assert 1 <= len(asked) <= 1 + (time.monotonic() - began_at) / (snapshot.TICK_SECONDS / 2)
        finally:
            sa.event.remove(rig.engine.sync_engine, "before_cursor_execute", note)


async def test_transcript_is_opened(letta: FakeLetta, database_url: str, tmp_path: Path) -> None:
    """A finished conversation is opened from the page's form and from its link, and says that all of it is there."""
    shell, config = watching(letta, tmp_path, database_url, "transcripts = true, ")
    run = letta.new_run(letta.new_conversation())
    talk(run, "what was <b>said</b>")
    await shell.do("migrate", config=config)
    life = shell.start("run", config=config)
    await shell.until_logged(life, "run.finished")
    async with client_of(shell) as client:
        await until_ready(client)
        found = await client.get("/conversations", params={"id": f" {run.conversation_id} "}, follow_redirects=True)
        (link,) = [link for link in Seen((await client.get("/")).text).links if "run-" in link]
        for answer in (found, await client.get(link)):
            assert answer.status_code == 200
            seen = Seen(answer.text)
            assert {run.id, run.conversation_id, "complete", "what was <b>said</b>", "agent"} <= set(seen.texts)
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert await shell.stop(life) == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/conversations", 400),
        ("/conversations/conv-none", 404),
        ("/conversations/conv-1?run=run-1&after=x", 400),
        ("/conversations/conv-1?run=run-1&after=99999999999999999999", 400),
        ("/conversations/conv-%00", 400),
        ("/conversations/conv-%ff", 404),
        ("/conversations/..%2f..%2fetc%2fpasswd", 404),
    ],
)
async def test_no_such_conversation(letta: FakeLetta, database_url: str, path: str, status: int) -> None:
    """I6: a place that is in no conversation is answered with a sentence, on both databases."""
    letta.password = KEY
    async with working(letta, database_url) as rig, page_of(rig) as (client, _):
        answer = await client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/plain; charset=utf-8")
