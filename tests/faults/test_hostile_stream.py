"""Streams no server should send, through the whole worker into real SQL: kept verbatim and flagged, never a wrong row.

One service follows all poisoned runs of a table at once, and healthy ones between them, on each database; then every
case is looked at by itself.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.faults.hostile import BEFORE, PLACE, Poison, poisoned_run
from tests.support.rig import QUICK, hurry, working
from worker.demo.fake_faults import Drip
from worker.demo.fake_letta import FakeLetta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.postgres import PostgresServer
    from tests.support.rig import Rig
    from worker.demo.fake_run import FakeRun

MAX_EVENT_BYTES = 2 << 20
UNHURRIED = msgspec.structs.replace(QUICK, silence=5.0, ended=5.0)
"""Nothing is silent here, but a busy machine may look so."""
KEPT_BYTES = 4096
OTHER = "run-00000000-0000-4000-8000-000000000000"
HUGE = 2**31 - 1


def chunk(fields: str, number: str | int = PLACE, run_id: str = "RUN") -> bytes:
    """A chunk of the run, as the server writes it, with these fields besides."""
    return f'{{"message_type":"assistant_message","seq_id":{number},"run_id":"{run_id}",{fields}}}'.encode()


ROWS: dict[str, bytes] = {
    "an escaped NUL": chunk(r'"content":"a\u0000b"'),
    "escaped lone surrogates": chunk(r'"content":"\ud83d \udc00\ud800"'),
    "separators, raw": chunk('"content":"a\u2028b\u2029c\u0085d"'),
    "non-characters, marks, bidi": chunk('"content":"\ufeff\ufffe\uffff\u202e\u2066\u200d\x7f\x9b"'),
    "escaped terminal sequences": chunk(r'"content":"\u001b[2J\u001b]0;x\u0007\r\b"'),
    "numbers beyond any type": chunk(f'"a":NaN,"b":-Infinity,"c":1e400,"d":{"9" * 1000},"e":-0'),
    "the number named twice": chunk('"content":""', '9,"seq_id":3'),
    "500 levels": chunk(f'"a":{"[" * 500}{"]" * 500}'),
    "a million characters": chunk(f'"content":"{"é" * 1_000_000}"'),
    "a type nobody knows": b'{"message_type":"\xf0\x9f\xa6\x99","seq_id":3,"run_id":"RUN"}',
    "a type of four-byte characters": '{{"message_type":"{}","seq_id":3}}'.format("\U0001f999" * 255).encode(),
    "SQL": chunk('"id":"\'; DROP TABLE chunks; --","otid":"$1 ? :c0 %s {}","step_id":"\')"'),
    "ids with NUL": chunk(r'"id":"a\u0000","otid":"\u0000","step_id":"\u0000b"'),
    "ids with surrogates": chunk(r'"id":"\ud83d","otid":"\udfff","step_id":"\ud800"'),
    "ids of a million characters": chunk(f'"id":"{"i" * 400_000}","otid":"{"o" * 400_000}"'),
    "ids that are no text": chunk('"id":7,"otid":[],"step_id":{"a":null}'),
    "no run_id": b'{"message_type":"assistant_message","seq_id":3}',
    "white space": b' \t{ "seq_id" :\t3 } ',
}
"""Odd, but it can be read: the row with the number, its payload as it came."""

OTHERS: dict[str, tuple[bytes, str]] = {
    "no UTF-8: a byte": (chunk('"content":""')[:-2] + b'\xff"}', "UTF-8"),
    "no UTF-8: half a character": (chunk('"content":""')[:-2] + b'\xe2\x80"}', "UTF-8"),
    "no UTF-8: overlong": (chunk('"content":""')[:-2] + b'\xc0\x80"}', "UTF-8"),
    "no UTF-8: a surrogate": (chunk('"content":""')[:-2] + b'\xed\xa0\xbd"}', "UTF-8"),
    "UTF-16": ('{"seq_id":3}'.encode("utf-16-le"), "JSON"),
    "a raw NUL inside": (b'{"content":"\x00","seq_id":3}', "JSON"),
    "a raw NUL behind": (b'{"seq_id":3}\x00', "JSON"),
    "nothing": (b"", "JSON"),
    "no JSON": (b"Internal Server Error", "JSON"),
    "half of it": (chunk('"content":""')[:-1], "JSON"),
    "two of them": (chunk('"content":""') * 2, "JSON"),
    "a list": (b'[{"seq_id":3}]', "JSON"),
    "a number": (b"3", "JSON"),
    "100,000 levels": (b'{"seq_id":3,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    "100,000 open brackets": (b"[" * 100_000, "JSON"),
    "more digits than an int may have": (chunk('"content":""', "9" * 5000), "seq_id|JSON"),
    "beyond 64 bits": (chunk('"content":""', 2**64), "seq_id"),
    "beyond the largest": (chunk('"content":""', HUGE + 1), "seq_id"),
    "zero": (chunk('"content":""', 0), "seq_id"),
    "negative": (chunk('"content":""', -3), "seq_id"),
    "a fraction": (chunk('"content":""', "3.0"), "seq_id"),
    "text": (chunk('"content":""', '"3"'), "seq_id"),
    "a truth": (chunk('"content":""', "true"), "seq_id"),
    "infinite": (chunk('"content":""', "1e400"), "seq_id"),
    "of another run": (chunk('"content":"theirs"', run_id=OTHER), f"names another run: {OTHER}"),
    "of a run with NUL": (chunk('"content":""', run_id=r"RUN\u0000"), "run_id"),
    "of a run with a surrogate": (chunk('"content":""', run_id=r"\ud800"), "run_id"),
    "of a run of 300 characters": (chunk('"content":""', run_id="RUN" + "x" * 300), "run_id"),
    "of a run that is a number": (b'{"seq_id":3,"run_id":7}', "run_id"),
}
"""It cannot be a row: its bytes are kept, with this reason, and its number is a gap that says `rejected`."""

NOTHING: dict[str, bytes] = {
    "comments": b": hello\n\n:\n\n:" + b"x" * 10_000 + b"\n\n",
    "blank lines": b"\n" * 1000 + b"\r\n\r\r" * 100,
    "fields nobody needs": b"id: 7\nretry: 0\nfoo: bar\n\n\nevent: error\n\n",
    "a mark in the middle": b"\xef\xbb\xbfdata: x\n\n",
    "a ping below zero": b'data: {"message_type":"ping","seq_id":-1,"run_id":"RUN"}\n\n',
    "a ping beyond 64 bits": b'data: {"message_type":"ping","seq_id":%d,"run_id":"RUN"}\n\n' % 10**30,
    "a ping that is text": b'data: {"message_type":"ping","seq_id":"x","run_id":"RUN"}\n\n',
    "a ping of another run": b'data: {"message_type":"ping","seq_id":3,"run_id":"%s"}\n\n' % OTHER.encode(),
    "a ping of nobody": b'data: {"message_type":"ping","seq_id":3,"run_id":"\\u0000"}\n\n',
    "the reader's error": b'event: error\ndata: {"error":"\\u001b[2J","code":"\\u0000"}\n\n',
    "an error that says nothing": b"event: error\ndata: no JSON\n\nevent: error\ndata:\n\n",
    "a chunk again, saying something else": b"data: " + chunk('"content":"forged"', BEFORE) + b"\n\n",
    "back to the beginning": b"".join(b"data: " + chunk('"content":"forged"', n) + b"\n\n" for n in (2, 1, 1, 2)),
}
"""It is nobody's, or came before: the log is stored as if it had not been sent."""

KEPT: dict[str, tuple[bytes, str]] = {
    "garbage": (b"\xff\xfe garbage", "not UTF-8; stands before 3, but its number cannot be proven"),
    "an object without a number": (b'{"a":1}', "stands before 3, but its number cannot be proven"),
    "a chunk of another run": (chunk('"content":""', run_id=OTHER), "names another run"),
    "a number that is none": (chunk('"content":""', -1), "seq_id"),
}
"""It has no place in the log: its bytes are kept, and the log is complete without it."""


HEALTHY = ("the first", "one in the middle", "the last")


@dataclass(frozen=True)
class Stored:
    """What is stored of one run."""

    expected: list[tuple[int, str]]
    """What would be there without poison."""
    rows: list[tuple[int, str]]
    gaps: list[tuple[int, int | None, str, str | None]]
    rejects: list[tuple[int, bytes, str]]
    run: dict[str, Any]
    fired: int


Told = dict[str, Stored]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    hurry(monkeypatch)


@pytest.fixture
async def letta() -> AsyncIterator[FakeLetta]:
    """A fake server with quick clocks."""
    async with FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as server:
        yield server


@pytest.fixture
async def rig(letta: FakeLetta, sqlite_url: str) -> AsyncIterator[Rig]:
    """A worker on SQLite."""
    async with working(letta, sqlite_url) as made:
        yield made


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Told]:
    """What a service has stored of all the cases at once, after it has come to an end by itself."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('hostile')}/x.db"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.create_database()
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        async with (
            FakeLetta(keepalive_interval=0.03, cancel_check_interval=0.03, seed=1) as letta,
            working(letta, url, commits=False, waits=UNHURRIED, max_event_bytes=MAX_EVENT_BYTES) as rig,
        ):
            conversation = letta.new_conversation()
            runs = {name: (poisoned_run(letta, poison, conversation), poison) for name, poison in poisons()}
            service = await rig.service(interval=2.0)
            async with asyncio.timeout(60):
                await service.run(once=True)
            yield {name: await stored(rig, run, poison) for name, (run, poison) in runs.items()}


def poisons() -> list[tuple[str, Poison]]:
    """All the tables, and healthy runs before, between and behind."""
    large = b'data: {"seq_id":3,"a":"' + b"x" * (MAX_EVENT_BYTES + 100) + b'"}\n\n'
    found = [(name, Poison(b"data: " + data + b"\n\n")) for name, data in ROWS.items()]
    found += [(name, Poison(b"data: " + data + b"\n\n")) for name, (data, _) in OTHERS.items()]
    found += [(name, Poison(sent, is_extra=True)) for name, sent in NOTHING.items()]
    found += [(name, Poison(b"data: " + data + b"\n\n", is_extra=True)) for name, (data, _) in KEPT.items()]
    found += [("too large", Poison(large)), ("too many lines", Poison(b"data: {\n" * 50_000 + b"\n"))]
    found.append(("several lines", Poison(b'data: {"seq_id":\r\ndata: 3,\ndata:  "a":1}\r\n\r\n')))
    found.append(("a number again", Poison(b"data: " + chunk('"content":"forged"', BEFORE) + b"\n\n")))
    for place, name in zip((0, len(found) // 2, len(found) + 2), HEALTHY, strict=True):
        found.insert(place, (name, Poison(b"", is_extra=True)))
    return found


async def stored(rig: Rig, run: FakeRun, poison: Poison) -> Stored:
    """Look at one run."""
    rejects = await rig.query("SELECT after_seq_id, raw, reason FROM rejects WHERE run_id = :run", run=run.id)
    row = {"run_id": run.id, **await rig.row(run)}
    return Stored(run.expected_rows(), await rig.rows(run), await rig.gaps(run), rejects, row, poison.fired)


def assert_stored(found: Stored, state: str, payload: bytes | None = None, *, is_missing: bool = False) -> None:
    """The log is stored, with this at the poisoned place or nothing, and the run is settled in this state."""
    expected = {number: text.encode() for number, text in found.expected}
    if is_missing:
        del expected[PLACE]
    elif payload is not None:
        expected[PLACE] = named(found, payload)
    assert {number: text.encode() for number, text in found.rows} == expected
    row = found.run
    assert (row["state"], row["last_seq_id"], row["chunk_count"]) == (state, max(expected), len(expected))
    assert row["settled_at"] is not None
    assert row["status"] == "completed"
    assert found.fired >= 1


def assert_rejected(found: Stored, data: bytes, reason: str) -> None:
    """One thing was kept as bytes: this, and why."""
    ((after, raw, why),) = found.rejects
    assert (after, raw) == (BEFORE, named(found, data))
    assert re.search(reason, why)


def named(found: Stored, data: bytes) -> bytes:
    """The poison as it was sent for this run."""
    return data.replace(b"RUN", found.run["run_id"].encode())


@pytest.mark.parametrize("name", ROWS)
async def test_odd_chunk_is_a_row(told: Told, name: str) -> None:
    """What can be read is stored byte for byte under its number, on both databases (I6)."""
    assert_stored(told[name], "complete", ROWS[name])
    assert (told[name].gaps, told[name].rejects) == ([], [])


async def test_chunk_of_several_lines_is_a_row(told: Told) -> None:
    """Several data lines are one payload, joined by LF, whatever their line ends (I6)."""
    assert_stored(told["several lines"], "complete", b'{"seq_id":\n3,\n "a":1}')


@pytest.mark.parametrize("name", OTHERS)
async def test_what_cannot_be_a_row_is_kept(told: Told, name: str) -> None:
    """Its bytes are in `rejects`, its number is a gap that says so, and what is behind it is stored (I2, I5, I6)."""
    data, reason = OTHERS[name]
    assert_stored(told[name], "incomplete", is_missing=True)
    assert told[name].gaps == [(PLACE, PLACE, "rejected", None)]
    assert_rejected(told[name], data, reason)


@pytest.mark.parametrize(
    ("name", "kept"), [("too large", b'data: {"seq_id":3,"a":"' + b"x" * 5000), ("too many lines", b"data: {\n" * 600)]
)
async def test_what_is_too_large_is_refused(told: Told, name: str, kept: bytes) -> None:
    """Of an event over the limit the beginning is kept, and its number is a gap that says so (I6, I8)."""
    assert_stored(told[name], "incomplete", is_missing=True)
    assert told[name].gaps == [(PLACE, PLACE, "rejected", None)]
    assert_rejected(told[name], kept[:KEPT_BYTES], "larger than the limit")


@pytest.mark.parametrize("name", NOTHING)
async def test_what_means_nothing_changes_nothing(told: Told, name: str) -> None:
    """Comments, keepalives, the reader's errors and what came before leave no trace; no row is updated (I1, I9)."""
    assert_stored(told[name], "complete")
    assert (told[name].gaps, told[name].rejects) == ([], [])


@pytest.mark.parametrize("name", KEPT)
async def test_what_has_no_place_is_kept_beside_the_log(told: Told, name: str) -> None:
    """What the numbers around it leave no room for is in `rejects`, and the log is complete without it (I6)."""
    data, reason = KEPT[name]
    assert_stored(told[name], "complete")
    assert told[name].gaps == []
    assert_rejected(told[name], data, reason)


async def test_a_number_again_in_the_place_of_another(told: Told) -> None:
    """A stream that goes back overwrites nothing; what it should have sent is a gap (I1, I2)."""
    assert_stored(told["a number again"], "incomplete", is_missing=True)
    assert told["a number again"].gaps == [(PLACE, PLACE, "not served", None)]
    assert told["a number again"].rejects == []


@pytest.mark.parametrize("name", HEALTHY)
async def test_healthy_neighbours_are_complete(told: Told, name: str) -> None:
    """Runs of the same conversation, read and committed together with all that, miss nothing (I5, I6)."""
    assert_stored(told[name], "complete")
    assert (told[name].gaps, told[name].rejects) == ([], [])


async def test_a_number_far_away(letta: FakeLetta, database_url: str) -> None:
    """The largest number there may be costs no memory, and what the server sent besides is stored (I2, I8)."""
    poison = Poison(b"data: " + chunk('"content":"far"', HUGE) + b"\n\n")
    async with working(letta, database_url) as rig:
        run = poisoned_run(letta, poison)
        await rig.follow(run)

        numbers = [number for number, _ in await rig.rows(run)]
        assert numbers == [1, 2, 4, 5, HUGE]
        assert await rig.gaps(run) == [(3, HUGE - 1, "not served", None), (HUGE + 1, None, "not served", None)]
        assert (await rig.row(run))["state"] == "backfilled"
        assert poison.fired == 2


async def test_an_end_that_comes_too_early(rig: Rig, letta: FakeLetta) -> None:
    """A marker is the server's word and is believed (I5); that its messages say more is in the run's verdict."""
    run = poisoned_run(letta, Poison(b"data: [DONE]\n\n"))

    await rig.follow(run)

    await rig.assert_stored(run, "complete", rows=run.expected_rows()[:2])
    assert await rig.query("SELECT verdict FROM runs") == [("differs",)]


async def test_a_large_chunk_over_a_slow_line(rig: Rig, letta: FakeLetta) -> None:
    """While the bytes of a chunk come in, a run that is over is not silent, however long they take (I5)."""
    run = letta.new_run()
    run.say("x" * 300_000)
    run.complete()
    fault = Drip(piece=3000, pause=0.01, run_id=run.id, on="stream", times=None)
    letta.faults.append(fault)

    await rig.follow(run)

    await rig.assert_complete(run)
    (request,) = rig.asked("stream", run)
    assert request.closed_at is not None
    assert request.closed_at - request.opened_at > 2 * rig.patience.ended
    assert fault.fired == 1
