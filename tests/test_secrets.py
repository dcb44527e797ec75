"""Keys and passwords reach whom they are for and nobody else (I10): real processes, failing in every usual way.

What each of these tests prints and writes is searched besides, as for the whole suite: tests/support/leaks.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import struct
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.letta.wire import answering, relaying, serving
from tests.support.leaks import MARK
from tests.support.lives import until
from tests.support.shell import SECRET, Shell, shell_on
from worker.config import Config
from worker.demo.fake_faults import Answer
from worker.logs import set_up_logging

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TLS = Path(__file__).parent / "letta" / "tls"
ECHO = json.dumps({"headers": {"authorization": f"Bearer {SECRET}"}, "detail": f"you sent: Bearer {SECRET}"})
IN_THE_WRONG_PLACE = {
    "a list": f"letta = {{ api_key = ['{SECRET}'] }}",
    "a table": f"letta = {{ api_key = {{ key = '{SECRET}' }} }}",
    "a user in the address": f"letta = {{ base_url = 'https://{SECRET}@host' }}",
    "a setting of its own": f"key = '{SECRET}'",
    "the address of the database": f"storage = {{ url = '{SECRET}' }}",
    "a list of them": f"storage = {{ url = ['postgresql://me:{SECRET}@host/db'] }}",
    "an @ in the password": f"storage = {{ url = 'postgresql://me:p@{SECRET}@host/db' }}",
    "an @ and a slash": f"storage = {{ url = 'postgresql://me:p@ss/{SECRET}@host/db' }}",
    "an @ and a question mark": f"storage = {{ url = 'postgresql://me:p@ss?{SECRET}@host/db' }}",
    "an @ and a colon": f"storage = {{ url = 'postgresql://me:p@ss:{SECRET}@host/db' }}",
    "a port": f"storage = {{ url = 'postgresql://host:{SECRET}/db' }}",
    "a parameter": f"storage = {{ url = 'postgresql://host/db?password={SECRET}' }}",
}


@pytest.fixture
async def shell(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Shell]:
    """Commands on SQLite and a server that asks for the key."""
    async with shell_on(sqlite_url, tmp_path) as made:
        yield made


async def refused(shell: Shell, *words: str, **how: Any) -> str:
    """What a command that is refused says; its key is not in it."""
    done = await shell.do(*words, **how)
    said = done.out + done.err
    assert done.code == 3, said
    assert "Traceback" not in said
    assert MARK not in said
    return said


def of(shell: Shell, url: str, more: str = "") -> str:
    """A configuration that names another server."""
    return f"""
        letta = {{ base_url = "{url}", api_key = "{SECRET}", connect_timeout = 2.0, read_timeout = 2.0{more} }}
        watch = {{ all = true }}
        storage = {{ url = "{shell.database_url}" }}
        log = {{ level = "debug", format = "console" }}
    """


def tls_of_our_own() -> ssl.SSLContext:
    """What a server with a certificate of our own needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    return context


# ---- the server ----


async def test_server_that_nobody_vouches_for(shell: Shell) -> None:
    """A server with an unknown certificate gets neither a request nor the key; with its authority named it does."""
    async with relaying(int(shell.letta.url.rpartition(":")[2]), tls_of_our_own()) as relay:
        url = f"https://localhost:{relay.port}"
        assert "certificate" in await refused(shell, "check", config=of(shell, url))
        assert relay.heads == []
        named = f', ca_file = "{TLS / "certificate.pem"}"'
        assert (await shell.do("check", config=of(shell, url, named))).code == 0
        by_environment = {"SSL_CERT_FILE": str(TLS / "certificate.pem")}
        assert (await shell.do("check", config=of(shell, url), environ=by_environment)).code == 0
    assert any(SECRET.encode() in head for head in relay.heads)


async def test_server_that_leads_elsewhere(shell: Shell) -> None:
    """The key does not follow a redirect to another host, port or scheme."""
    async with relaying(int(shell.letta.url.rpartition(":")[2])) as relay:
        for path in ("/v1/health/", "/v1/runs/"):
            elsewhere = Answer(307, headers={"location": f"http://localhost:{relay.port}{path}"}, times=1)
            elsewhere.on = "health" if "health" in path else "runs"
            shell.letta.faults.append(elsewhere)
        assert "FAIL credentials" in await refused(shell, "check")
    assert len(relay.heads) >= 1
    assert not any(MARK.encode() in head for head in relay.heads)


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("status", [401, 403])
async def test_server_that_repeats_the_request(shell: Shell, command: str, status: int) -> None:
    """What a server or a proxy says of a wrong key is told without the key, were it in there."""
    shell.letta.faults.append(Answer(status, ECHO.encode(), on="runs", times=None))

    assert "(the API key)" in await refused(shell, command, config=of(shell, shell.letta.url))


async def test_server_that_is_none(shell: Shell) -> None:
    """Nor when no HTTP comes back at all, or nobody is there."""
    async with answering(f"Bearer {SECRET}\r\n\r\n".encode()) as port:
        said = await shell.do("check", config=of(shell, f"http://127.0.0.1:{port}"))
    await shell.letta.stop_listening()
    await refused(shell, "check", config=of(shell, shell.letta.url))
    assert said.code == 3


# ---- the database ----


async def test_database_that_refuses_the_password(shell: Shell) -> None:
    """A wrong password is answered with a sentence that does not repeat it."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (length := struct.unpack("!i", await reader.readexactly(4))[0]) == 8:  # asks for TLS
            await reader.readexactly(length - 4)
            writer.write(b"N")
        await reader.readexactly(length - 4)
        writer.write(b"R" + struct.pack("!ii", 8, 3))  # the password, please
        await reader.readexactly(1)
        told = await reader.readexactly(struct.unpack("!i", await reader.readexactly(4))[0] - 4)
        heard.append(told)
        fields = b'SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user "me"\0\0'
        writer.write(b"E" + struct.pack("!i", len(fields) + 4) + fields)
        await writer.drain()

    heard: list[bytes] = []
    async with serving(refuse) as port:
        shell.database_url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        for command in ("run", "status", "migrate", "check"):
            assert "password authentication failed" in await refused(shell, command)
    assert set(heard) == {SECRET.encode() + b"\0"}


@pytest.mark.parametrize("name", IN_THE_WRONG_PLACE)
async def test_secret_in_the_wrong_place(shell: Shell, name: str) -> None:
    """A configuration with a secret where it does not belong, or one badly written, is not read aloud."""
    done = await shell.do("check", config=f"watch = {{ all = true }}\n{IN_THE_WRONG_PLACE[name]}\n")

    assert (done.code, done.out) == (2, "")
    assert re.search(r"^  (letta|storage|key)", done.err, re.MULTILINE)
    assert MARK not in done.err


# ---- when all is well ----


async def test_process_shows_nothing(shell: Shell) -> None:
    """Neither the process list nor what a worker says at its most talkative, nor its file, holds the key."""
    run = shell.letta.new_run()
    run.say("hello")
    shell.letta.faults += [
        Answer(500, ECHO.encode(), on="stream"),
        Answer(404, ECHO.encode(), on="messages"),
    ]
    config = shell.folder / "config.toml"
    config.write_text(of(shell, shell.letta.url).replace(f', api_key = "{SECRET}"', ""))
    environ = {**os.environ, "LETTA_API_KEY": SECRET, "LETTA_INGEST_SERVICE__LISTEN": "127.0.0.1:0"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-X", "dev", "-m", "worker", "run", "--once", "--config", str(config)),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        await until(lambda: shell.letta.open_streams == 1, 20)
        shown = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "comm", "status")]  # noqa: ASYNC240
        assert Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077 == 0  # noqa: ASYNC240
        run.complete()
        said, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.decode()
    assert b"run.finished" in said
    assert b"(the API key)" in said
    assert b"worker" in shown[0]
    assert not any(MARK.encode() in text for text in [said, *shown])


def test_settings_show_nothing() -> None:
    """However a configuration is printed, its secrets are stars."""
    config = Config.model_validate(
        {
            "letta": {"api_key": SECRET},
            "watch": {"all": True},
            "storage": {"url": f"postgresql://me:{SECRET}@host/db"},
        }
    )
    shown = [repr(config), str(config), str(config.model_dump()), config.model_dump_json(), repr(vars(config))]
    assert not any(MARK in text for text in shown)


def test_nobody_outside_is_served_by_default() -> None:
    """The endpoints, which ask nobody who is there, listen on loopback unless told otherwise."""
    listen = Config.model_validate({"watch": {"all": True}}).service.listen
    assert ip_address(listen.rpartition(":")[0]).is_loopback


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_values(capsys: pytest.CaptureFixture[str], log_format: Any) -> None:
    """A bug is logged with its traceback, and without the values of the variables around it."""
    log = set_up_logging("debug", log_format)

    def fail(password: str) -> None:
        held = {"authorization": f"Bearer {password}"}
        raise ValueError("a bug", len(held))

    try:
        fail(SECRET)
    except ValueError as error:
        log.error("worker.task_failed", error=repr(error), exc_info=error)  # noqa: TRY400 - as the service does it

    said = capsys.readouterr().err
    assert "in fail" in said
    assert "ValueError" in said
    assert MARK not in said


def test_every_made_up_key_is_searched_for() -> None:
    """What the tests call a key begins so that the search of the whole suite finds it."""
    keys = set()
    for path in Path(__file__).parent.rglob("*.py"):
        keys |= set(re.findall(r'^SECRET = "(sk-[^"]*)"$', path.read_text(), re.MULTILINE))
    assert keys
    assert all(key.startswith(MARK) for key in keys)
