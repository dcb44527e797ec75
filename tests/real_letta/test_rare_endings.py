"""Endings that are not the normal one, provoked on the real server: outages, trimming, expiry, no background.

Comes last by its name, because it leaves runs behind that never end. What the worker makes of those takes minutes; the
tests marked `during_outages` run meanwhile.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.real_letta.comparison import Findings, compare, compare_rows, stored_rows
from tests.real_letta.conftest import MakeWorker, Say
from tests.real_letta.driver import Conversation, Driver
from tests.real_letta.lab.lab import Lab
from tests.real_letta.server_log import Row, ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.waiting import wait_until
from tests.real_letta.worker_process import Worker

pytestmark = pytest.mark.real
during_outages = pytest.mark.usefixtures("outages")

LONG = "[n=400] [delay=0.03]"
REDIS_IS_AWAY_SECONDS = 4  # longer than the server tries to write


@dataclass
class Outages:
    """A worker that lived through the server's death and through the loss of all of Redis, and the runs it followed."""

    worker: Worker
    database: Database
    orphan: str
    orphan_rows: tuple[Row, ...]
    """What the server had written of it when it was killed."""
    vanished: str
    vanished_rows: list[Row]
    """What was stored of it when Redis was killed."""
    later: str


@pytest.fixture(scope="module")
def outages(
    lab: Lab, driver: Driver, log: ServerLog, say: Say, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outages]:
    """SIGKILL the server in the middle of a run, then Redis in the middle of another; both come back, Redis empty."""
    directory = tmp_path_factory.mktemp("outages")
    database = Database("sqlite", f"sqlite:///{directory}/letta-ingest.db")
    agent = driver.make_agent()
    chats = [driver.make_conversation(agent) for _ in range(3)]
    worker = Worker(directory, lab.letta.url, database, {"conversations": [_id(chat) for chat in chats]})
    worker.start()

    say("SIGKILL of the Letta server in the middle of a run")
    orphan = _start_and_follow(driver, database, worker, chats[0])
    lab.letta.kill()
    orphan_rows = log.read(orphan).rows
    lab.letta.start()
    say("the server is back; SIGKILL of Redis in the middle of another run")
    vanished = _start_and_follow(driver, database, worker, chats[1])
    lab.redis.kill()
    time.sleep(REDIS_IS_AWAY_SECONDS)
    vanished_rows = stored_rows(database, vanished)
    lab.redis.start()
    later = driver.start(chats[2], "[n=100]")
    log.wait_until_over([later], 120)
    for chat in chats[:2]:  # to the server they are running for ever
        driver.cancel(chat)
    yield Outages(worker, database, orphan, orphan_rows, vanished, vanished_rows, later)
    worker.close()


def test_beheaded_run_has_its_gap(
    lab: Lab, make_worker: MakeWorker, sqlite_database: Database, driver: Driver, log: ServerLog
) -> None:
    """What a restart of Redis lost before the worker read it is a gap, and all after it is stored (I1, I2, I5)."""
    where = driver.make_conversation(driver.make_agent())
    worker = make_worker(conversations=[_id(where)])
    run_id = _start_and_follow(driver, sqlite_database, worker, where, "[n=200] [delay=0.03] [pause=6@150]")
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
    assert make_worker(conversations=[_id(where)]).catch_up() == 0
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
    worker = make_worker(conversations=[_id(where)])
    run_id = _start_and_follow(driver, sqlite_database, worker, where, "[n=200] [delay=0.03]")
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
    assert make_worker(conversations=[_id(where)]).catch_up() == 0
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
    worker = make_worker(conversations=[_id(where)])
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


def test_worker_survives_outages(outages: Outages, driver: Driver, log: ServerLog) -> None:
    """After the server and Redis were killed the same worker process stores the next run completely (I3, promise 2)."""
    is_complete = outages.database.is_complete
    wait_until(lambda: is_complete(outages.later), 60, "the later run was not completed", outages.worker)
    findings = compare(outages.database, log, driver, [outages.later])
    assert not findings.wrong, findings.report()


def test_orphan_of_a_killed_server_is_incomplete(outages: Outages) -> None:
    """All the server had written before it was killed is stored, and the run is not called complete (I5)."""
    _wait_for_decision(outages, outages.orphan)
    assert outages.database.state(outages.orphan) == "incomplete"
    rows = stored_rows(outages.database, outages.orphan)
    findings = Findings()
    compare_rows(findings, outages.orphan, outages.orphan_rows, rows)
    assert not findings.wrong, findings.report()
    assert outages.database.gaps(outages.orphan) == [(len(rows) + 1, None)]


def test_run_lost_with_redis_is_incomplete(outages: Outages) -> None:
    """What was stored before Redis lost the run stays, without a hole, and it is not called complete (I1, I5)."""
    _wait_for_decision(outages, outages.vanished)
    assert outages.database.state(outages.vanished) == "incomplete"
    rows = stored_rows(outages.database, outages.vanished)
    assert rows[: len(outages.vanished_rows)] == outages.vanished_rows
    assert [row.seq_id for row in rows] == list(range(1, len(rows) + 1))
    assert outages.database.gaps(outages.vanished) == [(len(rows) + 1, None)]


def _wait_for_decision(outages: Outages, run_id: str) -> None:
    state = outages.database.state
    wait_until(lambda: state(run_id) not in {"pending", "following"}, 240, "no decision", outages.worker)


def _start_and_follow(
    driver: Driver, database: Database, worker: Worker, where: Conversation, prompt: str = LONG
) -> str:
    """Start a run and return once some of it is stored."""
    run_id = driver.start(where, prompt)
    worker.ensure_started()
    wait_until(lambda: database.chunk_counts().get(run_id, 0) > 20, 90, "the run was not followed", worker)
    return run_id


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


def _id(where: Conversation) -> str:
    assert where.conversation_id is not None
    return where.conversation_id
