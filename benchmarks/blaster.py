"""A server that gives finished runs as fast as a socket takes them: pre-rendered bytes, one HTTP chunk an event.

A process of its own: `python -m benchmarks.blaster RUNS CHUNKS [FIRST]` prints its port. It knows just enough of
Letta's API to be ingested from, so that what is measured is the ingester; and it tells, at /bench, how many requests it
had and when (time.time()) the first of them was for a stream. Used by `make bench`.
"""

import asyncio
import datetime as dt
import json
import sys
import time
from uuid import UUID


def run_id(number: int) -> str:
    """The id of run `number`."""
    return f"run-{UUID(int=number)}"


MESSAGE = {
    "id": "message-e58e449b-77c3-4036-86b5-f4f8994155fd",
    "date": "2026-11-22T15:03:50+00:00",
    "name": None,
    "message_type": "assistant_message",
    "otid": "e58e449b-77c3-4036-86b5-f4f899415580",
    "sender_id": None,
    "step_id": "step-3e7204da-2885-4a23-9d73-9b8bc4ae7e1e",
    "is_err": None,
}
_EVENT = b"data: " + json.dumps(MESSAGE, separators=(",", ":")).encode()[:-1]
TAIL = (
    b'data: {"message_type":"stop_reason","stop_reason":"end_turn"}\n\n',
    b'data: {"message_type":"usage_statistics","completion_tokens":4,"prompt_tokens":11,"total_tokens":15}\n\n',
    b"data: [DONE]\n\n",
)
"""How every run ends: two chunks without a number, and the marker."""


def event(run: str, seq_id: int) -> bytes:
    """One token's event, 364 bytes as on a real server."""
    return b'%s,"seq_id":%d,"run_id":"%s","content":"tok%06d "}\n\n' % (_EVENT, seq_id, run.encode(), seq_id)


def message(chunks: int) -> dict[str, object]:
    """What a run of so many tokens has said, as the server stores it."""
    return MESSAGE | {"content": "".join(f"tok{seq_id:06d} " for seq_id in range(1, chunks + 1))}


def stream(run: str, chunks: int) -> bytes:
    """The body of a whole run: `chunks` numbered events, stop_reason, usage_statistics, [DONE]."""
    events = [*(event(run, seq_id) for seq_id in range(1, chunks + 1)), *TAIL]
    return b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"


class Blaster:
    """Answers every request of an ingester from memory."""

    def __init__(self, runs: int, chunks: int, first: int, created_at: str) -> None:
        self._runs = [
            {
                "id": run_id(number),
                "status": "completed",
                "created_at": created_at,
                "completed_at": created_at.removesuffix("Z"),
                "agent_id": "agent-1",
                "conversation_id": "conv-1",
                "background": True,
                "stop_reason": "end_turn",
            }
            for number in range(first + runs - 1, first - 1, -1)
        ]
        self._messages = [message(chunks)]
        self._requests = 0
        self._began = 0.0
        self._streams = {run_id(number): stream(run_id(number), chunks) for number in range(first, first + runs)}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                method, target, _ = head.split(b" ", 2)
                writer.write(self._answer(method.decode(), target.decode(), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, method: str, target: str, body: bytes) -> bytes:
        path, _, query = target.partition("?")
        if path == "/bench":
            told = {"requests": self._requests, "began": self._began}
            self._requests, self._began = 0, 0.0
            return _json(told)
        self._requests += 1
        if method == "POST":
            self._began = self._began or time.time()
            wanted = json.loads(body).get("run_id") or path.split("/")[3]
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            return head + self._streams[wanted]
        if path == "/v1/health/":
            return _json({"version": "0.16.8", "status": "ok"})
        if path == "/v1/runs/":
            limit = int(query.partition("limit=")[2].partition("&")[0] or 100)
            after = query.partition("before=")[2].partition("&")[0]
            ids = [run["id"] for run in self._runs]
            first = ids.index(after) + 1 if after else 0
            return _json([] if "after=" in query else self._runs[first : first + limit])
        if path.endswith("/messages"):
            return _json([] if "after=" in query else self._messages)
        return _json(next(run for run in self._runs if run["id"] == path.split("/")[3]))


def _json(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def main() -> None:
    """Serve until killed."""
    created_at = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    runs, chunks, *first = map(int, sys.argv[1:])
    blaster = Blaster(runs, chunks, first[0] if first else 1, created_at)
    server = await asyncio.start_server(blaster.serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
