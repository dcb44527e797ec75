"""Tables and a chart of what was measured: docs/benchmarks.md. Used by __main__.py."""

import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.catch_up import FLOOR, WORKER, Load, Measured, ratio
from benchmarks.catch_up import Results as CatchUp
from benchmarks.database import DATABASES
from benchmarks.growth import Flat, Length, Second
from benchmarks.live_load import Live
from benchmarks.start import Idle, Restart

BAR, ROW, LEFT, WIDTH = 14, 22, 190, 720
NOTES = Path(__file__).parent / "notes.md"
"""What a person made of the figures; to be read again when they are recorded again."""
COLOURS = {"SQLite": "#1d4ed8", "PostgreSQL": "#b45309"}


class Results(NamedTuple):
    """Everything one `make bench` has measured."""

    catch_up: CatchUp
    live: list[Live]
    restart: list[Restart]
    idle: list[Idle]
    length: list[Length]
    second: Second
    flat: list[Flat]


def median(measured: Sequence[Any], name: str) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(getattr(each, name) for each in measured)


def document(results: Results, size: Load, rounds: int) -> str:
    """The whole page."""
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"""# Benchmarks

Written by `make bench ARGS=--record` on {machine}; everything in one run, and the load and PostgreSQL on the same
cores. Only the ratios mean anything elsewhere. What each contender is: `make bench ARGS=--help`.

## Catching up: {size.runs} finished runs of {size.chunks:,} chunks, {rounds} rounds

Chunks a second from the first request for a stream to the end of the process. CPU and memory are of the whole process,
its start included; the database server's are not in them. `naive` and `dlt` were given 1 % and 10 % of the runs.

{_catch_up(results.catch_up)}

![Chunks a second](benchmarks.svg)

## Live: runs that say 20 chunks a second each, in bursts twice a second

Lag: from the receipt of a lot of chunks to its commit, the upper bound of the histogram's bucket.

{_live(results.live)}

## Flat cost

Catching up into a database that is full already and into an empty one, in turn; the start of the process counts.

{_flat(results.flat)}

One run, however long:

{_length(results.length)}

## Start, idling, a second worker

{_start(results)}

{NOTES.read_text()}"""


def _table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A table; a column whose name begins with `#` holds numbers."""
    names = head.split(", ")
    lines = [
        [name.lstrip("#") for name in names],
        ["---:" if name.startswith("#") else "---" for name in names],
        *([str(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _catch_up(results: CatchUp) -> str:
    def row(name: str, database: str, measured: Sequence[Measured]) -> Iterator[object]:
        rates = [each.rate for each in measured]
        yield from (name, database)
        yield f"{ratio(results, name, FLOOR.name, database):.2f}"
        yield f"{ratio(results, name, 'naive', database):.1f}"
        yield from (f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}")
        yield from (f"{median(measured, 'cpu'):.1f}", f"{median(measured, 'peak_mib'):.0f} MiB")

    rows = [tuple(row(*key, measured)) for key, measured in results.items()]
    return _table("who, database, #x floor, #x naive, #chunks/s, spread, #CPU us/chunk, #memory", rows)


def _live(measured: Sequence[Live]) -> str:
    rows = [
        (
            *(f"{each.runs:,}", each.database, f"{each.served:,}", f"{each.stored:,.0f}"),
            *(f"{1000 * each.p50:,.0f} ms", f"{1000 * each.p99:,.0f} ms", f"{each.cpu:.0%}", f"{each.mib:.0f} MiB"),
        )
        for each in measured
    ]
    return _table("#runs, database, #chunks/s said, #stored, #lag p50, #lag p99, #CPU of a core, #memory", rows)


def _flat(measured: Sequence[Flat]) -> str:
    rows = []
    for database in DATABASES:
        rounds = [each for each in measured if each.database == database]
        share = statistics.median(each.rate / each.rate_of_empty for each in rounds)
        rates = f"{median(rounds, 'rate'):,.0f}", f"{median(rounds, 'rate_of_empty'):,.0f}"
        rows.append((database, f"{rounds[0].stored:,}", *rates, f"{share:.2f}"))
    return _table("database, #rows stored before, #chunks/s, #chunks/s when empty, #ratio", rows)


def _length(measured: Sequence[Length]) -> str:
    rows = [(f"{m.chunks:,}", m.database, f"{m.rate:,.0f}", f"{m.peak_mib:.0f} MiB") for m in measured]
    return _table("#chunks, database, #chunks/s, #memory at its peak", rows)


def _start(results: Results) -> str:
    lines = [
        f"- Restart, {each.database}, {each.runs:,} stored runs and 1,000 unfinished ones: the first new row is durable"
        f" {each.seconds:.1f} s after the start of the process."
        for each in results.restart
    ]
    lines += [
        f"- Idle, {each.conversations:,} watched conversations: {each.cpu:.2%} of a core,"
        f" {each.requests_an_interval:.1f} requests an interval."
        for each in results.idle
    ]
    both, alone = results.second
    return "\n".join(
        [*lines, f"- Two workers at the same runs on one PostgreSQL: {both:.1f} s; one alone {alone:.1f} s."]
    )


def chart(results: CatchUp) -> str:
    """Bars of chunks a second, with the lowest and the highest of the rounds."""
    top = max(each.rate for measured in results.values() for each in measured)
    scale = (WIDTH - LEFT - 90) / top
    bars = []
    for number, ((name, database), measured) in enumerate(results.items()):
        rates = sorted(each.rate for each in measured)
        middle, y = statistics.median(rates), 12 + number * ROW
        weight = "bold" if name == WORKER.name else "normal"
        bars.append(
            f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end" font-weight="{weight}">{name}, {database}</text>'
            f'<path d="M{LEFT} {y + BAR / 2}h{max(1.0, middle * scale):.1f}" stroke-width="{BAR}"'
            f' stroke="{COLOURS[database]}"/>'
            f'<path d="M{LEFT + rates[0] * scale:.1f} {y + BAR / 2}H{LEFT + rates[-1] * scale:.1f}" stroke="#111827"/>'
            f'<text x="{LEFT + rates[-1] * scale + 8:.1f}" y="{y + 11}">{middle:,.0f}/s</text>'
        )
    height = 20 + len(results) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        f' font-size="12" fill="#374151">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(bars)
        + "\n</svg>\n"
    )
