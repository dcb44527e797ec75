"""What the outside may know: /healthz, /readyz and /metrics. Used by service.py (tells) and app.py (serves).

healthz: the process is alive and moving. readyz: discovery and the database work, or which of them does not.
"""

from typing import Self

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from worker.errors import RefusedError
from worker.observe import Metrics
from worker.storage.committer import Committer

STUCK_SECONDS = 60.0
"""A committer that has work, reports no outage and finishes nothing for so long is stuck."""


class Health:
    """How the worker is, from its own last successes."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._discovery_error: str | None = "no sweep has succeeded yet"
        self.discovery_has_failed = False
        """The last listing failed; before the first one it has not."""

    def discovery_succeeded(self) -> None:
        """A listing worked."""
        self._discovery_error = None
        self.discovery_has_failed = False

    def discovery_failed(self, error: str) -> None:
        """A listing failed."""
        self._discovery_error = error
        self.discovery_has_failed = True

    def is_alive(self) -> bool:
        """Idle, working or waiting for something outside; not stuck inside."""
        return self._committer.is_failing or self._committer.stalled_seconds() < STUCK_SECONDS

    def troubles(self) -> dict[str, str]:
        """What does not work, by name; empty when the worker is ready."""
        troubles = {}
        if self._discovery_error is not None:
            troubles["letta"] = self._discovery_error
        if self._committer.is_failing:
            troubles["database"] = "commits fail and are tried again"
        return troubles


class Monitor:
    """The HTTP listener. Enter it to listen, leave it to stop."""

    def __init__(self, listen: str, health: Health, metrics: Metrics) -> None:
        self._host, _, port = listen.rpartition(":")
        self._port = int(port)
        self._health = health
        self._metrics = metrics
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics_page),
            ]
        )
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

    async def _healthz(self, _: web.Request) -> web.Response:
        is_alive = self._health.is_alive()
        return web.json_response({"status": "ok" if is_alive else "stuck"}, status=200 if is_alive else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        troubles = self._health.troubles()
        body = {"status": "degraded", "troubles": troubles} if troubles else {"status": "ready"}
        return web.json_response(body, status=503 if troubles else 200)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
