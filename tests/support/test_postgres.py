"""The PostgreSQL server other tests stand on: real, recent, never shared by accident, never left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer

USER_THAT_IS_KILLED = """
import os, signal
from tests.support.postgres import running_postgres
with running_postgres() as server:
    print(server.port, server._root, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_server_is_real(postgres_server: PostgresServer) -> None:
    """The server answers through asyncpg and is PostgreSQL 16 or newer."""
    connection = await asyncpg.connect(postgres_server.url("postgres"))
    try:
        assert (await connection.fetchval("SELECT version()")).startswith("PostgreSQL ")
        assert connection.get_server_version().major >= 16
    finally:
        await connection.close()


@pytest.mark.parametrize("turn", ["first", "second"])
async def test_each_test_gets_an_empty_database(postgresql_url: str, turn: str) -> None:
    """A table made in one test is not there in the next one."""
    connection = await asyncpg.connect(postgresql_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        await connection.execute("CREATE TABLE public.left_over (id int)")
    finally:
        await connection.close()


def test_server_does_not_outlive_killed_tests() -> None:
    """SIGKILL of the process that started a server stops the server and removes its files."""
    killed = subprocess.run([sys.executable, "-c", USER_THAT_IS_KILLED], check=False, capture_output=True, text=True)
    port, root = killed.stdout.split()
    deadline = time.monotonic() + 30
    while Path(root).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(root).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0
