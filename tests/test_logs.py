"""The log: each event is what its table says, floods are held back, and the journal is told how bad it is."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pytest
import structlog

from tests.support.lives import until
from tests.support.shell import Shell, shell_on
from worker.demo.fake_faults import Answer
from worker.logs import EVENTS, LINES_A_MINUTE, LogEvent, Repeats, set_up_logging

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

WORKER = Path(__file__).parents[1] / "worker"
LEVELS = {"debug", "info", "warning", "error"}


@pytest.fixture
async def shell(tmp_path: Path, sqlite_url: str) -> AsyncIterator[Shell]:
    """Commands on SQLite and a quick server."""
    async with shell_on(sqlite_url, tmp_path) as made:
        yield made


def calls() -> Iterator[tuple[str, str, set[str]]]:
    """Every log call of the worker: event, method and fields."""
    for path in WORKER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            first = node.args[0] if isinstance(node, ast.Call) and node.args else None
            if isinstance(node, ast.Call) and isinstance(first, ast.Constant) and first.value in EVENTS:
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                yield first.value, method, {word.arg or "**" for word in node.keywords}


def test_the_table_is_what_is_logged() -> None:
    """Every event is in the table, is logged somewhere, with fields and levels of the table, and uses all of them."""
    assert list(EVENTS) == list(get_args(LogEvent))
    fields: dict[str, set[str]] = {name: set() for name in EVENTS}
    methods: dict[str, set[str]] = {name: set() for name in EVENTS}
    for event, method, named in calls():
        fields[event] |= {"exception" if name == "exc_info" else name for name in named}
        methods[event] |= {method} & LEVELS or set(EVENTS[event].levels.split()) - {"debug"}
    assert fields == {name: set(event.fields.split()) for name, event in EVENTS.items()}
    assert methods == {name: set(event.levels.split()) for name, event in EVENTS.items()}


def test_repeats_are_held_back() -> None:
    """Of what many runs say at once some lines go out, the next minute's first tells the rest; nothing else is held."""
    now = [0.0]
    repeats = Repeats(lambda: now[0])

    def passed(event: LogEvent, level: str = "info") -> list[object]:
        out = []
        for _ in range(1000):
            try:
                out.append(repeats(None, level, {"event": event}).get("left_out"))
            except structlog.DropEvent:
                continue
        return out

    assert passed("run.reconnecting") == [None] * LINES_A_MINUTE
    assert passed("run.reconnecting", "warning") == [None] * LINES_A_MINUTE
    assert passed("run.finished") == [None] * 1000
    now[0] = 59.9
    assert passed("run.reconnecting") == []
    now[0] = 60.0
    assert passed("run.reconnecting") == [2000 - LINES_A_MINUTE] + [None] * (LINES_A_MINUTE - 1)
    now[0] = 3600.0
    assert passed("run.reconnecting")[0] == 1000 - LINES_A_MINUTE


async def test_a_flood_of_many_runs(shell: Shell) -> None:
    """A worker whose runs all fail at once writes a few lines of it, and goes on trying."""
    for _ in range(40):
        shell.letta.new_run(shell.letta.new_conversation()).say("hello")
    broken = Answer(500, on="stream", times=None)
    shell.letta.faults.append(broken)
    life = shell.start("run", environ={"LETTA_INGEST_LETTA__MAX_STREAMS": "40"})
    await until(lambda: broken.fired > 3 * LINES_A_MINUTE, 20)
    lines = [line for line in shell.logged(life) if line["event"] == "run.reconnecting"]
    assert len(lines) == LINES_A_MINUTE
    assert all(line["run_id"] and line["conversation_id"] for line in lines)
    assert await shell.stop(life) == 0


async def test_the_journal_is_told_how_bad_it_is(shell: Shell) -> None:
    """Where journald reads, each line begins with its priority; where a file does, it is bare JSON."""
    await shell.letta.stop_listening()
    said = []
    for is_journal in (True, False):
        path = shell.folder / f"{len(shell.lives) + 1}.err"
        path.touch()
        found = path.stat()
        stream = f"{found.st_dev}:{found.st_ino + (not is_journal)}"
        life = shell.start("run", environ={"JOURNAL_STREAM": stream})
        await until(lambda path=path: "discovery.failed" in path.read_text(), 20)  # type: ignore[misc]
        life.kill()
        said.append(path.read_text().splitlines())
    journal, plain = said
    for line in journal:
        found_priority = re.match(r"<(\d)>", line)
        assert found_priority is not None
        level = json.loads(line[3:])["level"]
        assert found_priority[1] == {"info": "6", "warning": "4"}[level]
    assert {json.loads(line)["level"] for line in plain} == {"info", "warning"}


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_colours_are_for_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log_format: Literal["json", "console"]
) -> None:
    """What is no terminal gets no colours, nor does one whose user wants none; JSON has none anywhere."""

    def has_colours() -> bool:
        set_up_logging("info", log_format).info("worker.stopped")
        said = capsys.readouterr().err
        assert "worker.stopped" in said
        return "\x1b" in said

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not has_colours()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert has_colours() == (log_format == "console")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours()
