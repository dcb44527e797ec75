"""Each error of docs/troubleshooting.md is provoked as a user would, and the screen must say what the page says."""

from __future__ import annotations

import ast
import asyncio
import re
import sqlite3
import ssl
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.faults.database_disk import TinyDisk
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.shell import SECRET, Done, Shell, shell_on
from worker.demo.fake_faults import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SECTION = re.compile(r"^### ([^\n]+)\n\n```text\n(.+?)```\n\n(.+?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
ALL = "[watch]\nall = true\n"
TLS = ROOT / "tests" / "letta" / "tls"


@dataclass(frozen=True)
class Entry:
    """What the page says of one error."""

    message: str
    advice: str

    @property
    def exit_code(self) -> int | None:
        """None where the worker goes on."""
        found = re.search(r"Exit\s+code (\d)", self.advice)
        return int(found[1]) if found else None

    def is_on(self, screen: str) -> bool:
        """Whether the message is there; a box around it and its line breaks do not count."""
        escaped = re.escape(plain(self.message))
        pattern = re.sub(r"<[a-z]+>", lambda gap: ".*?" if gap[0] == "<more>" else ".+?", escaped)
        return re.search(pattern, plain(screen)) is not None


ENTRIES = {title: Entry(message, advice) for title, message, advice in SECTION.findall(PAGE)}


def plain(text: str) -> str:
    """Text as one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# ---- the configuration: the file is enough ----

WRONG_CONFIGURATIONS = {
    "Not TOML": "[letta",
    "A misspelt setting": f"{ALL}[letta]\nbatchsize = 100",
    "A setting that does not exist": f"{ALL}[letta]\ncolour = 'red'",
    "A number out of range": f"{ALL}[letta]\nbatch_size = 1",
    "A value of another kind": f"{ALL}[letta]\nread_timeout = 'soon'",
    "A word that is not one of those": f"{ALL}[log]\nlevel = 'loud'",
    "A section that is none": f"letta = 'http://localhost:8283'\n{ALL}",
    "Nothing is watched": "[watch]\nall = false",
    "No watch section": "[log]\nlevel = 'info'",
    "A conversation's id that is none": "[watch]\nconversations = ['thread-1']",
    "An agent's id that is none": "[watch]\nagents = ['me']",
    "Ids that are no list": "[watch]\nagents = 'agent-1'",
    "The server's address is none": f"{ALL}[letta]\nbase_url = 'letta.example.com'",
    "A password in the server's address": f"{ALL}[letta]\nbase_url = 'https://me:{SECRET}@letta.example.com'",
    "Two keys": f"{ALL}[letta]\napi_key = '{SECRET}'\napi_key_file = 'key'",
    "An empty key": f"{ALL}[letta]\napi_key = ' '",
    "A key with strange characters": f"{ALL}[letta]\napi_key = '“{SECRET}”'",
    "The key's file": f"{ALL}[letta]\napi_key_file = '/absent/key'",
    "The certificates' file": f"{ALL}[letta]\nca_file = '/absent/ca.pem'",
    "A database of another kind": f"{ALL}[storage]\nurl = 'mysql://me:{SECRET}@db/letta'",
    "The database's URL is none": f"{ALL}[storage]\nurl = 'letta-ingest.db'",
    "A database in memory": f"{ALL}[storage]\nurl = 'sqlite://'",
    "An at sign in a password": f"{ALL}[storage]\nurl = 'postgresql://me:p@{SECRET}@db/letta'",
    "A parameter in the database's URL": f"{ALL}[storage]\nurl = 'postgresql://db/letta?ssl=true'",
    "A parameter in a SQLite URL": f"{ALL}[storage]\nurl = 'sqlite:///letta.db?mode=ro'",
    "A mode of encryption that does not exist": f"{ALL}[storage]\nurl = 'postgresql://db/letta?sslmode=on'",
    "A time without a zone": f"{ALL}[discovery]\nstart = 2026-01-31T00:00:00",
    "A start that is none": f"{ALL}[discovery]\nstart = 'yesterday'",
    "A listen address that is none": f"{ALL}[service]\nlisten = '9464'",
    "A page token that can be guessed": f"{ALL}[service]\npage_token = 'letmein'",
    "Two page tokens": f"{ALL}[service]\npage_token = '{SECRET}'\npage_token_file = 'token'",
    "Transcripts without a token": f"{ALL}[service]\nlisten = '0.0.0.0:9464'\ntranscripts = true",
    "The page token's file": f"{ALL}[service]\npage_token_file = '/absent/token'",
}


# ---- what else a user does ----


async def misspell_a_command(shell: Shell) -> Done:
    """At the prompt."""
    return await shell.do("walk", is_configured=False)


async def misspell_an_option(shell: Shell) -> Done:
    """At the prompt."""
    return await shell.do("run", "--twice", is_configured=False)


async def keep_the_demo_twice(shell: Shell) -> Done:
    """In a folder with a database."""
    (shell.folder / "letta-ingest.db").touch()
    return await shell.do("demo", "--keep", str(shell.folder), is_configured=False)


async def name_no_file(shell: Shell) -> Done:
    """With --config."""
    return await shell.do("run", "--config", str(shell.folder / "absent.toml"), is_configured=False)


async def name_a_file_that_fails(shell: Shell) -> Done:
    """One that is there, and can be opened, and gives an error when it is read."""
    if sys.platform != "linux":
        pytest.skip("a file that nobody can read, not even root, is found on Linux")
    return await shell.do("run", "--config", "/proc/self/mem", is_configured=False)


def set_variable(name: str) -> Callable[[Shell], Awaitable[Done]]:
    """In the environment."""

    async def provoke(shell: Shell) -> Done:
        return await shell.do("check", environ={name: "x"})

    return provoke


# ---- the server ----


async def stop_the_server(shell: Shell) -> Done:
    """Before `check`."""
    await shell.letta.stop_listening()
    return await shell.do("check")


async def run_without_a_server(shell: Shell) -> Done:
    """And wait for what the worker says."""
    await shell.letta.stop_listening()
    return await until_said(shell, "discovery.failed")


async def until_said(shell: Shell, event: str) -> Done:
    """Run the worker until it has logged the event; it must be alive then, and end well."""
    life = shell.start("run")
    await shell.until_logged(life, event)
    said = (shell.folder / f"{len(shell.lives)}.err").read_text()
    goes_on = life.exit_code is None
    life.kill()
    return Done(None if goes_on else life.exit_code, "", said)


def answer(fault: Answer, config: str | None = None) -> Callable[[Shell], Awaitable[Done]]:
    """What the server says while `check` looks."""

    async def provoke(shell: Shell) -> Done:
        shell.letta.faults.append(fault)
        if config is None:
            return await shell.do("check")
        return await shell.do("check", config=config.format(url=shell.letta.url, key=SECRET, folder=shell.folder))

    return provoke


async def serve_with_an_unknown_certificate(shell: Shell) -> Done:
    """Over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await shell.do("check", config=f"{ALL}[letta]\nbase_url = 'https://localhost:{port}'")


def change_the_key(command: str) -> Callable[[Shell], Awaitable[Done]]:
    """On the server."""

    async def provoke(shell: Shell) -> Done:
        shell.letta.password = "another"
        return await shell.do(command)

    return provoke


async def leave_the_key_out(shell: Shell) -> Done:
    """Of the configuration."""
    return await shell.do("run", config=f"{ALL}[letta]\nbase_url = '{shell.letta.url}'")


async def take_redis_away(shell: Shell) -> Done:
    """From the server."""
    shell.letta.redis = "none"
    return await shell.do("check")


# ---- the database ----


def use(url: str, *words: str) -> Callable[[Shell], Awaitable[Done]]:
    """A database of this URL; {folder} is the shell's."""

    async def provoke(shell: Shell) -> Done:
        shell.database_url = url.replace("{folder}", str(shell.folder))
        return await shell.do(*words)

    return provoke


async def run_without_a_database(shell: Shell) -> Done:
    """And wait for what the worker says."""
    shell.database_url = "postgresql://me@127.0.0.1:1/letta"
    return await until_said(shell, "database.unavailable")


async def fill_the_disk(shell: Shell) -> Done:
    """Which is a small one of its own, and really full."""
    folder = shell.folder / "disk"
    folder.mkdir()
    config = shell.folder / "config.toml"
    config.write_text(f"{ALL}[storage]\nurl = 'sqlite:///{folder}/letta-ingest.db'\n[service]\nlisten = '127.0.0.1:0'")
    with TinyDisk(folder, 1) as disk:
        disk.fill()
        command = [*disk.inside, sys.executable, "-P", "-m", "worker", "run", "--config", str(config)]
        worker = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            assert worker.stderr is not None
            async with asyncio.timeout(20):
                said = await worker.stderr.readline()
            return Done(worker.returncode, "", said.decode())
        finally:
            worker.kill()
            await worker.communicate()


async def write_another_file(shell: Shell) -> Done:
    """Where the database should be."""
    (shell.folder / "notes.txt").write_text("remember the milk " * 100)
    shell.database_url = f"sqlite:///{shell.folder}/notes.txt"
    return await shell.do("run")


def make_sqlite_old() -> None:
    """As an old system has it; called in the worker's process."""
    sqlite3.sqlite_version_info = (3, 26, 0)


async def use_an_old_sqlite(shell: Shell) -> Done:
    """Start with it."""
    return await shell.do("run", prepare=make_sqlite_old)


async def delete_the_file(shell: Shell) -> Done:
    """Under a running worker."""
    run = shell.letta.new_run()
    run.say("hello")
    life = shell.start("run")
    await shell.until_logged(life, "worker.started")
    async with asyncio.timeout(20):
        while await shell.rows() == 0:  # noqa: ASYNC110 - what another process does sets no event of ours
            await asyncio.sleep(0.05)
    Path(shell.database_url.removeprefix("sqlite:///")).unlink()  # noqa: ASYNC240
    run.say("there")
    code = await life.wait(20)
    return Done(code, "", (shell.folder / f"{len(shell.lives)}.err").read_text())


@dataclass(frozen=True)
class OnPostgres:
    """Something wrong with a PostgreSQL database; `statements` make it so, after `migrate` if that is wanted."""

    command: str
    user: str = "postgres"
    database: str = ""
    parameters: str = ""
    is_migrated: bool = False
    statements: tuple[str, ...] = ()

    async def provoke(self, shell: Shell, server: PostgresServer) -> Done:
        """Make it so, and use it."""
        url = shell.database_url = server.create_database()
        name = url.rpartition("/")[2]
        if self.is_migrated:
            assert (await shell.do("migrate")).code == 0
        admin = await asyncpg.connect(url)
        try:
            for statement in self.statements:
                await admin.execute(statement.replace("{name}", name))
            used = self.database.replace("{name}", name) or name
            shell.database_url = server.url(used).replace("postgres@", f"{self.user.replace('{name}', name)}@")
            shell.database_url += self.parameters
            return await shell.do(self.command)
        finally:
            await admin.close()


READER = ("CREATE ROLE reader_{name} LOGIN", "GRANT SELECT ON alembic_version TO reader_{name}")
OLDER = "UPDATE alembic_version SET version_num = '0001'"
UNKNOWN = "UPDATE alembic_version SET version_num = '9999'"
LATIN = "CREATE DATABASE latin_{name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
ON_POSTGRES = {
    "A role that does not exist": OnPostgres("run", user="nobody"),
    "A database that does not exist": OnPostgres("run", database="nowhere"),
    "A privilege is missing": OnPostgres(
        "run",
        user="reader_{name}",
        is_migrated=True,
        statements=(*READER, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_{name}"),
    ),
    "A privilege to read is missing": OnPostgres("status", user="reader_{name}", is_migrated=True, statements=READER),
    "Encryption that cannot be had": OnPostgres("run", parameters="?sslmode=require"),
    "An encoding that cannot hold everything": OnPostgres("run", database="latin_{name}", statements=(LATIN,)),
    "No schema yet": OnPostgres("run"),
    "An older schema": OnPostgres("run", is_migrated=True, statements=(OLDER,)),
    "An unknown schema": OnPostgres("run", is_migrated=True, statements=(UNKNOWN,)),
}


async def write_a_wrong_password(shell: Shell) -> Done:
    """For a server that asks for one."""
    with running_postgres() as server:
        rules = server._data / "pg_hba.conf"
        rules.write_text("host all reader 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        server.stop()
        server.start()
        admin = await asyncpg.connect(server.create_database())
        await admin.execute("CREATE ROLE reader LOGIN PASSWORD 'right'")
        await admin.close()
        shell.database_url = server.create_database().replace("postgres@", f"reader:{SECRET}@")
        return await shell.do("run")


# ---- the listen address, and what is stored ----


async def listen_twice(shell: Shell) -> Done:
    """Where somebody listens already."""
    shell.listen = shell.letta.url.removeprefix("http://")
    return await shell.do("run")


async def listen_elsewhere(shell: Shell) -> Done:
    """On an address for documentation, which no machine has."""
    shell.listen = "192.0.2.1:9464"
    return await shell.do("run")


def delete_and_verify(statement: str, *words: str) -> Callable[[Shell], Awaitable[Done]]:
    """What was stored."""

    async def provoke(shell: Shell) -> Done:
        run = shell.letta.new_run()
        run.say("hello")
        run.complete()
        assert (await shell.do("run", "--once")).code == 0
        with closing(sqlite3.connect(shell.database_url.removeprefix("sqlite:///"))) as connection, connection:
            connection.executescript(statement)
        return await shell.do("verify", *words)

    return provoke


ALL_OF_IT = "; ".join(f"DELETE FROM {table}" for table in ("chunks", "messages", "streamed_messages", "gaps", "runs"))
IN_TROUBLE = b'{"detail":"An unknown error occurred"}'
LETTA_AND_AGENT = """
letta = {{ base_url = "{url}", api_key = "{key}" }}
watch = {{ agents = ["agent-1"] }}
storage = {{ url = "sqlite:///{folder}/letta-ingest.db" }}
"""
PROVOCATIONS: dict[str, Callable[[Shell], Awaitable[Done]]] = {
    "A command that does not exist": misspell_a_command,
    "An option that does not exist": misspell_an_option,
    "The demo finds a database": keep_the_demo_twice,
    "No such file": name_no_file,
    "The file cannot be read": name_a_file_that_fails,
    "A misspelt variable": set_variable("LETTA_INGEST_STORAGE_URL"),
    "A variable that names no section": set_variable("LETTA_INGEST_METRICS__PORT"),
    "A list in a variable": set_variable("LETTA_INGEST_WATCH__AGENTS"),
    "The server is down": stop_the_server,
    "The server is down while the worker runs": run_without_a_server,
    "Something else answers": answer(Answer(404, b"<h1>Not Found</h1>", on="health", content_type="text/html")),
    "A page instead of data": answer(Answer(200, b"<h1>Welcome</h1>", on="health", content_type="text/html")),
    "A certificate that is not trusted": serve_with_an_unknown_certificate,
    "The key is refused": change_the_key("run"),
    "A key is wanted": leave_the_key_out,
    "The key is refused, seen by check": change_the_key("check"),
    "The list of runs cannot be read": answer(Answer(500, IN_TROUBLE, on="runs")),
    "No background streaming": take_redis_away,
    "The stream endpoint fails": answer(Answer(502, b"", on="stream")),
    "A stream of a run that does not exist": answer(Answer(200, on="stream", content_type="text/event-stream")),
    "An agent that cannot be asked": answer(Answer(500, IN_TROUBLE, on="conversations"), LETTA_AND_AGENT),
    "The database cannot be reached": use("postgresql://me@127.0.0.1:1/letta", "migrate"),
    "The database cannot be reached, seen by check": use("postgresql://me@127.0.0.1:1/letta", "check"),
    "The database is away while the worker runs": run_without_a_database,
    "The disk is full": fill_the_disk,
    "A wrong password": write_a_wrong_password,
    "A SQLite file that cannot be created": use("sqlite:////absent/letta.db", "run"),
    "A SQLite file that cannot be used": use("sqlite:///{folder}", "run"),
    "A file that is no database": write_another_file,
    "A SQLite that is too old": use_an_old_sqlite,
    "A file that was taken away": delete_the_file,
    "The port is taken": listen_twice,
    "The address is not ours": listen_elsewhere,
    "Something is wrong with what is stored": delete_and_verify("DELETE FROM chunks WHERE seq_id = 1"),
    "A run is missing": delete_and_verify(ALL_OF_IT, "--server"),
}


# ---- the tests ----


@pytest.fixture
async def shell(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Shell]:
    """Commands on SQLite and a server that asks for a key."""
    async with shell_on(sqlite_url, tmp_path) as made:
        yield made


def confirm(title: str, done: Done) -> None:
    """The screen says what the page says, with its exit code, and nothing that was not meant for it (I10)."""
    entry, screen = ENTRIES[title], done.out + done.err
    assert entry.is_on(screen), f"the page says:\n{entry.message}\nthe screen says:\n{screen}"
    assert done.code == entry.exit_code
    assert "Traceback" not in screen
    assert SECRET not in screen


@pytest.mark.parametrize("title", WRONG_CONFIGURATIONS)
async def test_wrong_configuration(shell: Shell, title: str) -> None:
    """A wrong configuration is answered as the page says (I10)."""
    confirm(title, await shell.do("check", config=WRONG_CONFIGURATIONS[title]))


@pytest.mark.parametrize("title", PROVOCATIONS)
async def test_error(shell: Shell, title: str) -> None:
    """What goes wrong is told as the page says (I7, I10)."""
    confirm(title, await PROVOCATIONS[title](shell))


@pytest.mark.parametrize("title", ON_POSTGRES)
async def test_error_on_postgresql(shell: Shell, postgres_server: PostgresServer, title: str) -> None:
    """What PostgreSQL refuses is told as the page says (I7, I10)."""
    confirm(title, await ON_POSTGRES[title].provoke(shell, postgres_server))


def test_every_error_of_the_page_is_provoked() -> None:
    """No entry of the page is without its proof, and each has a message, a cause, a remedy and an end."""
    assert list(ENTRIES) == [*dict.fromkeys(re.findall(r"^### (?!Other words)(.+)$", PAGE, re.MULTILINE))]
    assert set(ENTRIES) == {*WRONG_CONFIGURATIONS, *PROVOCATIONS, *ON_POSTGRES}
    for title, entry in ENTRIES.items():
        assert "**Remedy:**" in entry.advice, title
        assert entry.exit_code is not None or "No exit." in entry.advice, title


def test_every_error_of_the_code_is_on_the_page() -> None:
    """Whatever the code says to an operator is on the page, word for word."""
    page = plain(PAGE.replace("`", ""))
    said = [part for path in sorted((ROOT / "worker").rglob("*.py")) for part in said_by(path)]
    assert len(said) > 50
    assert [part for part in said if plain(part.replace("`", "")) not in page] == []


def said_by(path: Path) -> Iterator[str]:
    """The constant parts of the messages a module makes for an operator; not the names of types in them."""
    names = {"ConfigError", "RefusedError", "TroubleError", "NoBackgroundError"}
    if path.name in {"config.py", "engine.py"}:
        names.add("ValueError")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            for part in parts:
                if isinstance(part, ast.Constant) and len(str(part.value).strip(" :();")) > 5:
                    yield str(part.value).strip(" :")
