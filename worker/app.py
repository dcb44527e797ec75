"""Composition root: builds engine, HTTP client, stores and service from Config. Used by cli.py; knows everybody."""

import asyncio
import contextlib
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib.metadata import version
from typing import Any

import httpx
from httpx_aiohttp import HttpxAiohttpClient
from httpx_aiohttp.transport import AiohttpResponseStream
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import systemd
from worker.census import Census
from worker.config import Config
from worker.discovery import Discovery, Watch, watch_of
from worker.errors import ConfigError, RefusedError
from worker.follower import Equipment
from worker.letta.client import LettaClient, StreamOptions
from worker.logs import Log, Troubles, shown
from worker.metrics import Metrics
from worker.monitor import Health, Monitor
from worker.page.access import Access
from worker.page.routes import Page
from worker.page.snapshot import Snapshots
from worker.patience import Patience
from worker.reload import Reload
from worker.service import Service
from worker.storage import schema
from worker.storage.committer import Committer
from worker.storage.engine import GOODBYE_SECONDS, create_engine, describe, is_outage, is_sqlite, outage_retries
from worker.storage.reads import Reads
from worker.storage.transactions import Transactions
from worker.storage.transcripts import Transcripts

READ_BYTES = 64 * 1024
"""As much of a response as is taken at once where more has come; aiohttp stops reading at twice that."""


async def run(
    config: Config,
    log: Log,
    *,
    once: bool,
    patience: Patience | None = None,
    reread: Callable[[], Config] | None = None,
    troubles: Troubles | None = None,
    show: Callable[[Snapshots], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run the service until a signal, or once; with `reread`, SIGHUP brings it to the configuration that this gives.

    `troubles` is what the log keeps for the status page; `show` draws the same somewhere else, while it runs.

    Raises RefusedError, ConfigError or InvariantError.
    """
    metrics = Metrics()
    access = Access(config.service.transcripts, config.service.is_loopback, config.service.read_page_token())
    transactions = Transactions(config.storage.url.get_secret_value())
    async with open_database(config) as engine, transactions, open_letta(config, metrics) as letta:
        starting = asyncio.current_task()
        if starting is not None:  # to a container's first process SIGTERM does nothing unless it is handled
            _on_stop_signals(starting.cancel)
        await _wait_for_schema(engine, log)
        committer = Committer(transactions, log, metrics)
        reads = Reads(engine, is_patient=True)
        discovery = Discovery(letta, committer, reads, log)
        await discovery.load(watch(config), config.discovery.start)

        def watch_again(changed: Config) -> None:
            discovery.change(watch(changed), changed.discovery.start)

        health = Health(committer, reads, config.discovery.interval)
        equipment = Equipment(letta, committer, reads, patience or Patience(), metrics, log)
        service = Service(
            discovery,
            equipment,
            health,
            interval=config.discovery.interval,
            max_streams=config.letta.max_streams,
        )
        seen = Reads(engine, is_patient=False)
        snapshots = Snapshots(health, metrics, seen, troubles or Troubles())
        page = Page(snapshots, Transcripts(seen), access)
        async with Monitor(config.service.listen, health, metrics, Census(seen, metrics), page.install):
            _on_stop_signals(service.stop)
            if reread is not None:
                reload = Reload(config, reread, watch_again, letta, log, use_page_token=page.use_token)
                _reload_on_signal(service, reload)
            log.info(
                "worker.started",
                version=version("letta-ingest"),
                server=config.letta.base_url,
                watching=sorted(watch(config).scopes),
                database=engine.url.render_as_string(hide_password=True),
            )
            async with _beside(show(snapshots) if show is not None else None):
                await service.run(once=once)


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None] | None) -> AsyncIterator[None]:
    """Run this while the block runs. What is wrong with it is told when the block is done, and never stops it."""
    task = asyncio.create_task(work) if work is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@contextlib.asynccontextmanager
async def open_database(config: Config) -> AsyncIterator[AsyncEngine]:
    """The engine; closed at the end."""
    engine = create_engine(config.storage.url.get_secret_value())
    try:
        yield engine
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await engine.dispose()


@contextlib.asynccontextmanager
async def open_current_database(config: Config) -> AsyncIterator[AsyncEngine]:
    """The same for a command that does not wait. Raises RefusedError when it is away or its schema is not ours."""
    async with open_database(config) as engine:
        with _outage_refuses():
            await schema.require_current(engine)
        yield engine


@contextlib.asynccontextmanager
async def open_letta(config: Config, metrics: Metrics | None = None) -> AsyncIterator[LettaClient]:
    """The client of the Letta server; its connections are closed at the end."""
    settings = config.letta
    key = settings.read_api_key()
    # Pings are asked for, so bytes come every 20 s; without them a silent run looks like a dead connection.
    read_timeout = settings.read_timeout if settings.include_pings else None
    AiohttpResponseStream.CHUNK_SIZE = READ_BYTES  # there is no option for it
    try:
        http = HttpxAiohttpClient(
            base_url=settings.base_url,
            headers={"user-agent": f"letta-ingest/{version('letta-ingest')}"},
            timeout=httpx.Timeout(read_timeout, connect=settings.connect_timeout, pool=None),
            # aiohttp would take None for its own limit of 100.
            limits=httpx.Limits(max_connections=settings.max_streams + 16, keepalive_expiry=4.0),
            verify=ssl.create_default_context(cafile=settings.ca_file) if settings.ca_file else True,
            follow_redirects=True,
        )
    except OSError as error:
        raise ConfigError(f"letta.ca_file: cannot use {settings.ca_file}: {error.strerror or error}") from None
    options = StreamOptions(
        batch_size=settings.batch_size,
        poll_interval=settings.poll_interval,
        include_pings=settings.include_pings,
        max_event_bytes=settings.max_event_bytes,
    )
    async with http:
        client = LettaClient(http, options, metrics or Metrics())
        client.use_key(key)
        yield client


def watch(config: Config) -> Watch:
    """The watched scopes."""
    return watch_of(is_all=config.watch.all, conversations=config.watch.conversation_ids, agents=config.watch.agents)


async def _wait_for_schema(engine: AsyncEngine, log: Log) -> None:
    """A SQLite file is ours and is upgraded; a PostgreSQL schema is its administrator's and must be right already."""

    def report(state: object) -> None:
        error = state.outcome.exception()  # type: ignore[attr-defined]
        log.warning("database.unavailable", error=describe(error), waiting=0)
        systemd.notify(f"STATUS=waits for the database: {shown(describe(error))}")

    async for attempt in outage_retries(report):
        with attempt:
            if is_sqlite(engine):
                before, after = await schema.upgrade(engine)
                if before != after:
                    log.info("schema.upgraded", before=before, after=after)
            else:
                await schema.require_current(engine)


def _on_stop_signals(stop: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _reload_on_signal(service: Service, reload: Reload) -> None:
    def on_signal() -> None:
        with systemd.reloading(service.say_ready) if service.is_ready else contextlib.nullcontext():
            reload.reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)


async def migrate(config: Config) -> tuple[str | None, str]:
    """Upgrade the schema; return the revision before and after. Raises RefusedError, also when the database is away."""
    async with open_database(config) as engine:
        with _outage_refuses():
            return await schema.upgrade(engine)


@contextlib.contextmanager
def _outage_refuses() -> Iterator[None]:
    """Turn an outage into RefusedError: a command says so and ends, where the service would wait."""
    try:
        yield
    except Exception as error:
        if is_outage(error):
            raise RefusedError(f"the database (storage.url) cannot be reached: {describe(error)}") from error
        raise
