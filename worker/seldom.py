"""Asking for what is dear, on behalf of anybody who can reach the port: seldom. Used by census.py and page/.

It may be wanted every second, by many at once: what it costs is bounded.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable


class Seldom:
    """Asks when it is time to, once for all who want to know; `ask` keeps the answer, and handles its own errors.

    Between two questions there are at least `rest_seconds`, and `rest_times` as long as the last one took.
    """

    def __init__(
        self, name: str, ask: Callable[[], Awaitable[None]], *, rest_seconds: float, rest_times: float
    ) -> None:
        self._name = name
        self._ask = ask
        self._rest_seconds = rest_seconds
        self._rest_times = rest_times
        self._due_at = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self, seconds: float) -> None:
        """Ask again if it is time to, and wait so long for it; an answer that takes longer is there the next time."""
        if self._asking is None and time.monotonic() >= self._due_at:
            self._asking = asyncio.create_task(self._ask_once(), name=self._name)
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=seconds)

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _ask_once(self) -> None:
        began_at = time.monotonic()
        try:
            await self._ask()
        finally:
            ended_at = time.monotonic()
            self._due_at = ended_at + max(self._rest_seconds, self._rest_times * (ended_at - began_at))
            self._asking = None
