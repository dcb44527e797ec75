"""How the demo looks: a live table in a terminal, plain lines anywhere else. Used by demo.py.

Everything shown was measured: the server's logs are FakeLetta's, the stored rows were counted in the file.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

BAR_CELLS = 24
SHOWN_NOTES = 5
SECONDS_PER_LINE = 2.0


@dataclass(frozen=True)
class Row:
    """One conversation and the run that is going on in it."""

    conversation: str
    run: str
    kind: str
    served: int
    stored: int


@dataclass(frozen=True)
class Scene:
    """One moment."""

    seconds: float
    worker: str
    is_worker_up: bool
    rows: Sequence[Row]
    runs: int
    served: int
    stored: int


class Screen:
    """Shows scenes and notes. Enter it before the first one."""

    def __init__(self, console: Console, longest: int) -> None:
        self._console = console
        self._cell = longest / BAR_CELLS
        self._notes: list[str] = []
        self._shown_at = -SECONDS_PER_LINE
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        self._context: AbstractContextManager[Any] = self._live or nullcontext()
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def note(self, seconds: float, text: str) -> None:
        """Say what just happened."""
        self._notes.append(f"{seconds:5.1f} s  {text}")
        if self._live is None:
            self._print(self._notes[-1])

    def show(self, scene: Scene) -> None:
        """Show the moment; without a terminal only one every two seconds."""
        if self._live is not None:
            self._live.update(self._picture(scene), refresh=True)
        elif scene.seconds >= self._shown_at + SECONDS_PER_LINE:
            self._shown_at = scene.seconds
            self._print(f"{scene.seconds:5.1f} s  {self._totals(scene)}; {scene.worker}")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _picture(self, scene: Scene) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("conversation", no_wrap=True)
        table.add_column("run", no_wrap=True)
        table.add_column("kind", no_wrap=True)
        table.add_column("server", justify="right", no_wrap=True)
        table.add_column("stored", justify="right", no_wrap=True)
        table.add_column("█ stored  ░ not yet", no_wrap=True)
        for row in scene.rows:
            cells = (row.conversation, row.run, row.kind, str(row.served), str(row.stored))
            table.add_row(*cells, self._bar(row))
        worker = Text(scene.worker, style="green" if scene.is_worker_up else "bold red")
        head = Text.assemble(f"{scene.seconds:5.1f} s  ", worker)
        notes = Text("\n".join(self._notes[-SHOWN_NOTES:]), style="yellow")
        return Group(head, table, Text(f"         {self._totals(scene)}", style="bold"), notes)

    def _bar(self, row: Row) -> Text:
        served, stored = (min(BAR_CELLS, round(count / self._cell)) for count in (row.served, row.stored))
        return Text.assemble(("█" * stored, "green"), ("░" * (served - stored), "red"))

    def _totals(self, scene: Scene) -> str:
        return f"server {scene.served:,} chunks of {scene.runs} runs, file {scene.stored:,}"
