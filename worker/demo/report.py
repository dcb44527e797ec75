"""What the demo says before and after: what will happen, the proof, and where to go from here. Used by demo.py."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from worker.demo.fake_run import FakeRun
    from worker.demo.proof import StoredRun, Tally

INTRODUCTION = """\
[bold]letta-ingest demo[/bold]: {speakers} agents talk on a fake Letta server on this machine.
A real worker stores every chunk they stream. It is killed with SIGKILL {times}
while they talk, and goes on from where it was. It writes this file:
  {database}
"""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: the rows that were stored, and those of each run that had not ended on the server."""

    pid: int
    rows: int
    unfinished: Mapping[str, int]

    def example(self, runs: Mapping[str, FakeRun]) -> tuple[int, int] | None:
        """Return (rows stored then, chunks in the end) of a run it hit in the middle; None if it hit none."""
        caught = ((rows, len(runs[run_id].expected_rows())) for run_id, rows in self.unfinished.items())
        in_the_middle = [pair for pair in caught if 0 < pair[0] < pair[1]]
        return min(in_the_middle, key=lambda pair: abs(pair[0] / pair[1] - 0.5), default=None)


@dataclass(frozen=True)
class Outcome:
    """All that the proof rests on."""

    runs: Mapping[str, FakeRun]
    stored: Mapping[str, StoredRun]
    tally: Tally
    kills: Sequence[Kill]
    exit_code: int | None

    @property
    def complete(self) -> int:
        """Runs that the worker calls complete, and whose cursor is the number of their rows."""
        return sum(run.state == "complete" and run.cursor == run.rows for run in self.stored.values())

    @property
    def landed(self) -> int:
        """Kills that hit a run in the middle."""
        return sum(kill.example(self.runs) is not None for kill in self.kills)

    @property
    def holds(self) -> bool:
        """Every chunk is there once, every run is complete, every kill landed, and the worker drained."""
        is_all_complete = self.complete == len(self.stored) == self.tally.runs
        return self.tally.is_exact and is_all_complete and self.landed == len(self.kills) and self.exit_code == 0


def print_proof(console: Console, outcome: Outcome) -> None:
    """Print the figures and what they come to."""
    tally = outcome.tally
    examples = [pair for kill in outcome.kills if (pair := kill.example(outcome.runs))]
    pairs = ", ".join(f"{rows} of {total}" for rows, total in examples[:4])
    caught = f":\n{' ' * 17}after chunk {pairs}{', ...' if len(examples) > 4 else ''}" if pairs else ""
    result = f"{tally.lost} lost, {tally.doubled} doubled, {tally.altered} altered"
    lines = [
        "",
        "[bold]The count[/bold] (by the sqlite3 module alone)",
        f"  runs    {tally.runs:>6,} on the server, {len(outcome.stored):,} in the file, {outcome.complete:,} complete",
        f"  chunks  {tally.chunks:>6,} on the server, {tally.stored:,} in the file: {result}",
        f"  kills   {len(outcome.kills):>6,} by SIGKILL, {outcome.landed} in the middle of a run{caught}",
    ]
    if outcome.holds:
        lines.append("[bold green]Every chunk is there exactly once, with its number and its bytes.[/bold green]")
    elif outcome.tally.is_exact and outcome.exit_code != 0:
        lines.append(f"[bold red]FAILED: the worker did not end as it should: {outcome.exit_code}[/bold red]")
    else:
        lines.append("[bold red]FAILED: the figures above are not what was promised.[/bold red]")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def print_next_steps(console: Console, folder: Path) -> None:
    """Name the commands that come next."""
    query = "SELECT run_id, count(*), max(seq_id) FROM chunks GROUP BY run_id"
    program, database = _program(), shlex.quote(str(folder / "letta-ingest.db"))
    lines = [
        "",
        "Look at it:",
        f"  {program} status --config {shlex.quote(str(folder / 'config.toml'))}",
        f'  {_sqlite(database)} "{query}"',
        f"  less {shlex.quote(str(folder / 'worker.log'))}",
        "For your own server, write config.toml:",
        '  letta = { base_url = "http://localhost:8283" }',
        "  watch = { all = true }",
        "then:",
        f"  {program} check --config config.toml",
        f"  {program} run --config config.toml",
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _program() -> str:
    """How the user can call us: by name if that means this installation, else by path."""
    program = Path(sys.executable).with_name("letta-ingest")
    found = shutil.which("letta-ingest")
    if found is not None and Path(found).samefile(program):
        return "letta-ingest"
    here = Path.cwd()
    return shlex.quote(str(program.relative_to(here) if program.is_relative_to(here) else program))


def _sqlite(database: str) -> str:
    """The start of a command that takes a query; not everybody has the sqlite3 program."""
    if shutil.which("sqlite3"):
        return f"sqlite3 {database}"
    code = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]), sep=chr(10))"
    return f'{shlex.quote(sys.executable)} -c "{code}" {database}'
