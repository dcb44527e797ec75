"""Looks at a worker process from outside, again and again: memory, descriptors, threads, and its own figures."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

FIGURES = ("chunks_stored_total", "followers", "tasks")


@dataclass(frozen=True)
class Sample:
    """One look. Memory is what is resident, in MiB."""

    minutes: float
    memory: float
    descriptors: int
    connections: int
    threads: int
    tasks: int
    streams: int
    unfinished: int
    chunks: int


@dataclass
class Sampler:
    """Looks at one process."""

    pid: int
    metrics_url: str
    began_at: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def look(self) -> Sample:
        """Take one sample and keep it."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        links = [_link(path) for path in Path(f"/proc/{self.pid}/fd").iterdir()]
        page = httpx.get(self.metrics_url, timeout=10, trust_env=False).text
        figures = {name: _figure(page, f"letta_ingest_{name}") for name in FIGURES}
        self.samples.append(
            Sample(
                minutes=(time.monotonic() - self.began_at) / 60,
                memory=int(_field(status, "VmRSS")) / 1024,
                descriptors=len(links),
                connections=sum(link.startswith("socket:") for link in links),
                threads=int(_field(status, "Threads")),
                tasks=figures["tasks"],
                streams=_figure(page, 'letta_ingest_followers{state="reading"}'),
                unfinished=figures["followers"],
                chunks=figures["chunks_stored_total"],
            )
        )
        return self.samples[-1]


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # closed meanwhile
        return ""


def _field(status: str, name: str) -> str:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    assert found is not None
    return found[1]


def _figure(page: str, name: str) -> int:
    """The sum of the samples whose name, with its labels, begins so."""
    found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert found, name
    return sum(int(float(value)) for value in found)
