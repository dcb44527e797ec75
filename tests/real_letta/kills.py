"""Kills the worker again and again while runs are streaming, and keeps the proof of what each kill interrupted."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.real_letta.server_log import ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.worker_process import Worker

_FIRST_ROWS_SECONDS = 90  # the server is slow on a busy machine


@dataclass
class Campaign:
    """A series of SIGKILLs.

    A kill counts as landed mid-stream if there is a run of which the killed worker had stored rows, whose log on the
    server had no end after the kill, and held more rows in the end than were stored at the kill.
    """

    worker: Worker
    database: Database
    log: ServerLog
    run_ids: Callable[[], list[str]]
    chance: random.Random
    interrupted: list[dict[str, int]] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many kills there were."""
        return len(self.interrupted)

    def kill_once(self) -> None:
        """Start the worker, let it store something, and kill it at a random moment."""
        before = self.database.chunk_counts()
        self.worker.start()
        if self.chance.random() < 0.9:
            self._wait_for_rows(before)
        time.sleep(self.chance.uniform(0, 1.5))
        self.worker.kill()
        after = self.database.chunk_counts()
        self.interrupted.append(
            {
                run_id: after[run_id]
                for run_id in self.run_ids()
                if after.get(run_id, 0) > before.get(run_id, 0) and not self.log.is_over(run_id)
            }
        )
        assert self.database.cursors_ahead_of_rows() == []

    def landed(self) -> int:
        """How many kills landed mid-stream; to be asked when all runs are over."""
        total = {run_id: len(self.log.read(run_id).rows) for kill in self.interrupted for run_id in kill}
        return sum(any(0 < stored < total[run_id] for run_id, stored in kill.items()) for kill in self.interrupted)

    def probably_landed(self) -> int:
        """How many kills interrupted a run, as far as is known while the runs go on."""
        return sum(bool(kill) for kill in self.interrupted)

    def _wait_for_rows(self, before: dict[str, int]) -> None:
        deadline = time.monotonic() + _FIRST_ROWS_SECONDS
        while time.monotonic() < deadline:
            self.worker.assert_running()
            now = self.database.chunk_counts()
            fresh = [run_id for run_id, count in now.items() if count > before.get(run_id, 0)]
            if any(not self.log.is_over(run_id) for run_id in fresh):
                return
            time.sleep(0.1)
        raise AssertionError(f"nothing stored of a live run within {_FIRST_ROWS_SECONDS} s:\n{self.worker.log_tail()}")
