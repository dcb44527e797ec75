"""scratch"""

from __future__ import annotations
import asyncio, os, re, sqlite3, shutil
from pathlib import Path
import pytest
from tests.faults.database_faults import *
from tests.support.lives import until
from tests.support.shell import SECRET, Shell, talking
from tests.support.looks import looking
from tests.storage.test_grants import documented_grants
from worker.demo.fake_letta import FakeLetta


@pytest.fixture
async def letta():
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as server:
        yield server


def sqlite_corrupt(p):
    data = bytearray(p.read_bytes())
    with p.open("r+b") as f:
        f.seek(4096)
        f.write(b"\xa5" * (len(data) - 4096))


def sq_delete(p):
    p.unlink()


def sq_delete_all(p):
    for e in ("", "-wal", "-shm"):
        Path(str(p) + e).unlink()


def sq_replace(p):
    new = p.with_name("new.db")
    shutil.copy(p, new)
    new.rename(p)


def sq_tables(p):
    c = sqlite3.connect(p, timeout=5)
    c.execute("DROP TABLE chunks")
    c.close()


@pytest.mark.parametrize("f", [sqlite_corrupt, sq_delete, sq_delete_all, sq_replace, sq_tables])
async def test_sqlite(letta, tmp_path, f):
    shell = Shell(letta, tmp_path, f"sqlite:///{tmp_path}/x.db")
    try:
        async with talking(letta):
            life = shell.start("run")
            await until(lambda: (tmp_path / "x.db").exists(), 10)
            await asyncio.sleep(2)
            f(tmp_path / "x.db")
            try:
                print(f.__name__, await life.wait(6))
            except TimeoutError:
                print(f.__name__, "RUNS ON")
            print((tmp_path / "1.err").read_text()[-600:])
            print(os.listdir(tmp_path))
    finally:
        for l in shell.lives:
            l.kill()


PG = {
    "revoke": ["REVOKE INSERT ON chunks FROM {role}"],
    "nologin": ['ALTER ROLE "{role}" NOLOGIN', THROW_OUT],
    "dropdb": ['DROP DATABASE "{name}" WITH (FORCE)'],
    "drop table": ["DROP TABLE chunks CASCADE"],
    "drop schema": ["DROP SCHEMA public CASCADE"],
    "revoke select": ["REVOKE SELECT ON runs FROM {role}"],
    "connect": ["REVOKE CONNECT ON DATABASE {name} FROM PUBLIC", THROW_OUT],
}


@pytest.mark.parametrize("f", PG)
async def test_pg(letta, tmp_path, f, postgres_server):
    async with postgres_database(postgres_server) as db:
        await db.do("ALTER DATABASE {name} OWNER TO postgres")
        shell = Shell(letta, tmp_path, db.admin_url)
        assert (await shell.do("migrate")).code == 0
        for g in documented_grants():
            await db.do(g.replace("letta_ingest", "{role}"))
        shell.database_url = db.url
        adm = await asyncpg.connect(db.server.url("postgres"))
        try:
            async with talking(letta):
                life = shell.start("run")
                await asyncio.sleep(2.5)
                print(await db.admin.fetchval("SELECT count(*) FROM chunks"))
                for s in PG[f]:
                    await adm.execute(
                        s.replace("{name}", db.name).replace("{role}", db.role)
                    ) if "DATABASE" in s else await db.do(s)
                try:
                    print(f, await life.wait(6))
                except TimeoutError:
                    print(f, "RUNS ON")
                print((tmp_path / "2.err").read_text()[-600:])
        finally:
            await adm.close()
            for l in shell.lives:
                l.kill()
