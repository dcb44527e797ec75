"""Child processes of the lab: started on a leash, each in its own session, logged to a file, ended with the tests."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_LEASH = Path(__file__).with_name("leash.py")
_LOG_TAIL_BYTES = 3000


class LabError(Exception):
    """The lab could not be set up or did not answer; the message holds the end of the log concerned."""


class Child:
    """One running program. Must be started by the main thread: the leash ends it when its starter's thread ends."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: tuple[int, int] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.log = log
        owner = f"{user[0]}:{user[1]}" if user else "-"
        leash = [sys.executable, "-I", str(_LEASH), str(os.getpid()), str(int(death_signal)), owner]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*leash, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                start_new_session=True,
            )
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        """The process id, which is also that of its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL the program and whatever it started."""
        if self._process.poll() is None:
            # Still ours: a process that was not waited for keeps its id.
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        atexit.unregister(self.kill)

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 10) -> int:
        """Ask it to end, insist after `timeout` seconds, and return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        code = self.wait(timeout)
        if code is None:
            self.kill()
            code = self._process.wait()
        atexit.unregister(self.kill)
        return code

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if it still runs after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self) -> str:
        """The end of what it printed."""
        return tail(self.log)

    def wait_until(self, is_ready: Callable[[], bool], timeout: float) -> None:
        """Return once `is_ready`; raise LabError if the program ends first or takes longer than `timeout`."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            if self.exit_code is not None:
                raise LabError(f"{self.name} ended with {self.exit_code} before it was ready:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} was not ready after {timeout:.0f} s:\n{self.log_tail()}")
            time.sleep(0.1)


def tail(log: Path) -> str:
    """The last bytes of a log file as text."""
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    user: tuple[int, int] | None = None,
) -> None:
    """Run a program to its end; raise LabError with the end of its output if it fails."""
    child = Child(Path(command[0]).name, command, log=log, env=env, user=user, cwd=log.parent)
    try:
        while child.wait(1) is None:
            pass
    finally:
        child.kill()
    if child.exit_code != 0:
        raise LabError(f"{' '.join(map(str, command))} exited with {child.exit_code}:\n{child.log_tail()}")


def free_port() -> int:
    """A loopback port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts_connections(port: int) -> bool:
    """Whether somebody listens on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
