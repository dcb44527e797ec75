"""What the client sends: always a JSON object, ids that stay in their place in a path, and the key to nobody else."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest

from tests.letta.wire import SECRET, answering, events_of, relaying
from worker.core.records import RunRecord
from worker.demo.fake_faults import Answer
from worker.errors import RefusedError, TroubleError, WorkerError
from worker.letta.client import Address

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from worker.demo.fake_letta import FakeLetta
    from worker.letta.client import LettaClient

    Opened = Callable[..., AbstractAsyncContextManager[LettaClient]]

RUN = "run-00000000-0000-4000-8000-000000000000"
AGENT = "agent-00000000-0000-4000-8000-000000000000"
CONVERSATION = "conv-00000000-0000-4000-8000-000000000000"

TRICKS = [
    "../x",
    "..",
    ".",
    "...",
    "%2f",
    "%2e%2e",
    "a?b=c",
    "a#b",
    "a/b",
    "//host/x",
    "a b",
    "a\r\nx: y",
    "é",
    "\ud83d",
    "{x}",
    "a;b",
    "@",
]


@pytest.mark.parametrize(
    ("address", "path", "named"),
    [
        (Address(RUN), f"/v1/runs/{RUN}/stream", {}),
        (Address(RUN, CONVERSATION), f"/v1/conversations/{CONVERSATION}/stream", {"run_id": RUN}),
        (Address(RUN, CONVERSATION, AGENT), f"/v1/conversations/{CONVERSATION}/stream", {"run_id": RUN}),
        (Address(RUN, "default", AGENT), "/v1/conversations/default/stream", {"run_id": RUN, "agent_id": AGENT}),
        (Address(RUN, AGENT), f"/v1/conversations/{AGENT}/stream", {"run_id": RUN}),
    ],
)
@pytest.mark.parametrize("cursor", [0, 7])
async def test_body(
    letta: FakeLetta, opened: Opened, *, address: Address, path: str, named: dict[str, str], cursor: int
) -> None:
    """Every form of id is asked for with every parameter, in a body that is always an object, cursor 0 included."""
    letta.faults.append(Answer(200, b"data: [DONE]\n\n", content_type="text/event-stream", times=2))

    async with opened(batch_size=7, poll_interval=0.25, include_pings=False) as client:
        await events_of(client, address, cursor)
    async with opened() as client:
        await events_of(client, address, cursor)

    tuned, plain = letta.requests
    assert (tuned.method, tuned.path) == ("POST", path)
    common = {"starting_after": cursor} | named
    assert tuned.body == {"batch_size": 7, "poll_interval": 0.25, "include_pings": False} | common
    assert plain.body == {"batch_size": 1000, "poll_interval": 0.1, "include_pings": True} | common


def test_address_of_a_run() -> None:
    """A run is asked for in its conversation, an agent-direct one as `default`, one that names no place by itself."""
    created_at = datetime(2026, 1, 1, tzinfo=UTC)
    named = RunRecord(RUN, created_at, conversation_id=CONVERSATION, agent_id=AGENT)
    direct = RunRecord(RUN, created_at, agent_id=AGENT)
    neither = RunRecord(RUN, created_at)

    assert Address.of(named, by_run=False) == Address(RUN, CONVERSATION, AGENT)
    assert Address.of(direct, by_run=False) == Address(RUN, "default", AGENT)
    assert Address.of(neither, by_run=False) == Address.of(named, by_run=True) == Address(RUN)


@pytest.mark.parametrize("trick", TRICKS)
async def test_ids_stay_in_their_place(letta: FakeLetta, opened: Opened, trick: str) -> None:
    """An id is one segment of the path, whatever is in it: it reaches no other endpoint and adds no header."""
    async with (
        relaying(int(letta.url.rpartition(":")[2])) as relay,
        opened(base_url=f"http://127.0.0.1:{relay.port}") as client,
    ):
        for call in (
            client.retrieve_run(trick),
            events_of(client, Address(trick)),
            events_of(client, Address(RUN, trick)),
        ):
            with pytest.raises(WorkerError):
                await call

    assert len(relay.heads) in ({0} if set(trick) == {"."} else {1, 2, 3})  # a connection may carry several
    for head in relay.heads:
        method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
        segments = path.split("/")
        assert len(segments) == (4 if method == "GET" else 5)
        assert segments[2] in {"runs", "conversations"}
        assert unquote(segments[3]) == trick.replace("\ud83d", "?")
        assert not {"?", "#"} & set(path)
        assert b"\nx:" not in head


async def test_redirect_keeps_the_body(letta: FakeLetta, client: LettaClient) -> None:
    """A 307 is followed with method, body and key."""
    run = letta.new_run()
    run.say("one ")
    run.complete()
    letta.password = SECRET
    fault = Answer(307, headers={"location": f"{letta.url}/v1/runs/{run.id}/stream"}, on="stream")
    letta.faults.append(fault)

    events = await events_of(client, Address(RUN), 1)

    assert fault.fired == 1
    assert len(events) == 4
    assert letta.requests[0].body == letta.requests[1].body


async def test_redirect_to_another_server(letta: FakeLetta, client: LettaClient) -> None:
    """The key does not follow a redirect to another server (I10)."""
    async with relaying(int(letta.url.rpartition(":")[2])) as relay:
        letta.password = SECRET
        target = f"http://localhost:{relay.port}/v1/runs/"
        letta.faults.append(Answer(307, headers={"location": target}, on="runs"))

        with pytest.raises(RefusedError):
            await anext(aiter(client.newest_runs()))

    assert len(relay.heads) == 1
    assert SECRET.encode() not in relay.heads[0]


async def test_redirects_without_end(letta: FakeLetta, client: LettaClient) -> None:
    """A redirect that leads to itself is trouble."""
    fault = Answer(307, headers={"location": f"{letta.url}/v1/runs/"}, times=None)
    letta.faults.append(fault)

    with pytest.raises(TroubleError, match="redirect"):
        await anext(aiter(client.newest_runs()))

    assert fault.fired <= 30


async def test_secret_is_not_shown(letta: FakeLetta, opened: Opened) -> None:
    """The key is in no description of the client, of its parts, and in no error (I10)."""
    letta.password = "another"
    async with opened() as client:
        shown = [repr(client), repr(client._http), repr(vars(client)), repr(client._http.headers)]
        with pytest.raises(RefusedError) as raised:
            await anext(aiter(client.newest_runs()))

    assert SECRET not in " ".join([*shown, str(raised.value), repr(raised.value.__cause__)])


async def test_headers(letta: FakeLetta, opened: Opened) -> None:
    """The server is told who asks, and that a stream must not be compressed; without a key none is sent."""
    run = letta.new_run()
    run.complete()
    async with relaying(int(letta.url.rpartition(":")[2])) as relay:
        url = f"http://127.0.0.1:{relay.port}"
        async with opened(base_url=url) as client:
            await events_of(client, Address(run.id))
        async with opened(base_url=f"{url}/v1/", api_key=None) as client:
            await client.server_version()

    stream, health = (head.decode().lower() for head in relay.heads)
    assert f"authorization: bearer {SECRET}\r\n" in stream
    assert "accept-encoding: identity\r\n" in stream
    assert "content-type: application/json\r\n" in stream
    assert "user-agent: letta-ingest/" in stream
    assert "authorization" not in health
    assert health.startswith("get /v1/health/ ")


async def test_silent_server(opened: Opened) -> None:
    """A connection that says nothing at all is left after the read timeout; without pings it may be silent."""
    async with answering(b"") as port:
        url = f"http://127.0.0.1:{port}"
        async with (
            opened(base_url=url, read_timeout=0.1) as client,
            opened(base_url=url, include_pings=False) as patient,
        ):
            assert client._http.timeout.read == 0.1
            assert patient._http.timeout.read is None


async def test_hanging_server(letta: FakeLetta, opened: Opened) -> None:
    """A stream without even pings ends with the read timeout."""
    run = letta.new_run()
    letta.keepalive_interval = 60

    async with opened(read_timeout=0.1) as client:
        with pytest.raises(TroubleError, match="imeout"):
            await events_of(client, Address(run.id))
