"""The worker's commands against a real server: a drained `run`, `check` and `status`."""

import json
import time

import pytest

from tests.real_letta.comparison import compare
from tests.real_letta.conftest import MakeWorker
from tests.real_letta.driver import Driver
from tests.real_letta.server_log import ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.waiting import wait_until

pytestmark = pytest.mark.real


def test_sigterm_drains_and_the_next_worker_goes_on(
    database: Database, make_worker: MakeWorker, driver: Driver, log: ServerLog
) -> None:
    """SIGTERM mid-run ends the worker with 0 within 10 s, and the next one completes the run (I2, I3)."""
    where = driver.make_conversation(driver.make_agent())
    worker = make_worker(conversations=[where.name])
    worker.start()
    run_id = driver.start(where, "[n=300] [delay=0.03]")
    wait_until(lambda: database.chunk_counts().get(run_id, 0) > 10, 90, "the run was not followed", worker)

    started = time.monotonic()
    assert worker.drain(timeout=10) == 0, worker.log_tail()
    assert time.monotonic() - started < 10
    assert not log.is_over(run_id), "the run was over before the worker was told to stop"
    assert database.cursors_ahead_of_rows() == []

    worker.start()
    wait_until(lambda: database.is_complete(run_id), 60, "the run was not completed", worker)
    assert worker.drain(timeout=10) == 0, worker.log_tail()
    findings = compare(database, log, driver, [run_id])
    assert not findings.wrong, findings.report()


def test_check_says_yes_to_a_real_server(make_worker: MakeWorker, database: Database) -> None:
    """`check` finds nothing wrong with a real server and an up-to-date database (I7)."""
    worker = make_worker(watch_all=True)
    assert worker.command("migrate").returncode == 0, worker.log_tail()
    checked = worker.command("check")
    assert checked.returncode == 0, checked.stdout + worker.log_tail()
    assert "0.16.8" in checked.stdout


def test_status_is_json(make_worker: MakeWorker, driver: Driver, log: ServerLog, database: Database) -> None:
    """`status --json` prints one JSON object about what is stored (promise 4)."""
    where = driver.make_conversation(driver.make_agent())
    run_id = driver.start(where, "[n=5]")
    log.wait_until_over([run_id], 120)
    worker = make_worker(conversations=[where.name])
    assert worker.catch_up() == 0, worker.log_tail()
    status = worker.command("status", "--json")
    assert status.returncode == 0, status.stdout + worker.log_tail()
    assert isinstance(json.loads(status.stdout), dict)
