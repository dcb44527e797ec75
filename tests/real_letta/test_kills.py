"""The main job on a real server: every kind of run, the worker SIGKILLed while they stream, nothing lost or doubled."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.real_letta.comparison import Findings, compare
from tests.real_letta.conftest import MakeWorker, Say
from tests.real_letta.driver import Conversation, Driver
from tests.real_letta.kills import Campaign
from tests.real_letta.server_log import ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.traffic import Traffic
from tests.real_letta.waiting import start_and_follow, wait_until
from tests.real_letta.worker_process import Worker

pytestmark = pytest.mark.real

LANDED_PER_DATABASE = 10  # 20 in all
MOST_KILLS = 30
# U+2028 and U+0085 end lines for a careless decoder, U+0000 is refused by PostgreSQL, the quotes ask for escaping.
ODD_TEXT = r"[text=a\u2028b\x85c\x00d\U0001f600e\"\\_\n\r\"seq_id\":null]"
BEFORE_THE_WORKER = ("[n=30]", "[n=12] [think=5]", ODD_TEXT)
WHILE_IT_IS_DOWN = "[n=25] [delay=0]"


@dataclass
class Tally:
    """What the campaigns on all databases came to, and who says it."""

    say: Say
    findings: Findings = field(default_factory=Findings)
    kills: int = 0
    landed: int = 0


@pytest.fixture(scope="module")
def tally(say: Say) -> Iterator[Tally]:
    """Sum up; said at the end."""
    tally = Tally(say)
    yield tally
    say(f"in all: {tally.findings}; {tally.kills} kills, {tally.landed} of them mid-stream")


def test_kills_lose_and_double_nothing(
    database: Database, make_worker: MakeWorker, driver: Driver, log: ServerLog, tally: Tally
) -> None:
    """A worker killed at random moments stores every run exactly as the server's log has it (I1, I2, I3, I5, I6, I9).

    Completed, failed and cancelled runs, tool calls, several conversations at once and agent-direct ones, runs one
    after another in one conversation, and runs that began and ended while no worker was there.
    """
    seed = random.randrange(10**6)
    agents = [driver.make_agent(with_tool=True), driver.make_agent(), driver.make_agent()]
    chats = [driver.make_conversation(agents[0]) for _ in range(4)]
    direct = [Conversation(agent, None) for agent in agents[1:]]
    missed = [driver.start(where, prompt) for where in (chats[0], direct[0]) for prompt in BEFORE_THE_WORKER]
    log.wait_until_over(missed, 120)

    worker = make_worker(watch_all=True) if database.kind == "sqlite" else make_worker(agents=agents)
    cancelled = _cancel_while_followed(worker, database, driver, log, chats[3])
    talks = [
        (chats[0], ["[n=300] [delay=0.03]", "[n=1000] [delay=0] [pause=3@500]"]),
        (chats[1], ["[tool=roll_dice] [think=60] [n=150] [delay=0.03]"]),
        (chats[2], [f"[n=300] [fail=200] [delay=0.03] [failmode={mode}]" for mode in ("close", "error", "status")]),
        (direct[0], ["[n=300] [delay=0.03] [quiet]"]),
    ]
    with Traffic(driver, log, talks) as traffic:
        campaign = Campaign(worker, database, log, traffic.run_ids, random.Random(seed))
        while campaign.probably_landed() < LANDED_PER_DATABASE + 1 and campaign.kills < MOST_KILLS:
            campaign.kill_once()
            if campaign.kills % 3 == 1:
                missed.append(driver.start(direct[1], WHILE_IT_IS_DOWN))
                log.wait_until_over(missed, 120)
            tally.say(f"{database.kind}: kill {campaign.kills}, interrupted {len(campaign.interrupted[-1])} runs")
    run_ids = driver.run_ids(agents)
    assert not {*missed, *cancelled, *traffic.run_ids()} - set(run_ids)
    driver.wait(run_ids)
    started = time.monotonic()
    assert worker.catch_up() == 0, worker.log_tail()
    seconds = time.monotonic() - started

    findings = compare(database, log, driver, run_ids)
    landed = campaign.landed()
    tally.say(
        f"{database.kind}: {findings}; {campaign.kills} kills, {landed} of them mid-stream (seed {seed});"
        f" the last catch-up took {seconds:.1f} s"
    )
    tally.findings.add(findings)
    tally.kills += campaign.kills
    tally.landed += landed
    assert not findings.wrong, findings.report()
    assert landed >= LANDED_PER_DATABASE


def _cancel_while_followed(
    worker: Worker, database: Database, driver: Driver, log: ServerLog, where: Conversation
) -> list[str]:
    """Cancel one run while the worker follows it, and a second one that is over before the worker sees it."""
    run_ids = [start_and_follow(driver, database, worker, where, "[n=500] [delay=0.03]")]
    driver.cancel(where)
    wait_until(lambda: database.state(run_ids[0]) == "complete", 120, "the cancelled run was not completed", worker)
    worker.kill()
    run_ids.append(driver.start(where, "[n=500] [delay=0.03]"))
    time.sleep(1)
    driver.cancel(where)
    log.wait_until_over(run_ids, 120)
    return run_ids
