"""What the outside may know: /healthz, /readyz and /metrics. Used by service.py (tells), page/ and app.py (serves).

healthz: the process is alive and moving, or what of it is stuck. readyz: the server and the database work, or which of
them does not.
"""

import time
from collections.abc import Callable
from typing import Self

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from worker.census import Census
from worker.errors import RefusedError
from worker.metrics import Metrics
from worker.storage.committer import Committer
from worker.storage.reads import Reads

STUCK_SECONDS = 60.0
"""Who has work, reports no outage and gets nothing done for so long is stuck: requests and statements end sooner."""

ANSWER_SECONDS = 2.0
"""Whoever asks whether the worker is ready, or for its figures, waits so long for the database; probes give up then."""


class Health:
    """How the worker is, from its own last successes."""

    def __init__(self, committer: Committer, reads: Reads, discovery_interval: float) -> None:
        self._committer = committer
        self._reads = reads
        self._discovery_interval = discovery_interval
        self._discovery_moved_at = time.monotonic()
        self._discovery_error: str | None = "no sweep has succeeded yet"
        self.discovery_has_failed = False
        """The last listing failed; before the first one it has not."""

    def discovery_moved(self) -> None:
        """A page of runs was listed: however long the listing takes, it is not stuck."""
        self._discovery_moved_at = time.monotonic()

    def discovery_succeeded(self) -> None:
        """A listing worked."""
        self.discovery_moved()
        self._discovery_error = None
        self.discovery_has_failed = False

    def discovery_failed(self, error: str) -> None:
        """A listing failed."""
        self._discovery_error = error
        self.discovery_has_failed = True

    @property
    def is_starting(self) -> bool:
        """The first listing is under way: it has neither succeeded nor failed."""
        return self._discovery_error is not None and not self.discovery_has_failed

    def stuck(self) -> list[str]:
        """What does not move although nothing outside holds it up; empty when all is idle, working or waiting."""
        stuck = []
        if not self._committer.is_failing and self._committer.stalled_seconds() >= STUCK_SECONDS:
            stuck.append("committer")
        still = time.monotonic() - self._discovery_moved_at
        # Between two attempts it may have to wait longer than that, and while the database is away, too.
        is_waiting = self.discovery_has_failed or self._committer.is_failing
        if not is_waiting and still >= self._discovery_interval + STUCK_SECONDS:
            stuck.append("discovery")
        return stuck

    async def troubles(self) -> dict[str, str]:
        """What does not work, by name; empty when the worker is ready. An idle worker finds out by asking."""
        troubles = self.known_troubles()
        if "database" not in troubles and (trouble := await self._reads.trouble(ANSWER_SECONDS)) is not None:
            troubles["database"] = trouble
        return troubles

    def known_troubles(self) -> dict[str, str]:
        """The same without asking the database: what has been met so far."""
        troubles = {}
        if self._discovery_error is not None:
            troubles["letta"] = self._discovery_error
        if self._committer.is_failing:
            troubles["database"] = "commits fail and are tried again"
        return troubles


class Monitor:
    """The HTTP listener. Enter it to listen, leave it to stop. `install` adds what else is to be answered."""

    def __init__(
        self,
        listen: str,
        health: Health,
        metrics: Metrics,
        census: Census,
        install: Callable[[web.Application], None] = lambda _: None,
    ) -> None:
        self._host, _, port = listen.rpartition(":")
        self._port = int(port)
        self._health = health
        self._metrics = metrics
        self._census = census
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics_page),
            ]
        )
        install(app)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)

    async def __aenter__(self) -> Self:
        """Listen. Raises RefusedError when the address cannot be had."""
        await self._runner.setup()
        host = self._host.strip("[]")
        try:
            await web.TCPSite(self._runner, host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise RefusedError(f"service.listen: cannot listen on {host}:{self._port}: {error.strerror}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening."""
        await self._runner.cleanup()
        await self._census.close()

    async def _healthz(self, _: web.Request) -> web.Response:
        stuck = self._health.stuck()
        body = {"status": "stuck", "stuck": stuck} if stuck else {"status": "ok"}
        return web.json_response(body, status=503 if stuck else 200)

    async def _readyz(self, _: web.Request) -> web.Response:
        troubles = await self._health.troubles()
        body = {"status": "degraded", "troubles": troubles} if troubles else {"status": "ready"}
        return web.json_response(body, status=503 if troubles else 200)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        await self._census.refresh(ANSWER_SECONDS)
        return web.Response(body=generate_latest(self._metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
