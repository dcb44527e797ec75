"""Ids, status words and errors made to move a cursor, change colours, forge lines or be taken for markup or SQL.

Real processes follow a server that gives them out; then every command looks at what is stored. What they print is
shown, not obeyed: no byte of control but the newline reaches the terminal.
"""

from __future__ import annotations

import json
import socket
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.faults.hostile import StrangeRuns
from tests.support.lives import until
from tests.support.looks import looking
from tests.support.shell import CONFIG, SECRET, Shell
from worker.demo.fake_faults import Answer
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TRICKS = [
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "\x9b31m\x90",
    "\r\x08\x08\x7f",
    "x\nFAULT    run-forged",
    "\u202egnp.exe\u2066\u200b",
    "\u2028\u0085\ufeff",
    "[bold red]x[/]",
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    ":bomb:",
    "\\[x]\\",
    "'; DROP TABLE runs; --",
    "../../../../etc/passwd",
    "%s%n{0}{run_id}$(reboot)`id`",
    "a=b c='d' \"e\"",
]


@pytest.fixture
async def shell(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Shell]:
    """Commands on SQLite."""
    async with FakeLetta(keepalive_interval=0.2, password=SECRET, seed=1) as letta:
        made = Shell(letta, tmp_path, sqlite_url)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            made.listen = f"127.0.0.1:{probe.getsockname()[1]}"
        try:
            yield made
        finally:
            for life in made.lives:
                life.kill()


def strange_runs(letta: FakeLetta) -> StrangeRuns:
    """For each trick a run that is over and one that goes on, with the trick in every word the server has for it."""
    fault = StrangeRuns()
    for number, trick in enumerate(TRICKS):
        for kind in ("over", "alive"):
            run = letta.new_run(f"conv-{trick}", f"agent-{trick}")
            fault.add(letta, run, f"run-{kind}{number}-{trick}")
            if kind == "over":
                run.complete()
                run.ended_with = trick
            run.metadata["error"] = trick
    letta.faults.append(fault)
    return fault


def spelt_out(text: str) -> str:
    """How a person is shown it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def assert_harmless(text: str) -> None:
    """Nothing in it but text and newlines."""
    assert [c for c in text if c != "\n" and not c.isprintable()] == []


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_tricks_are_shown_and_not_obeyed(shell: Shell, log_format: str) -> None:
    """Followed, logged, listed, verified and counted, a trick stays text, and the runs are stored all the same (I6)."""
    fault = strange_runs(shell.letta)
    alive = [run_id for run_id in fault.runs if "-alive" in run_id]
    over = [run_id for run_id in fault.runs if "-over" in run_id]
    settings = {"url": shell.letta.url, "key": SECRET, "database_url": shell.database_url, "listen": shell.listen}
    config = CONFIG.format(**settings).replace("letta = {", "letta = { max_streams = 40,")
    config += f'log = {{ level = "debug", format = "{log_format}" }}\n'
    life = shell.start("run", config=config)
    said = shell.folder / "1.err"

    await until(lambda: said.read_text().count("run.finished") == len(over), 20)
    async with looking(shell.database_url) as look:
        states = {run_id: run.state for run_id, run in (await look.runs()).items()}
    assert states == dict.fromkeys(over, "incomplete") | dict.fromkeys(alive, "following")

    wide = {"COLUMNS": "1000"}
    status = await shell.do("status", config=config, environ=wide)
    for name in alive[:20]:
        assert f"{spelt_out(name)} " in status.out
    figures = await shell.do("status", "--json", config=config)
    assert {run["run_id"] for run in json.loads(figures.out)["unfinished"]} <= set(alive)
    async with httpx.AsyncClient(base_url=f"http://{shell.listen}", trust_env=False) as client:
        metrics = (await client.get("/metrics")).text
        ready = (await client.get("/readyz")).text
    assert not any(trick in metrics for trick in TRICKS)
    assert await shell.stop(life) == 0

    forge(shell, over[0])
    report = await shell.do("verify", config=config)
    assert report.code == 1
    for name in over[1:]:
        assert f"FAULT    {spelt_out(name)}: chunk_count is 77" in report.out
    missing = await shell.do("verify", "--server", config=config)
    assert f"MISSING  {spelt_out(over[0])}: " in missing.out
    as_json = await shell.do("verify", "--server", "--json", config=config)
    assert json.loads(as_json.out)["unknown_runs"] == [over[0]]

    for done in (status, figures, report, missing, as_json):
        assert_harmless(done.out + done.err)
    for text in (metrics, ready, said.read_text()):
        assert_harmless(text)
    assert all(line.startswith("{" if log_format == "json" else "20") for line in said.read_text().splitlines())


def forge(shell: Shell, forgotten: str) -> None:
    """Give `verify` something to say: one run is forgotten, and the others' counts are wrong."""
    with closing(sqlite3.connect(shell.database_url.removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM runs WHERE run_id = ?", [forgotten])
        connection.execute("UPDATE runs SET chunk_count = 77")
        connection.commit()


@pytest.mark.parametrize("command", ["run", "check", "verify"])
async def test_what_a_refusing_server_says(shell: Shell, command: str) -> None:
    """A server's words are on one line of the sentence a command ends with, spelt out (I6)."""
    trick = "\x1b[2J\r\n\x9b1mletta-ingest: all is well\u202e[/]"
    shell.letta.faults.append(Answer(401, json.dumps({"detail": trick}).encode(), on="runs", times=None))
    shell.letta.version = f"0.16.8{trick}"
    assert (await shell.do("migrate")).code == 0

    done = await shell.do(command, *(["--server"] if command == "verify" else []), environ={"COLUMNS": "1000"})

    assert done.code == 3
    assert_harmless(done.out + done.err)
    said = next(line for line in (done.out + done.err).splitlines() if "HTTP 401" in line)
    assert r"\x1b[2J \x9b1mletta-ingest: all is well\x202e[/]" in said
