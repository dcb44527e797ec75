"""A server of live runs that come and go for ever; prints its port.

`python -m benchmarks.live RUNS RATE CHUNKS [RAMP]`: RUNS runs are alive at any time; each says RATE chunks a second, in
bursts twice a second as the real server does, and ends after CHUNKS; then the next one starts. Without RAMP the first
ones are at different points of their lives already; with it they start one after the other within so many seconds. All
of it is computed from a run's number and the clock, so that the load costs no memory and what must be stored of each
run is known to whoever knows the arguments (tests/soak, and `make bench`).
"""

import asyncio
import datetime as dt
import json
import sys
import time
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from benchmarks.blaster import TAIL, event, message, run_id

BURST_SECONDS = 0.5
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


class Live:
    """Which runs there are, and what each has said so far. Times are of the wall clock, in seconds."""

    def __init__(self, runs: int, rate: float, chunks: int, begun: float, ramp: float | None = None) -> None:
        self._runs = runs
        self._rate = rate
        self._chunks = chunks
        self._seconds = chunks / rate
        self._begun = begun if ramp is not None else begun - self._seconds
        self._ramp = self._seconds if ramp is None else ramp

    def started(self, number: int) -> float:
        """When run `number` (from 0) starts. Of every RUNS runs each starts when the one RUNS before it ends."""
        generation, place = divmod(number, self._runs)
        return self._begun + generation * self._seconds + place / self._runs * self._ramp

    def newest(self, now: float) -> int:
        """The number of the newest run."""
        generation, since = divmod(now - self._begun, self._seconds)
        return int(generation) * self._runs + min(int(since / self._ramp * self._runs), self._runs - 1)

    def said(self, number: int, now: float) -> int:
        """How many chunks the run has said; the last burst may be half a second ago."""
        bursts = int((now - self.started(number)) / BURST_SECONDS)
        return min(self._chunks, int(bursts * BURST_SECONDS * self._rate))

    def is_over(self, number: int, now: float) -> bool:
        """It has said everything."""
        return self.said(number, now) == self._chunks

    def record(self, number: int, now: float) -> dict[str, object]:
        """The run as the server lists it."""
        is_over = self.is_over(number, now)
        started = dt.datetime.fromtimestamp(self.started(number), dt.UTC)
        ended = started + dt.timedelta(seconds=self._seconds)
        return {
            "id": run_id(number),
            "status": "completed" if is_over else "running",
            "created_at": started.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "completed_at": ended.strftime("%Y-%m-%dT%H:%M:%S.%f") if is_over else None,
            "agent_id": "agent-1",
            "conversation_id": f"conv-{number % self._runs}",
            "background": True,
            "stop_reason": "end_turn" if is_over else None,
        }

    async def stream(self, number: int, cursor: int) -> AsyncIterator[bytes]:
        """What the run says after the cursor, burst by burst, as HTTP chunks."""
        run = run_id(number)
        while True:
            now = time.time()
            said = self.said(number, now)
            if events := [event(run, seq_id) for seq_id in range(cursor + 1, said + 1)]:
                yield b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events)
                cursor = said
            if cursor >= self._chunks:
                break
            await asyncio.sleep(BURST_SECONDS - (now - self.started(number)) % BURST_SECONDS)
        yield b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in TAIL) + b"0\r\n\r\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                method, target, _ = head.decode().split(" ", 2)
                if method == "POST":
                    asked = json.loads(body)
                    writer.write(HEAD)
                    async for events in self.stream(number_of(asked["run_id"]), asked["starting_after"]):
                        writer.write(events)
                        await writer.drain()
                else:
                    answer = json.dumps(self._answer(target)).encode()
                    kind = b"content-type: application/json\r\ncontent-length: "
                    writer.write(b"HTTP/1.1 200 OK\r\n%s%d\r\n\r\n%s" % (kind, len(answer), answer))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, target: str) -> object:
        now, url = time.time(), urlsplit(target)
        query, words = parse_qs(url.query), url.path.strip("/").split("/")
        if words == ["v1", "health"]:
            return {"version": "0.16.8", "status": "ok"}
        if words == ["v1", "runs"]:
            if "after" in query:  # it pages the wrong way round, as the real one does: these would be newer
                return []
            newest = number_of(query["before"][0]) - 1 if "before" in query else self.newest(now)
            last = max(-1, newest - int(query["limit"][0]))
            return [self.record(number, now) for number in range(newest, last, -1)]
        number = number_of(words[2])
        if words[-1] == "messages":
            is_first_page = "after" not in query and self.is_over(number, now)
            return [message(self._chunks)] if is_first_page else []
        return self.record(number, now)


def number_of(run: str) -> int:
    """The number of a run."""
    return UUID(run.removeprefix("run-")).int


async def main() -> None:
    """Serve until killed."""
    runs, rate, chunks, *ramp = sys.argv[1:]
    live = Live(int(runs), float(rate), int(chunks), time.time(), float(ramp[0]) if ramp else None)
    server = await asyncio.start_server(live.serve, "127.0.0.1", 0, backlog=10_000)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
