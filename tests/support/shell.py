"""The worker's commands as processes, on a FakeLetta that asks for a key nobody may ever see; for tests/system."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.support.lives import Life, until
from tests.support.looks import looking
from worker.demo.fake_letta import FakeLetta
from worker.demo.proof import compare
from worker.demo.talk import Talk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from worker.demo.proof import Tally

SECRET = "sk-never-to-be-seen-in-any-output"

CONFIG = """\
letta = {{ base_url = "{url}", api_key = "{key}" }}
watch = {{ all = true }}
storage = {{ url = "{database_url}" }}
discovery = {{ interval = 0.2 }}
service = {{ listen = "{listen}" }}
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int | None
    out: str
    err: str


@dataclass
class Shell:
    """Runs the worker's commands with one configuration."""

    letta: FakeLetta
    folder: Path
    database_url: str
    key: str = SECRET
    listen: str = "127.0.0.1:0"
    lives: list[Life] = field(default_factory=list)

    def start(
        self,
        *words: str,
        config: str | None = None,
        environ: dict[str, str] | None = None,
        is_configured: bool = True,
        prepare: Callable[[], None] | None = None,
    ) -> Life:
        """Start a command; words that name the configuration are added. `prepare` is as in Life."""
        path = self.folder / "config.toml"
        settings = {"url": self.letta.url, "key": self.key, "database_url": self.database_url, "listen": self.listen}
        path.write_text(CONFIG.format(**settings) if config is None else config)
        more = ["--config", str(path)] if is_configured else []
        number = len(self.lives) + 1
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        out.touch()
        err.touch()
        self.lives.append(Life([*words, *more], err, stdout=out, environ=environ, prepare=prepare))
        return self.lives[-1]

    async def do(self, *words: str, **how: Any) -> Done:
        """Run a command, as `start` does, to its end."""
        code = await self.start(*words, **how).wait(30)
        number = len(self.lives)
        return Done(code, (self.folder / f"{number}.out").read_text(), (self.folder / f"{number}.err").read_text())

    async def stop(self, life: Life, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Send a signal and return the exit code; TimeoutError if it takes longer than a drain may."""
        os.kill(life.pid, number)
        return await life.wait(8)

    async def rows(self) -> int:
        """How many chunks are stored."""
        async with looking(self.database_url) as look:
            return await look.count("chunks")

    async def tally(self) -> Tally:
        """What the server served, against what is stored."""
        async with looking(self.database_url) as look:
            return compare(self.letta.runs, await look.chunks())

    def logged(self, life: Life) -> list[dict[str, Any]]:
        """The log lines of a life."""
        text = (self.folder / f"{self.lives.index(life) + 1}.err").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    async def until_logged(self, life: Life, event: str) -> None:
        """Wait for a log line."""
        await until(lambda: any(line["event"] == event for line in self.logged(life)), 15)


def free_address() -> str:
    """An address nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@asynccontextmanager
async def shell_on(database_url: str, folder: Path) -> AsyncIterator[Shell]:
    """Commands on this database and a quick server of their own; whatever still lives at the end is killed."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as letta:
        shell = Shell(letta, folder, database_url)
        try:
            yield shell
        finally:
            for life in shell.lives:
                life.kill()


@asynccontextmanager
async def talking(letta: FakeLetta, speakers: int = 6) -> AsyncIterator[Talk]:
    """Some conversations that go on; at the end of the block they end, too."""
    talk = Talk(letta, speakers=speakers, seed=1, chunks_per_second=60.0 * speakers, longest=60)
    task = asyncio.create_task(talk.speak())
    try:
        yield talk
        talk.finish()
        await task
    finally:
        task.cancel()
