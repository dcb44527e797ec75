"""The worker's commands as real processes: signals, exit codes, what they print, and what they never print."""

from __future__ import annotations

import asyncio
import json
import platform
import signal
import socket
import sqlite3
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest

from tests.support.lives import Life, until
from tests.support.looks import looking
from tests.support.shell import SECRET, Shell, talking
from worker.cli import cli
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

COMMANDS = [command.name or command.callback.__name__ for command in cli.registered_commands if command.callback]


@pytest.fixture
async def shell(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Shell]:
    """Commands on SQLite, or on the database the test asks for. I10: the key is nowhere but in the settings."""
    asked = {"database_url", "postgresql_url"} & set(request.fixturenames)
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as letta:
        made = Shell(letta, tmp_path, request.getfixturevalue(min(asked, default="sqlite_url")))
        try:
            yield made
        finally:
            for life in made.lives:
                life.kill()
    for path in sorted(tmp_path.iterdir()):  # noqa: ASYNC240 - nothing else runs any more
        assert path.name == "config.toml" or SECRET.encode() not in path.read_bytes(), f"the key is in {path.name}"


async def store_some(shell: Shell) -> None:
    """Wait until a worker has stored more than a little."""
    async with asyncio.timeout(15), looking(shell.database_url) as look:
        while await look.count("chunks") < 60:  # noqa: ASYNC110 - what another process does sets no event of ours
            await asyncio.sleep(0.02)


def finished(shell: Shell, life: Life) -> set[str]:
    """The runs that a worker has reported as finished."""
    return {line["run_id"] for line in shell.logged(life) if line["event"] == "run.finished"}


# ---- signals ----


@pytest.mark.parametrize(
    ("database_url", "number"),
    [
        ("sqlite", signal.SIGTERM),
        ("sqlite", signal.SIGINT),
        ("postgresql", signal.SIGTERM),
        ("postgresql", signal.SIGKILL),
    ],
    indirect=["database_url"],
    ids=str,
)
async def test_signal_loses_nothing(shell: Shell, database_url: str, number: signal.Signals) -> None:
    """I2, I3: SIGTERM and SIGINT drain and exit 0 within seconds; after these and SIGKILL, the next start goes on."""
    assert (await shell.do("migrate")).code == 0
    async with talking(shell.letta):
        life = shell.start("run")
        await store_some(shell)
        code = await shell.stop(life, number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        if number != signal.SIGKILL:
            assert shell.logged(life)[-1]["event"] == "worker.stopped"
        async with looking(database_url) as look:
            stored = await look.runs()
        assert any(not run.is_settled and run.rows for run in stored.values()), "it was not in the middle of anything"
        assert all(run.cursor == run.rows for run in stored.values())
    done = await shell.do("run", "--once")
    assert done.code == 0, done.err
    tally = await shell.tally()
    assert tally.is_exact, tally


async def test_interpreter_of_its_own(shell: Shell) -> None:
    """I3: the same for `python -m worker` as a user starts it: SIGKILL in mid-stream, start again, nothing is lost."""
    await shell.do("migrate")
    command = [sys.executable, "-P", "-m", "worker", "run", "--config", str(shell.folder / "config.toml")]
    async with talking(shell.letta):
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        try:
            await store_some(shell)
        finally:
            process.kill()
        assert await process.wait() == -signal.SIGKILL
    process = await asyncio.create_subprocess_exec(*command, "--once", stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert process.returncode == 0
    assert SECRET.encode() not in err
    tally = await shell.tally()
    assert tally.is_exact, tally


async def test_two_workers_on_one_database(shell: Shell, database_url: str) -> None:
    """I4: two workers on the same runs and the same database at once store every chunk once, without any error."""
    assert (await shell.do("migrate")).code == 0
    async with talking(shell.letta):
        both = [shell.start("run"), shell.start("run")]
        await store_some(shell)
        await asyncio.sleep(0.5)
    await until(lambda: set.union(*(finished(shell, life) for life in both)) == shell.letta.runs.keys(), 15)
    assert all(finished(shell, life) for life in both)
    async with looking(database_url) as look:
        stored = await look.runs()
    assert [await shell.stop(life) for life in both] == [0, 0]
    tally = await shell.tally()
    assert tally.is_exact, tally
    assert {(run.state, run.cursor - run.rows) for run in stored.values()} == {("complete", 0)}
    lines = [line for life in both for line in shell.logged(life)]
    assert {line["level"] for line in lines} == {"info"}, [line for line in lines if line["level"] != "info"]


# ---- what operators see ----


async def test_endpoints_answer(shell: Shell) -> None:
    """Promise 4: /healthz, /readyz and /metrics answer; readyz says so when the server is away, healthz stays well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shell.listen = f"127.0.0.1:{probe.getsockname()[1]}"
    run = shell.letta.new_run()
    run.say("hello")
    run.complete()
    life = shell.start("run")
    await shell.until_logged(life, "run.finished")
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        metrics = (await client.get("/metrics")).text
        assert f"letta_ingest_chunks_stored_total {float(len(run.expected_rows()))}" in metrics
        await shell.letta.stop_listening()
        await shell.letta.drop_connections()
        await shell.until_logged(life, "discovery.failed")
        answer = await client.get("/readyz")
        assert (answer.status_code, list(answer.json()["troubles"])) == (503, ["letta"])
        assert (await client.get("/healthz")).status_code == 200
    assert await shell.stop(life) == 0


async def test_status_as_json(shell: Shell) -> None:
    """`status --json` prints one JSON value with the figures of the store, and `status` a table for people."""
    run, live = shell.letta.new_run(), shell.letta.new_run()
    run.say("hello")
    run.complete()
    live.say("hello")
    life = shell.start("run")
    await shell.until_logged(life, "run.finished")
    figures = {"chunks": 0}
    async with asyncio.timeout(20):
        while figures["chunks"] < len(run.expected_rows()) + 2:
            done = await shell.do("status", "--json")
            assert done.code == 0, done.err
            figures = json.loads(done.out)
    assert figures["runs"] == {"complete": 1, "following": 1}
    assert figures["chunks"] == len(run.expected_rows()) + 2
    assert [(r["run_id"], r["cursor"], r["state"]) for r in figures["unfinished"]] == [(live.id, 2, "following")]
    shown = await shell.do("status")
    assert shown.code == 0
    assert "1 complete, 1 following" in shown.out
    assert await shell.stop(life) == 0


async def test_check_says_ok(shell: Shell) -> None:
    """`check` says ok of everything when everything is, and exits 0."""
    done = await shell.do("check")
    assert done.code == 0, done.out + done.err
    assert {line.split()[0] for line in done.out.splitlines()} == {"ok"}
    assert len(done.out.splitlines()) == 5


async def test_version_and_help(shell: Shell) -> None:
    """I10: `--version`, and `--help` of every command, print what they should, and nothing of the environment."""
    environ = {"LETTA_API_KEY": SECRET, "LETTA_INGEST_LETTA__API_KEY": SECRET}
    said: dict[str, str] = {}
    for words in (["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)):
        done = await shell.do(*words, is_configured=False, environ=environ)
        assert (done.code, done.err) == (0, ""), words
        said[" ".join(words)] = done.out
    versions = dict(line.split(" ", 1) for line in said["--version"].splitlines())
    assert versions.pop("Python").startswith(f"{platform.python_version()} on ")
    assert versions.pop("SQLite") == sqlite3.sqlite_version
    assert list(versions) == ["letta-ingest", "SQLAlchemy", "aiosqlite", "asyncpg", "httpx", "aiohttp"]
    assert versions == {name: version(name) for name in versions}
    assert {"run", "migrate", "check", "status", "demo"} <= set(COMMANDS)
    assert all(name in said["--help"] for name in COMMANDS)
    assert all("Usage:" in text for words, text in said.items() if "--help" in words)


# ---- refusals ----


async def test_every_fault_of_the_configuration_at_once(shell: Shell) -> None:
    """Exit code 2, and every fault with its key, when the configuration is wrong."""
    config = f"""
        letta = {{ base_url = "localhost:8283", batch_size = 1, api_key = "{SECRET}" }}
        storage = {{ url = "mysql://root@localhost/letta" }}
        discovery = {{ intervall = 3 }}
        log = {{ level = "loud" }}
    """
    for command in ("run", "check", "migrate", "status"):
        done = await shell.do(command, config=config)
        assert (done.code, done.out) == (2, "")
        for key in ("letta.base_url", "letta.batch_size", "storage.url", "discovery.intervall", "log.level", "watch"):
            assert f"  {key}: " in done.err
        assert "Traceback" not in done.err


async def test_wrong_usage(shell: Shell) -> None:
    """Exit code 2 when the file is no TOML or is not there, nothing is watched, or the command line is wrong."""
    for words in (("run", "--twice"), ("walk",), ("run", "--config", "/absent.toml"), ("run",)):
        done = await shell.do(*words, is_configured=False)
        assert (done.code, done.out) == (2, ""), words
        assert "Traceback" not in done.err
    done = await shell.do("run", config="letta = [")
    assert done.code == 2
    assert "config.toml" in done.err


@pytest.mark.parametrize("command", ["run", "check"])
async def test_wrong_key_is_refused(shell: Shell, command: str) -> None:
    """I10: exit code 3 and one sentence, without the key, when the server does not take it."""
    shell.letta.password = "another"
    done = await shell.do(command)
    assert done.code == 3
    assert "Traceback" not in done.out + done.err
    assert "letta.api_key" in done.out + done.err


async def test_empty_postgresql_is_refused(shell: Shell, postgresql_url: str) -> None:
    """I7: `run` leaves an empty PostgreSQL database alone, exits 3 and names the command that makes the schema."""
    for command in ("run", "check", "status", "verify"):
        done = await shell.do(command)
        assert done.code == 3, done.err
        assert "letta-ingest migrate" in done.out + done.err
    assert "upgraded: empty ->" in (await shell.do("migrate")).out
    assert "schema is current" in (await shell.do("migrate")).out
    assert (await shell.do("run", "--once")).code == 0
    assert (await shell.do("check")).code == 0
    connection = await asyncpg.connect(postgresql_url)
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    await connection.close()
    for command in ("run", "check", "status", "migrate"):
        done = await shell.do(command)
        assert done.code == 3, done.err
        assert "newer" in done.out + done.err
        assert "Traceback" not in done.err


async def test_unreachable_database(shell: Shell) -> None:
    """Exit code 3 and a sentence, without the password, when a command cannot reach the database."""
    shell.database_url = f"postgresql://letta:{SECRET}@127.0.0.1:1/letta"
    for command in ("migrate", "check", "status", "verify"):
        done = await shell.do(command)
        assert done.code == 3, done.err
        assert "Traceback" not in done.err
        assert SECRET not in done.out + done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
async def test_stop_before_the_database_is_there(shell: Shell, number: signal.Signals) -> None:
    """A worker that still waits for its database ends at once and quietly when it is told to, with exit code 0."""
    shell.database_url = "postgresql://letta@127.0.0.1:1/letta"
    life = shell.start("run")
    await shell.until_logged(life, "database.unavailable")
    assert await shell.stop(life, number) == 0
    assert {line["event"] for line in shell.logged(life)} == {"database.unavailable"}
    assert "Traceback" not in (shell.folder / "1.err").read_text()


async def test_once_ends_by_itself(shell: Shell) -> None:
    """`run --once` stores what there is, waits for the live run, and exits 0."""
    run = shell.letta.new_run()
    life = shell.start("run", "--once")
    await shell.until_logged(life, "worker.started")
    await until(lambda: shell.letta.open_streams == 1, 10)
    run.say("hello")
    assert life.exit_code is None
    run.complete()
    assert await life.wait(10) == 0
    assert (await shell.tally()).is_exact
