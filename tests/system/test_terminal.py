"""`run` on a terminal: a real process on a pseudo-terminal, and what can be read there."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest

from worker.demo.fake_faults import Answer
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from worker.demo.fake_run import FakeRun

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
KEY = "sk-never-to-be-seen-in-any-output"


class Terminal:
    """A terminal with a process in it, and all that was written to it."""

    def __init__(self, words: list[str], environ: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        os.set_blocking(self._master, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", **environ},
            start_new_session=True,
        )
        os.close(slave)
        self.written = ""

    def read(self) -> str:
        """All that was written until now, colours included."""
        with contextlib.suppress(BlockingIOError, OSError):  # OSError: the process has ended
            while some := os.read(self._master, 65536):
                self.written += some.decode("utf-8", "replace")
        return self.written

    async def until(self, words: str, seconds: float = 20) -> str:
        """Wait until these words can be read."""
        async with asyncio.timeout(seconds):
            while words not in COLOURS.sub("", self.read()):  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)
        return self.written

    async def ended(self) -> int:
        """Wait for the process; its exit code."""
        async with asyncio.timeout(20):
            while self.process.poll() is None:
                self.read()
                await asyncio.sleep(0.02)
        self.read()
        return self.process.returncode

    def close(self) -> None:
        """End it all."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A server that asks for a key."""
    async with FakeLetta(keepalive_interval=0.2, password=KEY, seed=1) as server:
        yield server


@pytest.fixture
def config(letta: FakeLetta, sqlite_url: str, tmp_path: Path) -> str:
    """The path of a configuration."""
    path = tmp_path / "config.toml"
    path.write_text(
        f'letta = {{ base_url = "{letta.url}", api_key = "{KEY}" }}\nwatch = {{ all = true }}\n'
        f'storage = {{ url = "{sqlite_url}" }}\ndiscovery = {{ interval = 0.2 }}\n'
        'service = { listen = "127.0.0.1:0" }\n'
    )
    return str(path)


@contextlib.contextmanager
def running(*words: str, **environ: str) -> Iterator[Terminal]:
    """`run` on a terminal."""
    terminal = Terminal(["run", *words], environ)
    try:
        yield terminal
    finally:
        terminal.close()


def talking(letta: FakeLetta) -> FakeRun:
    """A run that has said something and goes on."""
    run = letta.new_run(letta.new_conversation())
    run.say("hello ")
    return run


async def test_run_shows_what_it_does(letta: FakeLetta, config: str) -> None:
    """On a terminal `run` shows its health, its figures and its runs, no log lines; Ctrl-C ends it (I10)."""
    run = talking(letta)
    with running("--config", config) as terminal:
        await terminal.until(run.id)
        await terminal.until("Ready: the Letta server and the database work.")
        await terminal.until("Streams open")
        terminal.process.send_signal(signal.SIGINT)
        assert await terminal.ended() == 0
    assert '{"' not in terminal.written
    assert KEY not in terminal.written
    assert COLOURS.search(terminal.written)


async def test_trouble_is_shown(letta: FakeLetta, config: str) -> None:
    """A server that is away can be read there, with the reason, and that it came back (I7)."""
    with running("--config", config) as terminal:
        await terminal.until("Ready:")
        away = Answer(503, on="runs", times=None)
        letta.faults.append(away)
        await terminal.until("Degraded: letta in trouble.")
        await terminal.until("discovery.failed")
        assert away.fired
        letta.faults.remove(away)
        terminal.written = ""
        await terminal.until("Ready:")
        terminal.process.terminate()
        assert await terminal.ended() == 0


async def test_catching_up_shows_how_far_it_is(letta: FakeLetta, config: str) -> None:
    """The bar counts the runs that are done and those that are left (I8)."""
    first, second = talking(letta), talking(letta)
    with running("--once", "--config", config) as terminal:
        await terminal.until("0/2")
        first.complete()
        await terminal.until("1/2")
        second.complete()
        assert await terminal.ended() == 0


async def test_colours_are_left_out_where_nobody_wants_them(letta: FakeLetta, config: str) -> None:
    """NO_COLOR is respected, and `log.format = "console"` brings log lines back (I7)."""
    talking(letta)
    with running("--config", config, NO_COLOR="1") as terminal:
        await terminal.until("Ready:")
        assert not re.search(r"\x1b\[(3|9)[0-9]", terminal.written)
    with running("--config", config, LETTA_INGEST_LOG__FORMAT="console") as terminal:
        await terminal.until("worker.started")
        assert "Streams open" not in terminal.written


async def test_eighty_columns_are_enough(letta: FakeLetta, config: str) -> None:
    """On 80 columns `run` and `status` show ids, states and times of a run whole; in a pipe status is plain (I7)."""
    run = talking(letta)
    with running("--config", config, COLUMNS="80") as terminal:
        shown = COLOURS.sub("", await terminal.until(f"{run.id} following 2"))
        assert re.search(rf"{run.id} following 2 +\d+ s ago +2 h \d+ min", shown), shown
        terminal.process.terminate()
        assert await terminal.ended() == 0
    status = [sys.executable, "-m", "worker", "status", "--config", config]
    piped = await asyncio.to_thread(
        subprocess.run, status, capture_output=True, text=True, check=True, env={"COLUMNS": "80"}
    )
    on_terminal = Terminal(["status", "--config", config], {"COLUMNS": "80"})
    try:
        assert await on_terminal.ended() == 0
        screen = COLOURS.sub("", on_terminal.written)
    finally:
        on_terminal.close()
    for lines in (piped.stdout.splitlines(), screen.splitlines()):
        table = [line.split() for line in lines[-2:]]
        assert [row[0] for row in table] == [run.id, run.conversation_id]
        assert [row[1] for row in table] == ["following", "running"]
        assert max(map(len, lines)) <= 80
    assert "\x1b" not in piped.stdout
