"""What the tests of FakeLetta compare: captures of a real letta 0.16.8, and the fake's bytes beside them.

The captures in captures/ are unchanged outputs of curl, redis-cli and a small probe that prints one line
per SSE event; ``probe`` here describes the fake's answers in the same words.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    import httpx

UUID = r"([a-z]+-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|(?<=call_)[0-9a-f]{20}"
DATE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?|datetime\.datetime\([^()]*(\([^()]*\))?\)"


def captured(name: str) -> str:
    """Read a capture as it was taken, carriage returns included."""
    return (Path(__file__).parent / "captures" / f"{name}.txt").read_bytes().decode()


def between(text: str, start: str, end: str) -> str:
    """Cut out what stands between two markers, the first included."""
    found = text[text.index(start) :]
    return found[: found.index(end)]


def normal(text: str) -> str:
    """Replace dates, and each id by its order of appearance, so that which ids are equal still shows."""
    seen: dict[str, str] = {}
    # With its prefix: one otid in 128 is the uuid of its message, too.
    named = re.sub(UUID, lambda found: seen.setdefault(found[0], f"{found[1] or ''}ID{len(seen)}"), text)
    return re.sub(DATE, "DATE", named)


def normal_answer(answer: str) -> str:
    """Make an HTTP answer comparable: header lines in an order of their own, names in lower case."""
    head, body = answer.split("\r\n\r\n", 1)
    status, *lines = head.split("\r\n")
    fields = sorted(f"{name.lower()}:{value}" for name, _, value in (line.partition(":") for line in lines))
    kept = [line for line in fields if not line.startswith(("date:", "connection:"))]
    return normal("\r\n".join([status, *kept, "", body]))


async def raw(url: str, method: str, path: str, body: str = "", **headers: str) -> str:
    """Send a request and return every byte of the answer, chunk framing included."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    lines = [f"{method} {path} HTTP/1.1", "host: letta", f"content-length: {len(body)}", "connection: close"]
    lines += ["content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", body]).encode())
    try:
        return (await asyncio.wait_for(reader.read(), 5)).decode()
    finally:
        writer.close()
        await writer.wait_closed()


async def events(answer: httpx.Response) -> AsyncIterator[str]:
    """Split a stream at its blank lines."""
    rest = ""
    async for text in answer.aiter_text():
        *whole, rest = (rest + text).split("\n\n")
        for event in whole:
            yield event


def in_short(event: str) -> str:
    """Describe an event as the captures' probe does."""
    data = event.split("data: ", 1)[-1]
    kind = "" if event.startswith("data:") else event.split("\n", maxsplit=1)[0] + " "
    try:
        value = json.loads(data)
    except ValueError:
        return f"{kind}{data}"
    unnumbered = data if value.get("message_type") != "ping" and "seq_id" not in value else ""
    text = value.get("content") or value.get("reasoning") or unnumbered
    return f"{kind}{value.get('message_type')} seq={value.get('seq_id', '-')} {text}".rstrip()


async def probe(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: str | None = None,
    patience: float = 2.5,
    *,
    lines: list[str] | None = None,
) -> list[str]:
    """Send a request and describe the answer: status, then one line per event, then how it ended.

    What has come so far can be seen in `lines`, all but the last one.
    """
    lines = [] if lines is None else lines
    try:
        asked = client.stream(method, path, content=body, headers={"content-type": "application/json"})
        async with asyncio.timeout(patience), asked as answer:
            kind = answer.headers["content-type"]
            lines.append(f"HTTP {answer.status_code} {kind}")
            if "event-stream" not in kind:
                return [*lines, (await answer.aread()).decode(), "end: EOF"]
            async for event in events(answer):
                lines.append(in_short(event))
    except TimeoutError:
        return [*lines, "end: TIMEOUT"]
    return [*lines, "end: EOF"]


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the other side does in its own time, but not for ever."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fake has no event for everything a test may wait for
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class Probed:
    """One request of a capture, and what the real server answered."""

    method: str
    path: str
    body: str | None
    answer: list[str]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.body or ''}"


def probed(capture: str, names: Mapping[str, str] | None = None) -> Iterator[Probed]:
    """Walk the requests of a capture, its ids replaced by names the test knows."""
    for old, new in (names or {}).items():
        capture = capture.replace(old, new)
    for block in capture.split(">>> ")[1:]:
        request, *lines = block.split("\n")
        method, path, body = request.split(" ", 2)
        answer: list[str] = []
        for line in lines:
            answer.append(
                re.sub(r"^ +\d+\.\d{3} (end: [A-Z]+.*)?", lambda found: (found[1] or "").split(" (")[0], line)
            )
            if answer[-1].startswith("end: "):
                break
        yield Probed(method, path, body or None, answer)
