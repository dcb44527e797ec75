"""Kills the Letta server in the middle of a run and Redis in the middle of another, with a worker following both."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.real_letta.comparison import stored_rows
from tests.real_letta.driver import Driver
from tests.real_letta.lab.lab import Lab
from tests.real_letta.server_log import Row, ServerLog
from tests.real_letta.stored import Database
from tests.real_letta.waiting import start_and_follow
from tests.real_letta.worker_process import Worker

LONG = "[n=400] [delay=0.03]"
REDIS_IS_AWAY_SECONDS = 4  # longer than the server tries to write


@dataclass
class Outages:
    """The worker that lived through it all, still running, and the runs it followed."""

    worker: Worker
    database: Database
    orphan: str
    orphan_rows: tuple[Row, ...]
    """What the server had written of it when it was killed."""
    vanished: str
    vanished_rows: list[Row]
    """What was stored of it when Redis was killed."""
    later: str
    """Began and ended after both."""


def cause_outages(lab: Lab, driver: Driver, log: ServerLog, directory: Path, say: Callable[[str], None]) -> Outages:
    """SIGKILL the server, then Redis; both come back, Redis empty."""
    database = Database("sqlite", f"sqlite:///{directory}/letta-ingest.db")
    agent = driver.make_agent()
    chats = [driver.make_conversation(agent) for _ in range(3)]
    worker = Worker(directory, lab.letta.url, database, {"conversations": [chat.name for chat in chats]})
    worker.start()

    say("SIGKILL of the Letta server in the middle of a run")
    orphan = start_and_follow(driver, database, worker, chats[0], LONG)
    lab.letta.kill()
    orphan_rows = log.read(orphan).rows
    lab.letta.start()

    say("the server is back; SIGKILL of Redis in the middle of another run")
    vanished = start_and_follow(driver, database, worker, chats[1], LONG)
    lab.redis.kill()
    time.sleep(REDIS_IS_AWAY_SECONDS)
    vanished_rows = stored_rows(database, vanished)
    lab.redis.start()

    later = driver.start(chats[2], "[n=100]")
    log.wait_until_over([later], 120)
    for chat in chats[:2]:  # to the server they are running for ever
        driver.cancel(chat)
    return Outages(worker, database, orphan, orphan_rows, vanished, vanished_rows, later)
