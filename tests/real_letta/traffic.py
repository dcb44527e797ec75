"""Conversations that talk all the time: one thread each starts run after run until told to stop."""

import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from letta_client import APIConnectionError, InternalServerError

from tests.real_letta.driver import Conversation, Driver
from tests.real_letta.server_log import ServerLog

# What a server on a busy machine answers, among it timeouts.
OVERLOAD = (APIConnectionError, InternalServerError)
_LONGEST_RUN_SECONDS = 300  # on a busy machine


class Traffic:
    """Runs of several conversations at once, one after another in each; as a context manager it ends by itself."""

    def __init__(self, driver: Driver, log: ServerLog, talks: Sequence[tuple[Conversation, Sequence[str]]]) -> None:
        self._driver = driver
        self._log = log
        self._is_stopping = threading.Event()
        self._started: list[str] = []
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._talk, args=talk, daemon=True) for talk in talks]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run_ids(self) -> list[str]:
        """The runs started so far."""
        return list(self._started)

    def stop(self) -> None:
        """Start no more runs, wait for the end of those under way, and raise what went wrong."""
        self._is_stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _talk(self, where: Conversation, prompts: Sequence[str]) -> None:
        try:
            for prompt in itertools.cycle(prompts):
                try:
                    run_id = self._driver.start(where, prompt, pings="[quiet]" not in prompt)
                except OVERLOAD:  # if it made a run all the same, the server's list has it
                    if self._is_stopping.wait(2):
                        return
                    continue
                self._started.append(run_id)
                # Asked of Redis: asking the server would cost it as much as the runs do.
                self._log.wait_until_over([run_id], _LONGEST_RUN_SECONDS)
                if self._is_stopping.is_set():
                    return
        except Exception as error:  # noqa: BLE001 it is raised by stop()
            self._errors.append(error)
