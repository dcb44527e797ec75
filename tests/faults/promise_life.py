"""One life of a worker in the machine of the promise: the whole service, and a death at a chosen moment.

Used by promise.py. A death is the loss of the database connection and of every task, wherever they are; nothing of
the worker is replaced: the moment is found with SQLAlchemy's events and at the driver's commit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from tests.support.rig import until, working
from worker.errors import WorkerError
from worker.patience import Patience

if TYPE_CHECKING:
    from tests.support.rig import Rig
    from worker.demo.fake_letta import FakeLetta
    from worker.service import Service

Moment = Literal["in a transaction", "before its commit", "after its commit"]

PROMPT = Patience(turn=0.06, silence=0.06, most_silence=0.5, ended=0.1, cancelled=0.1, record=0.1)
CA_FILE = str(Path(__file__).parents[1] / "letta" / "tls" / "certificate.pem")
"""Nothing here is encrypted, but to read the machine's own certificates takes longer than all the rest of a start."""
FAULTS = {"worker.task_failed", "worker.stop_unclean", "database.unavailable"}
"""Log lines that no server and no second worker may cause (I4, I6)."""


class KilledError(BaseException):
    """The process is gone at this statement."""


class Death:
    """Waits at the database for its moment; once it has come, no statement passes any more."""

    def __init__(self, rig: Rig, tally: Counter[str]) -> None:
        self.has_come = False
        self._tally = tally
        self._moment: Moment | None = None
        self._countdown = 0
        writing = rig.transactions.engine
        for engine in {writing, rig.engine.sync_engine}:
            sa.event.listen(engine, "before_cursor_execute", self._at_statement)
        self._commit = writing.dialect.do_commit
        writing.dialect.do_commit = self._at_commit  # type: ignore[method-assign]

    def await_moment(self, moment: Moment, countdown: int) -> None:
        """Come at this moment, after letting so many of its kind pass."""
        self._moment, self._countdown = moment, countdown

    def come(self, moment: str) -> None:
        """Come now."""
        self.has_come = True
        self._tally[f"killed {moment}"] += 1

    def _at_statement(self, connection: sa.Connection, *_: object) -> None:
        if not connection.get_execution_options().get("reads_only"):
            self._pass("in a transaction")
        if self.has_come:
            connection.invalidate()
            raise KilledError

    def _at_commit(self, connection: Any) -> None:
        self._pass("before its commit")
        if self.has_come:  # SQLAlchemy drops the connection for an error of this kind
            raise KilledError
        self._commit(connection)
        self._pass("after its commit")
        if self.has_come:
            raise KilledError

    def _pass(self, moment: Moment) -> None:
        if self._moment == moment and not self.has_come:
            self._countdown -= 1
            if self._countdown < 0:
                self.come(moment)


class Life:
    """A worker that follows everything, from its start until it is stopped or killed."""

    def __init__(self, letta: FakeLetta, database_url: str, tally: Counter[str], **settings: int) -> None:
        self._letta = letta
        self._url = database_url
        self._tally = tally
        self._settings = settings
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._rig: Rig | None = None
        self._death: Death | None = None
        self._service: Service | None = None

    async def start(self) -> None:
        """Begin; returns when it works."""
        self._task = asyncio.create_task(self._live())
        await until(lambda: self._service is not None or self.is_over)
        self.check()

    async def _live(self) -> None:
        settings: dict[str, Any] = {"waits": PROMPT, "ca_file": CA_FILE, **self._settings}
        async with working(self._letta, self._url, commits=False, **settings) as rig:
            self._rig, self._death = rig, Death(rig, self._tally)
            self._service = await rig.service(interval=0.05, max_streams=settings["max_streams"])
            try:
                await self._service.run()
            except WorkerError:
                if not self._death.has_come:
                    raise

    @property
    def is_over(self) -> bool:
        """It does not live any more."""
        return self._task is None or self._task.done()

    @property
    def is_dying(self) -> bool:
        """Its death has come; what is left is to clear up."""
        return self._death is not None and self._death.has_come

    @property
    def followed(self) -> set[str]:
        """The runs it has opened a stream of."""
        return {line["run_id"] for line in self._rig.log.of("run.following")} if self._rig else set()

    @property
    def last_lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The end of its log."""
        return self._rig.log.lines[-40:] if self._rig else []

    def doom(self, moment: Moment, countdown: int) -> None:
        """Let it die at this moment, after letting so many of its kind pass."""
        if self._death is not None:
            self._death.await_moment(moment, countdown)

    def check(self) -> None:
        """It lives as long as nobody kills it, and nothing goes wrong in it (I4, I6)."""
        if self.is_over and not self.is_dying and not self._is_stopping and self._task is not None:
            self._task.result()
            raise AssertionError("the worker ended by itself")
        self._check_log()

    def _check_log(self) -> None:
        if self._rig is not None and not self.is_dying:
            faults = [line for line in self._rig.log.lines if line[0] in FAULTS]
            assert not faults, f"I4, I6: {faults}"
            assert not self._rig.violations, self._rig.violations

    async def kill(self) -> None:
        """Let death come now, if it has not, wherever its tasks are."""
        if self._task is not None and self._death is not None and not self.is_dying:
            self._death.come("at any moment")
            self._task.cancel()
        await self.bury()

    async def bury(self) -> None:
        """Wait until nothing is left of it; what it would still do, the dead connection forbids."""
        if self._task is not None:
            async with asyncio.timeout(10):
                await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    async def stop(self) -> None:
        """Stop it politely."""
        self._is_stopping = True
        self.check()
        if self._service is not None and self._task is not None:
            self._service.stop()
            async with asyncio.timeout(10):
                await self._task
        self._check_log()
