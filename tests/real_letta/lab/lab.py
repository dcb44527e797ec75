"""The lab: everything a real Letta server needs, and the server, started in order and ended together."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.real_letta.lab.services import FakeModel, LettaServer, Postgres, Redis, is_reachable_by_others
from tests.real_letta.lab.venv import server_venv


class Lab:
    """A running Letta server and what it runs on; as a context manager."""

    def __init__(self, say: Callable[[str], None]) -> None:
        venv = server_venv(say)
        self._say = say
        self.keep_directory = False
        self.directory = _data_directory()
        self.postgres = Postgres(venv, self.directory)
        self.redis = Redis(venv, self.directory)
        self.model = FakeModel(venv, self.directory)
        self.letta = LettaServer(venv, self.directory, self.postgres, self.redis, self.model)

    def __enter__(self) -> Self:
        started = time.monotonic()
        try:
            self._say("starting PostgreSQL, Redis and the stand-in model")
            self.postgres.start()
            self.redis.start()
            self.model.start()
            self._say("creating the Letta server's tables")
            self.letta.create_tables()
            self._say("starting the Letta server (slow the first time: it is compiled)")
            self.letta.start()
        except BaseException:
            self._stop()
            raise
        self._say(
            f"Letta 0.16.8 is up at {self.letta.url} after {time.monotonic() - started:.0f} s; logs in {self.directory}"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if kind is None and not self.keep_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _stop(self) -> None:
        self.letta.stop()
        self.model.stop()
        self.redis.kill()
        self.postgres.stop()


def _data_directory() -> Path:
    """A new directory that PostgreSQL's unprivileged user can reach, too."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    if os.geteuid() == 0:
        places = [place for place in places if place.is_dir() and is_reachable_by_others(place)] or places
    directory = Path(tempfile.mkdtemp(prefix="letta-lab-", dir=places[0]))
    directory.chmod(0o755)
    return directory
