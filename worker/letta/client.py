"""LettaClient: the five calls of Letta's API the worker needs. Used by discovery, follower, backfill and `check`.

What it knows of the server was measured on Letta 0.16.8; `letta-protocol` below names the section of that record
(docs/protocol.md).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
import msgspec
from pydantic import SecretStr

from worker.core.chunks import Event, parse
from worker.core.records import MessageRecord, RunRecord
from worker.core.sse import SseDecoder
from worker.errors import (
    NotFoundError,
    NotStreamableError,
    RunExpiredError,
    RunIdIgnoredError,
    TroubleError,
    WorkerError,
)
from worker.letta.answers import (
    RunPage,
    error_of,
    is_event_stream,
    read_ids,
    read_messages,
    read_run,
    read_runs,
    read_version,
    without_key,
)
from worker.letta.paging import Paging
from worker.metrics import Metrics

MAX_ANSWER_BYTES = 128 * 1024 * 1024
"""A JSON answer larger than this is refused, and so are messages of one run, so that memory stays bounded (I8)."""
MESSAGE_OVERHEAD = 1000
"""Bytes a message costs besides its payload, however small."""
MAX_ERROR_BYTES = 64 * 1024
"""So much is read of an error's body."""
ANSWER_SECONDS = 300.0
"""An answer that is not whole after so long is given up: bytes that drip in outwit every timeout between them."""
RUNS_A_PAGE = 100
QUESTIONS_AT_ONCE = 4
"""REST requests under way at once: each costs the server a database connection, as a stream does."""
MESSAGES_A_PAGE = 100
BYTES_A_TURN = 16 * 1024
"""A stream that brings so much in one read is catching up, and gives the other streams a turn before the next."""


class StreamOptions(msgspec.Struct, frozen=True):
    """The parameters of the stream endpoints that are the same for every run."""

    batch_size: int = 1000
    poll_interval: float = 0.1
    include_pings: bool = True
    max_event_bytes: int = 32 * 1024 * 1024


class Address(msgspec.Struct, frozen=True):
    """Where one run's stream is asked for.

    `conversation_id` is any form the server takes: `conv-...`, `default` with `agent_id`, or `agent-...`; None
    addresses the run's own endpoint, which cannot answer for another run (letta-protocol d).
    """

    run_id: str
    conversation_id: str | None = None
    agent_id: str | None = None

    @classmethod
    def of(cls, run: RunRecord, *, by_run: bool) -> "Address":
        """The conversation endpoint, or, where `by_run` asks for it or the run names no place, the run's own."""
        if by_run or (run.conversation_id is None and run.agent_id is None):
            return cls(run.run_id)
        return cls(run.run_id, run.conversation_id or "default", run.agent_id)

    @property
    def is_by_run(self) -> bool:
        """The address itself names the run, not only the request's body."""
        return self.conversation_id is None


class LettaClient:
    """Letta's API as the worker sees it. Raises the errors of worker/errors.py and nothing else.

    `http` carries base URL, credentials, timeouts and TLS settings.
    """

    def __init__(self, http: httpx.AsyncClient, options: StreamOptions, metrics: Metrics) -> None:
        self._http = http
        self._options = options
        self._metrics = metrics
        self._paging = Paging()
        self._asking = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    def use_key(self, key: SecretStr | None) -> None:
        """Send this key, or none, with every request from now on; streams that are open stay open."""
        self._http.headers.pop("authorization", None)
        if key is not None:
            self._http.headers["authorization"] = f"Bearer {key.get_secret_value()}"

    @property
    def _key(self) -> str:
        """What no error may hold. Not kept as a field, which a debugger would show."""
        return _key_in(self._http.headers)

    async def server_version(self) -> str:
        """The server's version, e.g. `0.16.8`; needs no credentials (letta-protocol j)."""
        return read_version(await self._get("/v1/health/"))

    async def newest_runs(self, limit: int = RUNS_A_PAGE) -> AsyncIterator[RunPage]:
        """All runs of the server, newest first, page by page; never loops and never skips (paging.py)."""
        async for page in self._paging.walk(self._run_page, limit):
            yield page

    async def retrieve_run(self, run_id: str) -> RunRecord:
        """One run's record. Raises NotFoundError when the server does not know it."""
        run = read_run(await self._get(f"/v1/runs/{_quoted(run_id)}"))
        if run.run_id != run_id:
            raise TroubleError(f"the server answered with something else than run {run_id}")
        return run

    async def conversations_of(self, agent_id: str, limit: int = 1000) -> list[str]:
        """The ids of an agent's conversations, newest first, at most `limit`."""
        return read_ids(await self._get("/v1/conversations/", agent_id=agent_id, limit=limit))

    async def run_messages(self, run_id: str) -> AsyncIterator[list[MessageRecord]]:
        """The messages the server stored for a run, oldest first, page by page.

        A page's length says nothing about the end, because `limit` counts stored messages and not items
        (letta-protocol f): the walk ends with the first page that brings nothing new. Raises TroubleError when all
        pages together are larger than an answer may be.
        """
        seen: set[tuple[str, str | None, str | None]] = set()
        size = 0
        after: dict[str, str] = {}
        while True:
            path = f"/v1/runs/{_quoted(run_id)}/messages"
            page = read_messages(await self._get(path, order="asc", limit=MESSAGES_A_PAGE, **after))
            new = [m for m in page if (m.message_id, m.otid, m.message_type) not in seen]
            if not new:
                return
            size += sum(MESSAGE_OVERHEAD + len(message.payload) for message in new)
            if size > MAX_ANSWER_BYTES:
                raise TroubleError(f"the run's messages are larger than {MAX_ANSWER_BYTES} bytes, or without end")
            seen.update((m.message_id, m.otid, m.message_type) for m in new)
            after = {"after": new[-1].message_id}
            yield new

    @contextlib.asynccontextmanager
    async def stream(self, address: Address, cursor: int) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """Open a run's stream after `cursor` and give what each read from the socket completes.

        A list may be empty: bytes came, but no event is whole yet. Entering waits for the first event, because the
        server sends its headers only with it (letta-protocol d). The body is always an object: an empty one makes
        the server's reader die (letta-protocol c).
        """
        with self._as_worker_errors():
            request = self._http.build_request(
                "POST",
                _stream_path(address),
                json=self._stream_body(address, cursor),
                headers={"accept": "text/event-stream", "accept-encoding": "identity"},
            )
            response = await self._http.send(request, stream=True)
        try:
            _check_layers(response, most=0)  # asked for identity; unpacked, one read could be a million events
            if response.status_code != httpx.codes.OK:
                with self._as_worker_errors():
                    async with asyncio.timeout(ANSWER_SECONDS):
                        error = await self._error_in(response)
                raise _refusal_of(address, error)
            if not is_event_stream(response.headers):
                kind = response.headers.get("content-type", "nothing")
                raise TroubleError(f"the server answered a stream request with {kind}: is base_url a Letta server?")
            async with contextlib.aclosing(self._events(response)) as events:
                yield events
        finally:
            # Closing must finish although the task that reads is being cancelled, or the connection leaks.
            await asyncio.shield(response.aclose())

    async def _events(self, response: httpx.Response) -> AsyncGenerator[list[Event], None]:
        decoder = SseDecoder(self._options.max_event_bytes)
        with self._as_worker_errors():
            async for received in response.aiter_raw():
                self._metrics.received_bytes.inc(len(received))
                yield [parse(event) for event in decoder.feed(received)]
                if len(received) >= BYTES_A_TURN:
                    await asyncio.sleep(0)  # more may be there already, and would come without waiting

    async def _error_in(self, response: httpx.Response) -> WorkerError:
        sent = _key_in(response.request.headers)  # which may be another one by now
        return error_of(response.status_code, response.headers, await _read_beginning(response), sent)

    @contextlib.contextmanager
    def _as_worker_errors(self) -> Iterator[None]:
        """Foreign exceptions end here: whatever the network does is trouble to wait out."""
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, aiohttp.ClientError, OSError) as error:
            trouble = TroubleError(without_key(" ".join(_described(error).split()), self._key))
            trouble.is_outage = True
            raise trouble from error

    def _stream_body(self, address: Address, cursor: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "starting_after": cursor,
            "batch_size": self._options.batch_size,
            "poll_interval": self._options.poll_interval,
            "include_pings": self._options.include_pings,
        }
        if not address.is_by_run:
            body["run_id"] = address.run_id
            if address.conversation_id == "default":
                body["agent_id"] = address.agent_id
        return body

    async def _run_page(self, limit: int, cursor: dict[str, str]) -> RunPage:
        return read_runs(await self._get("/v1/runs/", **({"order": "desc"} | cursor), limit=limit))

    async def _get(self, path: str, **query: str | int) -> bytes:
        with self._as_worker_errors():
            async with (
                self._asking,
                asyncio.timeout(ANSWER_SECONDS),
                self._http.stream("GET", path, params=query) as response,
            ):
                _check_layers(response, most=1)
                if response.status_code != httpx.codes.OK:
                    raise await self._error_in(response)
                return await _read_bounded(response, MAX_ANSWER_BYTES)


def _key_in(headers: httpx.Headers) -> str:
    return str(headers.get("authorization", "")).removeprefix("Bearer ")


def _refusal_of(address: Address, error: WorkerError) -> WorkerError:
    """A server that ignores `run_id` speaks of the conversation's newest active run: of ours that says nothing."""
    may_be_another_run = isinstance(error, RunExpiredError | NotStreamableError) or "No active runs" in str(error)
    return RunIdIgnoredError(str(error)) if may_be_another_run and not address.is_by_run else error


def _stream_path(address: Address) -> str:
    if address.conversation_id is None:
        return f"/v1/runs/{_quoted(address.run_id)}/stream"
    return f"/v1/conversations/{_quoted(address.conversation_id)}/stream"


def _quoted(identifier: str) -> str:
    """An id as one path segment. Dots alone would climb out of it even when quoted, and no id is made of them."""
    if not identifier.strip("."):
        raise NotFoundError(f"no server has the id {identifier!r}")
    return quote(identifier, safe="", errors="replace")


def _check_layers(response: httpx.Response, most: int) -> None:
    """Of what is packed twice, one small read may unpack to gigabytes at once (I8)."""
    layers = [name for name in response.headers.get_list("content-encoding", split_commas=True) if name != "identity"]
    if len(layers) > most:
        raise TroubleError(f"the server's answer is packed as {', '.join(layers)}, which nobody asked for")


async def _read_bounded(response: httpx.Response, max_bytes: int) -> bytes:
    body = bytearray()
    async for received in response.aiter_bytes():
        body += received
        if len(body) > max_bytes:
            raise TroubleError(f"the server's answer is larger than {max_bytes} bytes")
    return bytes(body)


async def _read_beginning(response: httpx.Response) -> bytes:
    """As much of an error's body as its message needs; a long one must not hide the status."""
    body = bytearray()
    async for received in response.aiter_bytes():
        body += received
        if len(body) >= MAX_ERROR_BYTES:
            break
    return bytes(body[:MAX_ERROR_BYTES])


def _described(error: Exception) -> str:
    """What aiohttp calls it: its transport for httpx calls a reset, and much else, a ConnectTimeout."""
    cause = error.__cause__ if isinstance(error.__cause__, aiohttp.ClientError) else error
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "ServerDisconnectedError"  # its text may be half an answer with all its headers
    if type(cause) is TimeoutError and not str(cause):
        return f"the answer was not whole after {ANSWER_SECONDS:.0f} s"
    said = str(cause).replace(" ssl:default", "")  # aiohttp's word for its default, also where there is no TLS
    return f"{type(cause).__name__}: {said}" if said else type(cause).__name__
