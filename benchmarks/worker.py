"""The installed worker as a benchmark starts it: default settings, and only what a scenario needs besides."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import run_to_end, started

COMMAND = str(Path(sys.executable).parent / "letta-ingest")


class Worker:
    """A configuration and its commands."""

    def __init__(self, folder: Path, url: str, database_url: str, more: str = "", watch: str = "all = true") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._config = folder / "config.toml"
        self._config.write_text(
            f'[storage]\nurl = "{database_url}"\n[service]\nlisten = "{self.address.removeprefix("http://")}"\n'
            f'[log]\nlevel = "warning"\n[watch]\n{watch}\n[letta]\nbase_url = "{url}"\n{more}\n'
        )
        run_to_end(self.command("migrate"))

    def command(self, *words: str) -> list[str]:
        """A command line of letta-ingest."""
        return [COMMAND, *words, "--config", str(self._config)]

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """The service, while the block runs."""
        return started(self.command("run"))

    def figures(self) -> dict[tuple[str, str], float]:
        """What /metrics says: (name, le or "") -> value."""
        page = httpx.get(f"{self.address}/metrics", timeout=30, trust_env=False).text
        return dict(_samples(page))


def _samples(page: str) -> Iterator[tuple[tuple[str, str], float]]:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            yield (sample.name, sample.labels.get("le", "")), sample.value
