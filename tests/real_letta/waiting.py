"""Waiting for something that another process does."""

import time
from collections.abc import Callable

from tests.real_letta.worker_process import Worker


def wait_until(is_so: Callable[[], bool], timeout: float, otherwise: str, worker: Worker) -> None:
    """Return once `is_so`; fail with the end of the worker's log after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not is_so():
        worker.assert_running()
        assert time.monotonic() < deadline, f"{otherwise} within {timeout:.0f} s:\n{worker.log_tail()}"
        time.sleep(0.2)
