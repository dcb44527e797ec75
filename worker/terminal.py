"""What `run` shows on a terminal: the status page in a few lines, and how far it has caught up. Used by cli.py."""

import asyncio
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from worker.page.snapshot import Snapshot, Snapshots
from worker.page.view import View, view
from worker.storage.tables import UNFINISHED_STATES

SECONDS_A_FRAME = 1.0
RUNS_SHOWN = 8
TROUBLES_SHOWN = 3
FIGURES = ("Streams open", "Lag", "Waiting for commit", "Last commit", "Runs stored", "Open gaps")
FOLLOWED = {0: "run", 2: "state", 4: "cursor", 5: "last chunk", 6: "expires in"}
"""What is told of a run, by its place in the status page's row: what 80 columns have room for."""
STYLES = {"starting": "bold", "ready": "bold green", "degraded": "bold yellow", "stuck": "bold red"}


class CatchUp:
    """How many of the runs that were not finished are, since this began to look; with the time that is left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("Runs finished"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=None)
        self._finished_before: int | None = None

    def drawn(self, runs: Mapping[str, int]) -> RenderableType:
        """The bar, given the number of runs in each state."""
        unfinished = sum(runs.get(state, 0) for state in UNFINISHED_STATES)
        finished = sum(runs.values()) - unfinished
        if self._finished_before is None:
            self._finished_before = finished
        done = finished - self._finished_before
        self._progress.update(self._task, completed=done, total=done + unfinished)
        return self._progress


async def show(snapshots: Snapshots, console: Console) -> None:
    """Draw what the worker does, every second, until cancelled. The last picture stays."""
    catch_up = CatchUp(console)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(drawn(await snapshots.take(), catch_up), refresh=True)
            await asyncio.sleep(SECONDS_A_FRAME)


def drawn(snapshot: Snapshot, catch_up: CatchUp) -> RenderableType:
    """One picture. Every text is shown as it is: ids and errors come from a server."""
    seen = view(snapshot, with_transcripts=False)
    lines: list[RenderableType] = [Text(seen.headline, style=STYLES[seen.state])]
    lines += [Text(f"  {reason}") for reason in seen.reasons]
    lines.append(_figures(seen))
    if snapshot.status is not None:
        lines.append(catch_up.drawn(snapshot.status.runs))
    if seen.followed:
        lines.append(_followed(seen))
    lines += [Text("  ".join(cell.text for cell in row), style="yellow") for row in seen.logged[:TROUBLES_SHOWN]]
    lines.append(Text(f"{seen.at}. Ctrl-C stops it: nothing is lost.", style="dim"))
    return Group(*lines)


def _figures(seen: View) -> Table:
    table = Table.grid(padding=(0, 2))
    for figure in seen.figures:
        if figure.label in FIGURES:
            table.add_row(Text(figure.label), Text(figure.value, style="bold"), Text(figure.note, style="dim"))
    return table


def _followed(seen: View) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in FOLLOWED.values():
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for row in seen.followed[:RUNS_SHOWN]:
        table.add_row(*(Text(row[place].text) for place in FOLLOWED))
    return table
