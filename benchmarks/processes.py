"""The processes of a benchmark: a load that runs beside, and what is measured. Used by every scenario."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """What a process took from its start to its end."""

    ended: float
    """time.time()"""
    seconds: float
    cpu_seconds: float
    peak_mib: float


def say(line: str) -> None:
    """Progress; the results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def environment() -> Mapping[str, str]:
    """Ours, and modules are compiled once, as anywhere else."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def module(name: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """The command that runs a module of ours."""
    return [python, "-m", name, *map(str, arguments)]


@contextlib.contextmanager
def load(name: str, *arguments: object) -> Iterator[str]:
    """A server that makes load, in a process of its own; its URL."""
    command = module(f"benchmarks.{name}", *arguments)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs while the block does, and is killed if it is still there then."""
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def run_to_end(command: list[str]) -> Usage:
    """Run a command; raises SystemExit when it fails."""
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    ended, seconds = time.time(), time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"bench: exit code {process.returncode} of {' '.join(command)}")
    return Usage(ended, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def cpu_seconds(pid: int) -> float:
    """What a running process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mib(pid: int) -> float:
    """The memory it has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20
