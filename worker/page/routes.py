"""The status page over HTTP: GET / and its events, and conversations. Read-only. Used by app.py."""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web
from pydantic import SecretStr

from worker.errors import RefusedError
from worker.logs import shown
from worker.page.access import Access
from worker.page.html import POLICY, status_page, transcript_page
from worker.page.snapshot import TICK_SECONDS, Snapshots
from worker.page.view import View, transcript_path, view
from worker.storage.transcripts import Start, Transcripts

MAX_LISTENERS = 20
WRITE_SECONDS = 10.0
"""A listener that takes nothing for so long is gone."""
MOST_POSITION = 2**63 - 1

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Page:
    """Answers for the page. `transcripts` must not be patient: while the database is away nothing can be read."""

    def __init__(self, snapshots: Snapshots, transcripts: Transcripts, access: Access) -> None:
        self._snapshots = snapshots
        self._transcripts = transcripts
        self._access = access
        self._listeners = 0
        self._closing = asyncio.Event()

    def use_token(self, token: SecretStr) -> None:
        """Ask for this one from now on."""
        self._access = msgspec.structs.replace(self._access, token=token)

    def install(self, app: web.Application) -> None:
        """Add the routes to an application; its shutdown ends them."""
        guarded, private = (functools.partial(self._guarded, what) for what in ("page", "transcript"))
        app.add_routes(
            [
                web.get("/", guarded(self._status)),
                web.get("/events", guarded(self._events)),
                web.get("/conversations", private(self._find)),
                web.get("/conversations/{id:[^/]+}", private(self._conversation)),
            ]
        )
        app.on_shutdown.append(self._close)

    async def _close(self, _: web.Application) -> None:
        self._closing.set()
        await self._snapshots.close()

    def _guarded(self, what: str, handler: Handler) -> Handler:
        """Ask who is there first."""

        async def answer(request: web.Request) -> web.StreamResponse:
            refusal = self._access.refusal(request.headers, "transcript" if what == "transcript" else "page")
            if refusal is not None:
                return _sentence(refusal.status, refusal.text, **refusal.headers)
            return await handler(request)

        return answer

    async def _view(self) -> View:
        return view(await self._snapshots.take(), with_transcripts=self._access.transcripts)

    async def _status(self, _: web.Request) -> web.Response:
        return _page(status_page(await self._view(), with_transcripts=self._access.transcripts))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        headers = HEADERS | {"Content-Type": "text/event-stream"}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        if self._listeners >= MAX_LISTENERS:
            return _sentence(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_LISTENERS} pages are live already.")
        response = web.StreamResponse(headers=headers)
        self._listeners += 1
        try:
            await response.prepare(request)
            await self._tell(request, response)
        except ConnectionError:
            pass  # it has left
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._listeners -= 1
        return response

    async def _tell(self, request: web.Request, response: web.StreamResponse) -> None:
        # Asked each time: the token may be another one by now.
        while not self._closing.is_set() and self._access.refusal(request.headers, "page") is None:
            event = b"data: " + msgspec.json.encode(await self._view()) + b"\n\n"
            async with asyncio.timeout(WRITE_SECONDS):
                await response.write(event)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._closing.wait()

    async def _find(self, request: web.Request) -> web.Response:
        """What the page's form asks for."""
        conversation = request.query.get("id", "").strip()
        if not conversation:
            return _sentence(HTTPStatus.BAD_REQUEST, "Say which: /conversations?id=conv-...")
        return web.Response(status=HTTPStatus.SEE_OTHER, headers=HEADERS | {"Location": transcript_path(conversation)})

    async def _conversation(self, request: web.Request) -> web.Response:
        conversation, run_id, after = request.match_info["id"], request.query.get("run"), request.query.get("after")
        is_position = after is None or (after.isdecimal() and after.isascii() and int(after) <= MOST_POSITION)
        # PostgreSQL has no NUL in a text, so no id has one.
        if "\0" in conversation + (run_id or "") or not is_position:
            return _sentence(HTTPStatus.BAD_REQUEST, "There is no such place in a conversation.")
        start = Start(run_id, None if after is None else int(after)) if run_id else None
        try:
            page = await self._transcripts.page(conversation, start)
        except RefusedError as error:
            return _sentence(HTTPStatus.SERVICE_UNAVAILABLE, shown(str(error)))
        if not page.runs:
            return _sentence(HTTPStatus.NOT_FOUND, "Nothing is stored of such a conversation, or from such a run on.")
        return _page(transcript_page(conversation, page))


def _page(html: str) -> web.Response:
    # A lone surrogate, which JSON may hold, is no UTF-8.
    body = html.encode("utf-8", "replace")
    return web.Response(body=body, content_type="text/html", charset="utf-8", headers=HEADERS)


def _sentence(status: HTTPStatus, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers=HEADERS | headers)
