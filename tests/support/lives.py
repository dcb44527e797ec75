"""The worker as a process of its own, born quickly: for campaigns that start it hundreds of times.

A life is forked from a server process that has imported the worker and done nothing else (multiprocessing's
forkserver), which saves a second of imports. It is a separate process all the same, and SIGKILL is SIGKILL.
The same as a whole new interpreter is in tests/system/test_process.py and in the demo.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["worker.cli", "worker.app"])


class Life:
    """One process running `letta-ingest` with these arguments; its output goes to the end of a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._process = _context.Process(target=_live, args=(arguments, str(log)))
        self._process.start()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL it and wait until it is gone."""
        self._process.kill()
        self._process.join()

    async def wait(self, timeout: float) -> int:
        """Wait until it ends by itself and return its exit code; kill it and raise TimeoutError if it does not."""
        try:
            async with asyncio.timeout(timeout):
                while self._process.exitcode is None:
                    await asyncio.sleep(0.05)
        finally:
            if self._process.exitcode is None:
                self.kill()
        return self._process.exitcode


def _live(arguments: list[str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["letta-ingest", *arguments]
    from worker.cli import main  # noqa: PLC0415 - imported long ago, in the process this one was forked from

    main()
