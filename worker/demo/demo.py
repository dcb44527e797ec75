"""The demo: FakeLetta with a dozen conversations talking, and a real worker process that is killed again and again.

`letta-ingest demo` (cli.py) runs it. The worker is `python -m worker run`, SIGKILLed in mid-stream; at the end the
rows in the file are counted without any of its code (proof.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from worker.demo import proof
from worker.demo.fake_letta import FakeLetta
from worker.demo.report import INTRODUCTION, Kill, Outcome, print_next_steps, print_proof
from worker.demo.screen import Row, Scene, Screen
from worker.demo.talk import Talk
from worker.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console

    from worker.demo.fake_run import FakeRun

SPEAKERS = 12
CHUNKS_PER_SECOND = 240.0
LONGEST_RUN = 150
SECONDS_PER_KILL = 3.5
LOOKS_PER_SECOND = 8
STALLED_SECONDS = 30.0
DRAIN_SECONDS = 15.0

CONFIG = """\
[letta]
base_url = {url}

[watch]
all = true

[storage]
url = {database}

[discovery]
interval = 0.5

[service]
listen = "127.0.0.1:0"
"""

# What a shell, a proxy or systemd may set, and the worker would obey.
FOREIGN_PREFIXES = ("LETTA_",)
FOREIGN_NAMES = {
    *("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"),
    *("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
}


@dataclass
class Worker:
    """The worker's process; every life of it logs to one file."""

    folder: Path
    process: asyncio.subprocess.Process | None = None
    started_at: float = 0.0
    rows_at_start: Mapping[str, int] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """The process that runs, or ran last."""
        return self.process.pid if self.process else 0

    async def start(self, rows: Mapping[str, int]) -> None:
        """Start a new life, with so many rows of each run in the file."""
        # -P: a folder called worker where the user happens to be is not ours.
        command = [sys.executable, "-P", "-m", "worker", "run", "--config", str(self.folder / "config.toml")]
        with (self.folder / "worker.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_environ(),
                start_new_session=True,  # Ctrl-C at the demo is not Ctrl-C at the worker: the demo ends it
            )
        self.started_at, self.rows_at_start = time.monotonic(), rows

    def check(self) -> None:
        """Raise WorkerError if it ended by itself."""
        if self.process is not None and self.process.returncode is not None:
            log = (self.folder / "worker.log").read_text(errors="replace").splitlines()[-10:]
            raise WorkerError("\n".join([f"the worker ended by itself ({self.process.returncode}):", *log]))

    async def end(self, number: signal.Signals) -> int | None:
        """Send a signal, wait for the end and return the exit code; None if it would not end."""
        if self.process is None:
            return None
        try:
            self.process.send_signal(number)
            async with asyncio.timeout(DRAIN_SECONDS):
                return await self.process.wait()
        except ProcessLookupError:
            return self.process.returncode
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            return None


@dataclass
class Demo:
    """One performance."""

    folder: Path
    kills: int
    screen: Screen
    letta: FakeLetta
    talk: Talk
    chance: random.Random
    worker: Worker
    started_at: float = field(default_factory=time.monotonic)
    killed: list[Kill] = field(default_factory=list)
    stored: dict[str, proof.StoredRun] = field(default_factory=dict)
    served: dict[str, tuple[int, int]] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def database(self) -> Path:
        """The file that is written."""
        return self.folder / "letta-ingest.db"

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self.started_at

    @property
    def rows(self) -> int:
        """Rows in the file at the last look."""
        return sum(run.rows for run in self.stored.values())

    async def perform(self) -> None:
        """Talk, ingest, kill, start again; at the end let the worker finish and drain."""
        for speaker in self.talk.speakers[:2]:
            await self.talk.speak_at_once(speaker)
        self.screen.note(self.seconds, "2 runs are over before the worker starts; now all begin to talk")
        talking = asyncio.create_task(self.talk.speak())
        try:
            await self.worker.start({})
            for number in range(1, self.kills + 1):
                await self._kill(number)
            self.talk.finish()
            await self._watch_until_all_is_stored(talking)
            self.exit_code = await self.worker.end(signal.SIGTERM)
            self.screen.note(self.seconds, f"all runs are over; SIGTERM, and the worker exited {self.exit_code}")
            self.stored = proof.stored_runs(self.database)
            self._show("the worker has stopped", is_up=False)
        finally:
            talking.cancel()
            await asyncio.wait([talking])
            if self.worker.process is not None and self.worker.process.returncode is None:
                await self.worker.end(signal.SIGKILL)

    async def _kill(self, number: int) -> None:
        """Let the worker store chunks of runs that go on, then kill it and start the next."""
        not_before = self.started_at + SECONDS_PER_KILL * (number - self.chance.uniform(0.2, 0.5))
        deadline = max(time.monotonic(), not_before) + STALLED_SECONDS
        while time.monotonic() < not_before or not self._grown() & {run.id for run in self.talk.live_runs}:
            if time.monotonic() > deadline:
                raise WorkerError(f"the worker stored nothing in {STALLED_SECONDS:.0f} s: {self.folder}/worker.log")
            await self._watch()
        pid = self.worker.pid
        await self.worker.end(signal.SIGKILL)
        self.stored = proof.stored_runs(self.database)
        live = {run.id: self.stored[run.id].rows for run in self.talk.live_runs if run.id in self.stored}
        self.killed.append(Kill(pid, self.rows, {run_id: rows for run_id, rows in live.items() if rows}))
        caught = len(self.killed[-1].unfinished)
        self.screen.note(
            self.seconds, f"kill -9 {pid} ({number} of {self.kills}): {self.rows:,} rows stored, {caught} runs not over"
        )
        await self.worker.start({run_id: run.rows for run_id, run in self.stored.items()})

    def _grown(self) -> set[str]:
        """The runs of which this life of the worker has stored something."""
        before = self.worker.rows_at_start
        return {run_id for run_id, run in self.stored.items() if run.rows > before.get(run_id, 0)}

    async def _watch_until_all_is_stored(self, talking: asyncio.Task[None]) -> None:
        progress_at, progress = time.monotonic(), -1
        while not talking.done() or not self._is_all_settled():
            await self._watch()
            if (now := sum(run.is_settled for run in self.stored.values()) + self.rows) != progress:
                progress_at, progress = time.monotonic(), now
            if time.monotonic() - progress_at > STALLED_SECONDS:
                return  # the count will say what is missing
        await talking

    def _is_all_settled(self) -> bool:
        return all(run_id in self.stored and self.stored[run_id].is_settled for run_id in self.letta.runs)

    async def _watch(self) -> None:
        self.worker.check()
        self.stored = proof.stored_runs(self.database)
        age = time.monotonic() - self.worker.started_at
        is_up = bool(self._grown())
        if is_up:
            text = f"worker {self.worker.pid} is storing, {age:.1f} s after its start"
        else:
            text = f"worker {self.worker.pid} is starting{' again' if self.killed else ''}, {age:.1f} s"
        self._show(text, is_up=is_up)
        await asyncio.sleep(1 / LOOKS_PER_SECOND)

    def _show(self, worker: str, *, is_up: bool) -> None:
        """Show what was counted in the file beside what the server has."""
        served = {run.id: self._served(run) for run in self.letta.runs.values()}
        rows = []
        for speaker in self.talk.speakers:
            if speaker.runs:
                run = speaker.runs[-1]
                stored = self.stored[run.id].rows if run.id in self.stored else 0
                rows.append(Row(speaker.id[:13], run.id[:12], speaker.kind, served[run.id], stored))
        scene = Scene(self.seconds, worker, is_up, rows, len(served), sum(served.values()), self.rows)
        self.screen.show(scene)

    def _served(self, run: FakeRun) -> int:
        """How many chunks of the run the server has; counted again only where its log has grown."""
        length, count = self.served.get(run.id, (-1, 0))
        if length != len(run.history):
            count = len(run.expected_rows())
            self.served[run.id] = (len(run.history), count)
        return count


async def run(console: Console, *, kills: int, keep: Path | None, seed: int) -> bool:
    """Perform the demo and print the proof. False if it does not hold. Raises ConfigError or WorkerError."""
    folder = prepared(keep)
    names = {"speakers": SPEAKERS, "times": "once" if kills == 1 else f"{kills} times"}
    introduction = INTRODUCTION.format(**names, database=escape(str(folder / "letta-ingest.db")))
    console.print(introduction, highlight=False, soft_wrap=True)
    with ended_by_signals():
        outcome = await performed(console, folder, kills, seed)
    print_proof(console, outcome)
    print_next_steps(console, folder)
    return outcome.holds


async def performed(console: Console, folder: Path, kills: int, seed: int) -> Outcome:
    """Set the stage, perform, and count."""
    async with FakeLetta(keepalive_interval=2.0, seed=seed) as letta:
        database = f"sqlite:///{folder / 'letta-ingest.db'}"
        config = CONFIG.format(url=json.dumps(letta.url), database=json.dumps(database))
        (folder / "config.toml").write_text(config)
        talk = Talk(letta, speakers=SPEAKERS, seed=seed, chunks_per_second=CHUNKS_PER_SECOND, longest=LONGEST_RUN)
        with Screen(console, LONGEST_RUN) as screen:
            demo = Demo(folder, kills, screen, letta, talk, random.Random(seed), Worker(folder))
            await demo.perform()
    tally = proof.compare(letta.runs, proof.stored_rows(demo.database))
    return Outcome(letta.runs, proof.stored_runs(demo.database), tally, demo.killed, demo.exit_code)


def prepared(keep: Path | None) -> Path:
    """Return the folder for the file. Raises ConfigError if there is a database in it already."""
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="letta-ingest-demo-"))
    folder = keep.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}") from None
    if (folder / "letta-ingest.db").exists():
        raise ConfigError(f"--keep {keep}: there is a letta-ingest.db already; name another folder")
    return folder


def own_environ() -> dict[str, str]:
    """Our environment without what would point the worker anywhere but at the demo's server."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN_PREFIXES) and name.upper() not in FOREIGN_NAMES
    }


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo in order, with its worker, as Ctrl-C does anyway."""
    loop, demo = asyncio.get_running_loop(), asyncio.current_task()
    got: list[str] = []

    def end(number: signal.Signals) -> None:
        got.append(number.name)
        if demo is not None:
            demo.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        yield
    except asyncio.CancelledError:
        if got:
            raise WorkerError(f"{got[0]} ended the demo") from None
        raise
