"""Waiting for something that another process does."""

import time
from collections.abc import Callable

from tests.real_letta.driver import Conversation, Driver
from tests.real_letta.stored import Database
from tests.real_letta.worker_process import Worker


def wait_until(is_so: Callable[[], bool], timeout: float, otherwise: str, worker: Worker) -> None:
    """Return once `is_so`; fail with the end of the worker's log after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not is_so():
        worker.assert_running()
        assert time.monotonic() < deadline, f"{otherwise} within {timeout:.0f} s:\n{worker.log_tail()}"
        time.sleep(0.2)


def start_and_follow(driver: Driver, database: Database, worker: Worker, where: Conversation, prompt: str) -> str:
    """Start a run and return once the worker has stored some of it."""
    run_id = driver.start(where, prompt)
    worker.ensure_started()
    wait_until(lambda: database.chunk_counts().get(run_id, 0) > 20, 90, "the run was not followed", worker)
    return run_id
