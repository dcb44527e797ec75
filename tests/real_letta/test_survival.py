"""What a worker made of the server's death and of the loss of all of Redis (outages.py), by far the slowest to decide.

Comes last by its name: the outages leave runs behind that never end.
"""

import pytest

from tests.real_letta.comparison import Findings, compare, compare_rows, stored_rows
from tests.real_letta.driver import Driver
from tests.real_letta.outages import Outages
from tests.real_letta.server_log import ServerLog
from tests.real_letta.waiting import wait_until

pytestmark = pytest.mark.real


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
