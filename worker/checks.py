"""What `letta-ingest check` looks at: each check says ok, or what to do. Used by cli.py."""

from collections.abc import AsyncIterator, Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import app
from worker.config import Config
from worker.core.records import RunRecord
from worker.errors import (
    BadRequestError,
    NoBackgroundError,
    NotFoundError,
    RefusedError,
    RunIdIgnoredError,
    TroubleError,
    WorkerError,
)
from worker.letta.client import Address, LettaClient
from worker.storage import schema
from worker.storage.engine import describe, is_outage, is_sqlite

MEASURED_VERSION = "0.16.8"
NO_SUCH_RUN = "run-00000000-0000-4000-8000-000000000000"


class Check(msgspec.Struct, frozen=True):
    """One line of the answer. `is_refusal`: it takes an operator, so the exit code is 3."""

    name: str
    is_ok: bool
    text: str
    is_refusal: bool = False


async def check(config: Config) -> AsyncIterator[Check]:
    """Look at everything `run` depends on; later checks go on where earlier ones failed."""
    config.service.read_page_token()  # a file that cannot be read is a fault of the configuration
    yield Check("configuration", is_ok=True, text=f"watching {', '.join(sorted(app.watch(config).scopes)[:5])}")
    async with app.open_letta(config) as letta:
        async for line in _check_server(config, letta):
            yield line
    async with app.open_database(config) as engine:
        yield await _check_database(engine)


async def _check_server(config: Config, letta: LettaClient) -> AsyncIterator[Check]:
    url = config.letta.base_url
    try:
        version = await letta.server_version()
    except WorkerError as error:
        is_away = isinstance(error, TroubleError) and error.is_outage
        trouble = "cannot be reached" if is_away else "does not answer as a Letta server does"
        yield Check("server", is_ok=False, text=f"{url} (letta.base_url) {trouble}: {error}", is_refusal=True)
        return
    note = "" if version == MEASURED_VERSION else f" (this worker was measured against {MEASURED_VERSION})"
    yield Check("server", is_ok=True, text=f"Letta {version} at {url}{note}")
    runs: Sequence[RunRecord] = ()
    try:
        async for page in letta.newest_runs(limit=1):
            runs = page.whole()
            break
    except RefusedError as error:
        yield Check("credentials", is_ok=False, text=str(error), is_refusal=True)
        return
    except (TroubleError, BadRequestError) as error:
        yield Check("credentials", is_ok=False, text=f"the list of runs cannot be read: {error}", is_refusal=True)
        return
    newest = f"newest run {runs[0].created_at:%Y-%m-%d %H:%M:%S} UTC" if runs else "no runs yet"
    yield Check("credentials", is_ok=True, text=f"the server lists runs to us; {newest}")
    yield await _check_background_streaming(letta)
    for agent_id in config.watch.agents:
        yield await _check_agent(letta, agent_id)


async def _check_background_streaming(letta: LettaClient) -> Check:
    """Asks for the stream of a run that does not exist: Redis is looked at before the run (letta-protocol d)."""
    try:
        async with letta.stream(Address(NO_SUCH_RUN, "default"), 0):
            pass
    except NoBackgroundError as error:
        return Check("streaming", is_ok=False, text=f"{error}: set LETTA_REDIS_HOST on the server", is_refusal=True)
    except (NotFoundError, BadRequestError, RunIdIgnoredError):
        return Check("streaming", is_ok=True, text="background streaming is on")
    except WorkerError as error:
        return Check("streaming", is_ok=False, text=f"the stream endpoint fails: {error}", is_refusal=True)
    return Check("streaming", is_ok=False, text="the server streams a run that does not exist", is_refusal=True)


async def _check_agent(letta: LettaClient, agent_id: str) -> Check:
    try:
        conversations = await letta.conversations_of(agent_id)
    except WorkerError as error:
        return Check(agent_id, is_ok=False, text=f"its conversations cannot be listed: {error}")
    return Check(agent_id, is_ok=True, text=f"{len(conversations)} conversations besides its own")


async def _check_database(engine: AsyncEngine) -> Check:
    where = engine.url.render_as_string(hide_password=True)
    try:
        if is_sqlite(engine) and await schema.current_revision(engine) is None:
            return Check("database", is_ok=True, text=f"{where} is empty; `run` makes its schema")
        await schema.require_current(engine)
    except RefusedError as error:
        return Check("database", is_ok=False, text=f"{where}: {error}", is_refusal=True)
    except Exception as error:
        if not is_outage(error):
            raise
        return Check(
            "database", is_ok=False, text=f"{where} (storage.url) cannot be reached: {describe(error)}", is_refusal=True
        )
    return Check("database", is_ok=True, text=f"{where} is reachable and its schema is current")
