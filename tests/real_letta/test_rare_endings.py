"""Endings that are not the normal one, provoked on the real server: a lost head, trimming, expiry, no background."""

import time

import pytest

from tests.real_letta.comparison import Findings, compare_rows, stored_rows
from tests.real_letta.conftest import MakeWorker, Say
from tests.real_letta.driver import Driver
from tests.real_letta.lab.lab import Lab
from tests.real_letta.server_log import ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.waiting import start_and_follow

pytestmark = pytest.mark.real
# What the worker makes of the outages takes minutes (test_survival.py): the tests marked so run meanwhile.
during_outages = pytest.mark.usefixtures("outages")


def test_beheaded_run_has_its_gap(
    lab: Lab, make_worker: MakeWorker, sqlite_database: Database, driver: Driver, log: ServerLog
) -> None:
    """What a restart of Redis lost before the worker read it is a gap, and all after it is stored (I1, I2, I5)."""
    where = driver.make_conversation(driver.make_agent())
    worker = make_worker(conversations=[where.name])
    run_id = start_and_follow(driver, sqlite_database, worker, where, "[n=200] [delay=0.03] [pause=6@150]")
    worker.kill()
    head = stored_rows(sqlite_database, run_id)
    while log.length(run_id) < 151:  # the ping and all words before the pause, in which the server writes nothing
        time.sleep(0.1)
    lab.redis.kill()
    lab.redis.start()
    log.wait_until_over([run_id], 120)
    assert worker.catch_up() == 0, worker.log_tail()
    server = log.read(run_id)
    assert server.rows[0].seq_id == 152
    findings = Findings()
    compare_rows(findings, run_id, [*head, *server.rows], stored_rows(sqlite_database, run_id))
    assert not findings.wrong, findings.report()
    assert sqlite_database.gaps(run_id) == [(len(head) + 1, 151)]
    assert sqlite_database.state(run_id) == "incomplete"


@during_outages
def test_expired_run_is_backfilled(
    lab: Lab, make_worker: MakeWorker, sqlite_database: Database, driver: Driver, log: ServerLog
) -> None:
    """Of a run older than three hours the messages are fetched and the lack of chunks is on record (I5, promise 3)."""
    where = driver.make_conversation(driver.make_agent())
    run_id = driver.start(where, "[n=5]")
    log.wait_until_over([run_id], 120)
    driver.wait([run_id])
    _make_old(lab, run_id)
    assert make_worker(conversations=[where.name]).catch_up() == 0
    assert sqlite_database.state(run_id) == "backfilled"
    assert sqlite_database.gaps(run_id) == [(1, None)]
    assert stored_rows(sqlite_database, run_id) == []
    _assert_messages(sqlite_database, run_id, reply_words=5)


@during_outages
def test_run_that_expires_half_read_keeps_what_was_stored(
    lab: Lab, make_worker: MakeWorker, sqlite_database: Database, driver: Driver, log: ServerLog
) -> None:
    """What was stored before a run expired stays, and the gap begins right behind it (I1, I2, I5)."""
    where = driver.make_conversation(driver.make_agent())
    worker = make_worker(conversations=[where.name])
    run_id = start_and_follow(driver, sqlite_database, worker, where, "[n=200] [delay=0.03]")
    worker.kill()
    before = stored_rows(sqlite_database, run_id)
    driver.wait([run_id])
    _make_old(lab, run_id)
    assert worker.catch_up() == 0
    assert sqlite_database.state(run_id) == "backfilled"
    assert stored_rows(sqlite_database, run_id) == before == list(log.read(run_id).rows[: len(before)])
    assert sqlite_database.gaps(run_id) == [(len(before) + 1, None)]
    _assert_messages(sqlite_database, run_id, reply_words=200)


@during_outages
def test_run_without_background_is_backfilled(
    make_worker: MakeWorker, sqlite_database: Database, driver: Driver
) -> None:
    """A run that was not made in background mode has no stream: its messages are fetched (I5, promise 3)."""
    where = driver.make_conversation(driver.make_agent())
    run_id = driver.start(where, "[n=5]", background=False)
    driver.wait([run_id])
    assert make_worker(conversations=[where.name]).catch_up() == 0
    assert sqlite_database.state(run_id) == "backfilled"
    assert stored_rows(sqlite_database, run_id) == []
    _assert_messages(sqlite_database, run_id, reply_words=5)


@during_outages
def test_trimmed_run_is_stored_with_its_gap(
    make_worker: MakeWorker, database: Database, driver: Driver, log: ServerLog, say: Say
) -> None:
    """Of 13,000 chunks read late, all that the server still has are stored and the missing are on record (I2, I5)."""
    where = driver.make_conversation(driver.make_agent())
    run_id = driver.start(where, "[n=13000] [delay=0]")
    log.wait_until_over([run_id], 300)
    driver.wait([run_id])
    server = log.read(run_id)
    assert server.holes, "the server kept all of it"
    worker = make_worker(conversations=[where.name])
    assert worker.catch_up() == 0, worker.log_tail()
    findings = Findings(runs=1, chunks=len(server.rows))
    compare_rows(findings, run_id, server.rows, stored_rows(database, run_id))
    say(f"{database.kind}: 13,000 chunks read late: {findings}, gaps {database.gaps(run_id)}")
    assert not findings.wrong, findings.report()
    assert database.gaps(run_id) == server.holes
    assert database.state(run_id) == "incomplete"
    assert database.fetch(f"SELECT last_seq_id, chunk_count FROM runs WHERE run_id = '{run_id}'") == [
        (server.rows[-1].seq_id, len(server.rows))
    ]
    _assert_messages(database, run_id, reply_words=13000)


def _make_old(lab: Lab, run_id: str) -> None:
    lab.postgres.execute(
        lab.letta.database, f"UPDATE runs SET created_at = created_at - interval '4 hours' WHERE id = '{run_id}'"
    )


def _assert_messages(database: Database, run_id: str, *, reply_words: int) -> None:
    """The prompt and the whole reply are stored."""
    messages = database.fetch(f"SELECT message_type, payload FROM messages WHERE run_id = '{run_id}'")
    assert "user_message" in {kind for kind, _ in messages}
    replies = [payload for kind, payload in messages if kind == "assistant_message"]
    assert len(replies) == 1
    assert replies[0].count("tok") == reply_words
