"""The commands. The only place that knows exit codes and terminals; `letta-ingest --help` is its documentation.

Exit codes: 0 done; 1 anything unforeseen; 2 usage or configuration; 3 the server or the database refuses us.
Commands import what they need when they run: `--help` must not take the second that all of it takes to load.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import gc
import json
import os
import sys
from collections.abc import Coroutine, Iterator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from worker.errors import ConfigError, RefusedError, WorkerError

if TYPE_CHECKING:
    from worker.checks import Check
    from worker.config import Config
    from worker.status import Status
    from worker.verify import Report

Result = TypeVar("Result")

EXIT_OTHER, EXIT_CONFIG, EXIT_REFUSED = 1, 2, 3

cli = typer.Typer(
    name="letta-ingest",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Stores every chunk your Letta agents stream in SQL: at least once from Letta, stored exactly once.

Start with `letta-ingest demo`: it needs no server. Then copy config.example.toml, try it with
`letta-ingest check --config config.toml`, and let `letta-ingest run --config config.toml` run as a service.""",
    epilog="""Exit codes: 0 done; 2 usage or configuration; 3 the server or database refused (credentials, schema);
1 anything else. Every setting can also come from the environment: LETTA_INGEST_SECTION__KEY, for instance
LETTA_INGEST_STORAGE__URL; LETTA_BASE_URL and LETTA_API_KEY are read as the official client reads them.""",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="TOML file; config.example.toml lists every setting.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """The console script.

    Python looks for garbage every 700 objects, which takes a tenth of the time: of loading our modules, and of chunks,
    which are a handful of objects each that live until their commit. And at its end it searches everything that was
    ever loaded, for nothing: that takes half a second unless it is told not to look there. A thread that comes back
    from SQLite gets its turn after 1 ms instead of 5: while it waits, its transaction does.
    """
    gc.set_threshold(10_000)
    sys.setswitchinterval(0.001)
    try:
        cli()
    finally:
        gc.freeze()


@cli.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions of what matters and exit.")] = False,
) -> None:
    """Print the versions where asked for."""
    if version:
        typer.echo("\n".join(_versions()))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _versions() -> Iterator[str]:
    """What a report of a bug should name: us, and what the promise rests on."""
    import platform
    import sqlite3

    yield f"letta-ingest {version_of('letta-ingest')}"
    yield f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"SQLite {sqlite3.sqlite_version}"
    for name in ("SQLAlchemy", "aiosqlite", "asyncpg", "httpx", "aiohttp"):
        yield f"{name} {version_of(name)}"


@cli.command()
def run(
    config_path: ConfigOption = None,
    once: Annotated[
        bool, typer.Option("--once", help="Follow everything there is until no run is active, then exit 0.")
    ] = False,
) -> None:
    """Follow the watched runs and store every chunk, until SIGTERM or SIGINT (the service).

    Safe to kill at any moment: it goes on from the stored cursor. Log lines go to stderr; on a terminal it shows what
    it does instead, unless `log.format` is "console". As a service, SIGHUP makes it read the configuration again: what
    is watched, the key, the page's token and the log level change at once.
    """
    from worker import app, config, logs, terminal

    settings = _load(config_path)
    # On a terminal SIGHUP means that the terminal is gone, and ends it as it ends every program.
    reread = None if os.isatty(0) else functools.partial(config.load, config_path)
    troubles = logs.Troubles()
    console = Console(stderr=True, highlight=False)
    is_drawn = settings.log.format == "json" and console.is_terminal and not console.is_dumb_terminal
    log = logs.set_up_logging(settings.log.level, "none" if is_drawn else settings.log.format, troubles)
    show = functools.partial(terminal.show, console=console) if is_drawn else None
    _do(app.run(settings, log, once=once, reread=reread, troubles=troubles, show=show))


@cli.command()
def migrate(config_path: ConfigOption = None) -> None:
    """Create or upgrade the database's schema. Running it again is harmless.

    PostgreSQL needs it before `run` and after an upgrade of letta-ingest; a SQLite file `run` upgrades by itself.
    """
    from worker import app

    before, after = _do(app.migrate(_load(config_path)))
    typer.echo(
        f"schema is current ({after})" if before == after else f"schema upgraded: {before or 'empty'} -> {after}"
    )


@cli.command()
def check(config_path: ConfigOption = None) -> None:
    """Look at configuration, credentials, server and database, and say of each: ok, or what to do."""
    lines = _do(_checks(_load(config_path)))
    if any(not line.is_ok for line in lines):
        raise typer.Exit(EXIT_REFUSED if any(line.is_refusal for line in lines) else EXIT_OTHER)


@cli.command()
def status(
    config_path: ConfigOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second until Ctrl-C.")] = False,
) -> None:
    """Show runs by state, what is being followed, cursors and lag. Reads the database only; the worker may run."""
    _do(_show_status(_load(config_path), as_json=as_json, watch=watch))


@cli.command(name="service-unit")
def service_unit(config_path: ConfigOption = None) -> None:
    """Print the systemd unit for this installation: `> /etc/systemd/system/letta-ingest.service`.

    It runs the letta-ingest that prints it, with the configuration that is named, or /etc/letta-ingest/config.toml.
    """
    from worker import unit

    if config_path is not None and not config_path.is_file():
        _die(ConfigError(f"{config_path}: there is no such file; start from config.example.toml"), EXIT_CONFIG)
    paths = (unit.installed_executable(), (config_path or Path(unit.CONFIG)).absolute())
    for path in filter(unit.is_hidden, paths):
        typer.echo(f"letta-ingest: the service will not see {path}: put it below /opt or /etc", err=True)
    typer.echo(unit.unit(*paths), nl=False)


@cli.command()
def demo(
    kills: Annotated[int, typer.Option("--kills", min=1, help="How often the worker is killed.")] = 5,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Where to put the file; else in a new temporary folder."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="What is said and when it kills.")] = 1,
) -> None:
    """Watch it work without a server: a fake Letta talks, the worker is killed again and again, nothing is lost.

    Takes about half a minute, and exits 0 only if every chunk is in the file exactly once.
    """
    from worker.demo.demo import run as perform

    if not _do(perform(Console(), kills=kills, keep=keep, seed=seed)):
        raise typer.Exit(EXIT_OTHER)


@cli.command()
def verify(
    config_path: ConfigOption = None,
    server: Annotated[
        bool, typer.Option("--server", help="Also ask the server which runs exist, and that none is missing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every stored run: numbers without a hole, cursor, counts, payloads. Exit 1 when something is wrong.

    What the server could not serve any more is no fault: it is recorded as a gap, and counted. Reads only; the worker
    may run meanwhile.
    """
    report = _do(_verified(_load(config_path), with_server=server))
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    if not report.is_sound:
        raise typer.Exit(EXIT_OTHER)


async def _verified(settings: Config, *, with_server: bool) -> Report:
    from worker.verify import verify as verify_store

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("verifying runs", total=None)
        return await verify_store(
            settings,
            with_server=with_server,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print_report(report: Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in sorted(report.states.items())) or "none"
    console.print(f"runs     {report.runs} ({states})")
    console.print(f"chunks   {report.chunks}")
    console.print(f"gaps     {report.runs_with_gaps} runs with something missing that the server no longer served")
    console.print(
        f"messages {len(report.differing)} complete runs whose messages on the server differ from what was streamed"
    )
    if report.server_runs is not None:
        console.print(
            f"server   lists {report.server_runs} runs in scope; {len(report.unknown_runs)} missing here,"
            f" {report.undiscovered_runs} newer than the last sweep"
        )
    for differing in report.differing:
        for difference in differing.differences:
            console.print(_line("DIFFERS ", "yellow", f"{differing.run_id}: {difference}"))
    for run in report.faulty:
        for fault in run.faults:
            console.print(_line("FAULT   ", "red", f"{run.run_id}: {fault}"))
    for run_id in report.unknown_runs:
        console.print(_line("MISSING ", "red", f"{run_id}: the server lists it, it is not stored"))
    console.print("[green]sound[/]" if report.is_sound else "[red]not sound: please report this, it is a bug[/]")


def _line(word: str, style: str, said: str) -> Text:
    """A line that begins with a coloured word. What a server said is never taken for markup, and never obeyed."""
    from worker.logs import shown

    return Text.assemble((word, style), " ", shown(said))


def _print_json(value: msgspec.Struct) -> None:
    """In ASCII, with all else spelt out: it may be looked at on a terminal, too."""
    typer.echo(json.dumps(msgspec.to_builtins(value)))


async def _checks(settings: Config) -> list[Check]:
    from worker import checks

    console, lines = Console(highlight=False, soft_wrap=True), list["Check"]()
    async for line in checks.check(settings):
        word, style = ("ok  ", "green") if line.is_ok else ("FAIL", "red")
        console.print(_line(word, style, f"{line.name:14} {line.text}"))
        lines.append(line)
    return lines


async def _show_status(settings: Config, *, as_json: bool, watch: bool) -> None:
    from worker import app
    from worker.status import read_status
    from worker.storage.reads import Reads

    async with app.open_current_database(settings) as engine:
        reads = Reads(engine, is_patient=False)
        console = Console(highlight=False)
        if not watch:
            figures = await read_status(reads, dt.datetime.now(dt.UTC))
            if as_json:
                _print_json(figures)
            else:
                console.print(_status_table(figures))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_status_table(await read_status(reads, dt.datetime.now(dt.UTC))), refresh=True)
                await asyncio.sleep(1)


def _status_table(figures: Status) -> Group:
    from worker.status import printable

    states = ", ".join(f"{count} {state}" for state, count in sorted(figures.runs.items())) or "none yet"
    until = f"{figures.discovered_until:%Y-%m-%d %H:%M:%S} UTC" if figures.discovered_until else "none yet"
    lines = [
        f"runs        {states}",
        f"chunks      {figures.chunks}",
        f"open gaps   {figures.open_gaps}",
        f"rejects     {figures.rejects}",
        f"newest run  {until}",
    ]
    if not figures.unfinished:
        return Group(*lines)
    # Two lines a run: its two ids alone would fill the 80 columns of a terminal.
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("unfinished run\nconversation", "state\nstatus", "cursor", "last chunk\nexpires in"):
        table.add_column(column, no_wrap=True)
    for run in figures.unfinished:
        last = "-" if run.last_chunk_seconds_ago is None else f"{max(0, run.last_chunk_seconds_ago):.0f} s ago"
        minutes = f"{run.seconds_to_expiry / 60:.0f} min"
        pairs = (
            (run.run_id, run.conversation_id or "(agent-direct)"),
            (run.state, run.status),
            (run.cursor,),
            (last, minutes),
        )
        table.add_row(*(Text("\n".join(map(printable, pair))) for pair in pairs))
    return Group(*lines, "", table)


def _load(path: Path | None) -> Config:
    from worker import config

    try:
        return config.load(path)
    except ConfigError as error:
        _die(error, EXIT_CONFIG)


def _do(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command; turn what goes wrong into one sentence and an exit code."""
    try:
        return asyncio.run(work)
    except ConfigError as error:
        _die(error, EXIT_CONFIG)
    except RefusedError as error:
        _die(error, EXIT_REFUSED)
    except WorkerError as error:
        _die(error, EXIT_OTHER)
    except asyncio.CancelledError:  # stopped by a signal before there was anything to drain
        raise typer.Exit from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _die(error: WorkerError, code: int) -> NoReturn:
    from worker.logs import shown_lines

    print(f"letta-ingest: {shown_lines(str(error))}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(code)
