"""Places: the few streams the server can bear at once, shared fairly. Used by follower.py.

Each open stream costs the server database queries, and 150 of them made it refuse service (letta-protocol h).
"""

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator

ENDANGERED_AFTER = dt.timedelta(hours=2, minutes=30)
"""A run this old loses its stream soon (at three hours) and goes before the others."""


class Places:
    """First come, first served, but endangered runs go first, the oldest of them before the others."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[asyncio.Future[None], dt.datetime] = {}

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for a place."""
        return bool(self._waiting)

    @contextlib.asynccontextmanager
    async def place(self, created_at: dt.datetime) -> AsyncIterator[None]:
        """Hold one place for a run created then."""
        await self._take(created_at)
        try:
            yield
        finally:
            self._free += 1
            self._pass_on()

    async def _take(self, created_at: dt.datetime) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = created_at
        self._pass_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was ours just as the wait was given up
                self._free += 1
            self._waiting.pop(turn, None)
            self._pass_on()
            raise

    def _pass_on(self) -> None:
        now = dt.datetime.now(dt.UTC)
        while self._free and self._waiting:
            endangered = [turn for turn, created_at in self._waiting.items() if now - created_at > ENDANGERED_AFTER]
            turn = min(endangered, key=self._waiting.__getitem__) if endangered else next(iter(self._waiting))
            del self._waiting[turn]
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
