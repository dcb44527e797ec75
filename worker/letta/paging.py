"""Paging through the server's runs, newest first, whichever way its cursors go. Used by client.py.

Letta 0.16.8 has `after` and `before` swapped (letta-protocol e), another version may have them right, and an
unknown cursor is silently ignored. So no name is trusted: a page counts only if all of it is older than the last.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

from worker.core.records import RunRecord
from worker.errors import TroubleError
from worker.letta.answers import RunPage

PageOf = Callable[[int, dict[str, str]], Awaitable[RunPage]]
"""(limit, cursor parameter) -> runs, newest first."""


class Paging:
    """Walks pages, and tries first which parameter led to older runs the last time."""

    def __init__(self) -> None:
        self._names = ["before", "after"]

    async def walk(self, page_of: PageOf, limit: int) -> AsyncIterator[RunPage]:
        """Give page after page until there is nothing older.

        Raises TroubleError when neither parameter leads on, because then runs could be missed silently, and for a
        page of which nothing can be read.
        """
        page = await page_of(limit, {})
        proven: str | None = None  # by a page of this walk: the server may be another version than the last time
        while page.entries:
            yield page
            if page.entries < limit:
                return
            if page.trouble is not None and not page.runs:
                raise page.trouble
            page = await self._older_than(page.runs[-1], page_of, limit, proven)
            proven = self._names[0]

    async def _older_than(self, last: RunRecord, page_of: PageOf, limit: int, proven: str | None) -> RunPage:
        is_moved = False
        for name in tuple(self._names):  # the one that has led on before comes first
            page = await page_of(limit, {name: last.run_id})
            is_older = all(_place(run) < _place(last) for run in page.runs)
            if page.entries and is_older:
                self._names.sort(key=lambda n: n != name)
                return page
            if not page.entries and name == proven:
                return page
            # Nothing newer than the newest looks like nothing older than the oldest: only both together prove an end.
            is_moved = is_moved or bool(page.entries)
        if is_moved and not await self._is_oldest(last, page_of):
            raise TroubleError(
                f"the list of runs does not go on behind {last.run_id}: paging by before and after fails"
            )
        return RunPage((), 0)

    async def _is_oldest(self, last: RunRecord, page_of: PageOf) -> bool:
        """The server's own oldest-first order says whether anything is older."""
        oldest = (await page_of(1, {"order": "asc"})).runs
        return bool(oldest) and _place(oldest[0]) >= _place(last)


def _place(run: RunRecord) -> tuple[object, str]:
    """The server's order: creation time, then id (letta-protocol e)."""
    return run.created_at, run.run_id
