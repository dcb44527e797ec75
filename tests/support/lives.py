"""The worker as a process of its own, born quickly: for campaigns that start it hundreds of times.

A life is forked from a server process that has imported the worker and done nothing else (multiprocessing's
forkserver), which saves a second of imports. It is a separate process all the same, and SIGKILL is SIGKILL.
The same as a whole new interpreter is in tests/system/test_process.py and in the demo.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["worker.cli", "worker.app"])


class Life:
    """One process running `letta-ingest` with these arguments; what it says goes to the end of a file.

    Its stdout goes there too unless it gets a file of its own. `environ` is what its environment has besides ours.
    `prepare` is called in the process before anything else; it must survive pickling.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        stdout: Path | None = None,
        environ: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        said = (arguments, str(stdout or log), str(log), environ or {}, prepare)
        self._process = _context.Process(target=_live, args=said)
        self._process.start()

    @property
    def pid(self) -> int:
        """To send a signal to."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL it and wait until it is gone."""
        self._process.kill()
        self._process.join()

    async def wait(self, seconds: float) -> int | None:
        """Wait until it ends by itself and return its exit code; kill it and raise TimeoutError if it does not."""
        try:
            await until(lambda: self._process.exitcode is not None, seconds)
        finally:
            if self._process.exitcode is None:
                self.kill()
        return self._process.exitcode


async def until(is_so: Callable[[], bool], seconds: float) -> None:
    """Return once it is so; raise TimeoutError if it is not after that time."""
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 - what another process does sets no event of ours
            await asyncio.sleep(0.02)


def _live(
    arguments: list[str], stdout: str, stderr: str, environ: dict[str, str], prepare: Callable[[], None] | None
) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.update(environ)
    sys.argv = ["letta-ingest", *arguments]
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    if prepare is not None:
        prepare()
    from worker.cli import main  # noqa: PLC0415 - imported long ago, in the process this one was forked from

    main()


def _end_with_the_test() -> None:
    """A test that is killed cannot kill its workers, and they would go on for ever."""
    test = multiprocessing.parent_process()
    if test is not None:
        multiprocessing.connection.wait([test.sentinel])
        os._exit(1)
