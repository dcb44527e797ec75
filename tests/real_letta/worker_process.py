"""The installed worker as a process: its configuration, starts, kills and exits."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.real_letta.lab.processes import Child, tail
from tests.real_letta.stored import Database

SECRET = "not-to-be-seen-in-any-log"  # the server accepts any; invariant I10
_PROGRAM = Path(sys.executable).with_name("letta-ingest")
_ONCE_SECONDS = 300
_COMMAND_SECONDS = 60


class Worker:
    """`letta-ingest` with one configuration file; all its runs log to one file."""

    def __init__(
        self, directory: Path, letta_url: str, database: Database, watch: Mapping[str, bool | list[str]]
    ) -> None:
        self.log = directory / "worker.log"
        self.log.touch()
        self._config = directory / "letta-ingest.toml"
        sections: dict[str, Mapping[str, Any]] = {
            "letta": {"base_url": letta_url, "api_key": SECRET},
            "watch": watch,
            "storage": {"url": database.url},
            "discovery": {"interval": 0.5, "start": "earliest"},
            "service": {"listen": "127.0.0.1:0"},
            "log": {"level": "info", "format": "json"},
        }
        self._config.write_text("".join(_section(name, settings) for name, settings in sections.items()))
        self._environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(directory), "LANG": "C.UTF-8"}
        self._child: Child | None = None
        if database.kind == "postgresql":
            assert self.command("migrate").returncode == 0, self.log_tail()

    def start(self) -> None:
        """Start following."""
        assert self._child is None, "the worker runs already"
        self._child = self._spawn()

    def ensure_started(self) -> None:
        """Start following unless it does."""
        if self._child is None:
            self.start()

    def kill(self) -> None:
        """SIGKILL it; it must have been running until then."""
        self.assert_running()
        self._take().kill()

    def assert_running(self) -> None:
        """Fail if it ended by itself."""
        assert self._child is not None, "the worker was not started"
        code = self._child.exit_code
        assert code is None, f"the worker ended by itself with {code}:\n{self.log_tail()}"

    def drain(self, timeout: float) -> int:
        """SIGTERM it and return its exit code; it is killed if it takes longer than `timeout`."""
        return self._take().stop(signal.SIGTERM, timeout)

    def catch_up(self) -> int | None:
        """`run --once`: follow everything there is to its end, and return the exit code (None: took too long)."""
        child = self._spawn("--once")
        try:
            return child.wait(_ONCE_SECONDS)
        finally:
            child.kill()

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of the short commands; what it says on stderr goes to the log."""
        with self.log.open("a") as log:
            return subprocess.run(
                [_PROGRAM, *words, "--config", self._config],
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )

    def close(self) -> None:
        """Make sure nothing of it is left."""
        if self._child:
            self._take().kill()

    def log_tail(self) -> str:
        """The end of its log."""
        return tail(self.log)

    def _spawn(self, *options: str) -> Child:
        command: list[str | Path] = [_PROGRAM, "run", "--config", self._config, *options]
        return Child("letta-ingest", command, log=self.log, env=self._environment, cwd=self.log.parent)

    def _take(self) -> Child:
        assert self._child is not None, "the worker was not started"
        child, self._child = self._child, None
        return child


def _section(name: str, settings: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in settings.items()]
    return "\n".join([f"[{name}]", *lines, "", ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
