"""What one transaction writes, on both databases: nothing twice, nothing backwards, nothing half."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tests.storage.store import AT, accepted, ending, known, later, lot, row, rows
from worker.core.records import MessageRecord, RunRecord
from worker.core.runlog import Gap, Reject
from worker.storage import tables
from worker.storage.writes import RunWrite, SweepWrite

if TYPE_CHECKING:
    from tests.storage.store import Store


async def test_a_row_is_never_changed(store: Store) -> None:
    """I1: A number that is stored keeps its first payload, whatever comes under it later."""
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", accepted([row(1, '{"first":1}')])))
    await store.write(RunWrite("run-1", later(1), "following", accepted([row(1, '{"other":1}')])))
    assert await store.chunks("run-1") == {1: '{"first":1}'}


async def test_repetition_is_harmless(store: Store) -> None:
    """I1, I3: Writing everything a second time changes nothing but updated_at."""
    everything = [
        known("run-1"),
        RunWrite("run-1", AT, "following", accepted([*rows(1, 3), row(6)], gaps=[Gap(4, 5, "not served")], count=4)),
        RunWrite("run-1", AT, None, accepted(rejects=[Reject(6, b"\xff{", "not UTF-8")], cursor=6, count=4)),
        RunWrite("run-1", AT, messages=[MessageRecord("message-1", "{}", otid="o-1")], is_settled=True),
    ]
    for each in everything:
        await store.write(each)
    before = await store.snapshot()
    for each in everything:
        await store.write(each)
    assert await store.snapshot() == before
    await store.write(*everything)
    assert await store.snapshot() == before


async def test_the_cursor_never_goes_back(store: Store) -> None:
    """I3: A lot that is behind stores its rows and leaves cursor, count and state where they are."""
    await store.write(known("run-1"), lot("run-1", 1, 9))
    await store.write(lot("run-1", 1, 4))
    run = await store.run("run-1")
    assert (run.last_seq_id, run.chunk_count, run.state) == (9, 9, "following")


async def test_runs_of_one_conversation_have_a_cursor_each(store: Store) -> None:
    """I2: A conversation's next run begins at 0, and what is stored of one moves the cursor of no other."""
    names = ("run-1", "run-2")
    await store.write(SweepWrite(AT, [RunRecord(name, AT, "running", "conv-1", "agent-1") for name in names]))
    await store.write(lot("run-1", 1, 7))
    assert [await store.cursor(name) for name in names] == [7, 0]
    await store.write(lot("run-2", 1, 3))
    assert [await store.cursor(name) for name in names] == [7, 3]


@pytest.mark.parametrize("final", ["incomplete", "backfilled", "unavailable", "complete"])
async def test_a_final_state_stays(store: Store, final: str) -> None:
    """I4: A worker that is behind does not open a finished run again, nor call it something else."""
    gap = [Gap(3, None, "expired")] if final != "complete" else []
    await store.write(known("run-1"), RunWrite("run-1", AT, final, accepted(rows(1, 2), gaps=gap)))
    for state in ("pending", "following", "incomplete", "backfilled", "unavailable"):
        await store.write(RunWrite("run-1", later(1), state, accepted(rows(1, 2))))
        assert (await store.run("run-1")).state == final


async def test_whoever_has_seen_all_can_say_complete(store: Store) -> None:
    """I4, I5: A second worker that stored the run to its end makes it complete, and closes what the first missed."""
    missed = RunWrite("run-1", AT, "incomplete", accepted(rows(1, 2), gaps=[Gap(3, None, "expired")], finished=True))
    await store.write(known("run-1"), missed)
    await store.write(ending("run-1", 1, 6))
    run = await store.run("run-1")
    assert (run.state, run.last_seq_id, run.chunk_count) == ("complete", 6, 6)
    assert await store.gaps("run-1") == [(3, None, "expired", False)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_workers_that_missed_different_chunks_have_all(store: Store, order: tuple[int, int]) -> None:
    """I4, I5: Where each of two workers has what the other missed, the run is complete and its count is right."""
    one = accepted([*rows(1, 2), *rows(5, 9)], gaps=[Gap(3, 4, "not served")], count=7, finished=True)
    other = accepted([*rows(1, 6), *rows(9, 9)], gaps=[Gap(7, 8, "not served")], count=7, finished=True)
    both = [RunWrite("run-1", AT, "incomplete", one), RunWrite("run-1", AT, "incomplete", other)]
    await store.write(known("run-1"))
    for index in order:
        await store.write(both[index])
    run = await store.run("run-1")
    assert (run.state, run.chunk_count) == ("complete", 9)
    assert [is_open for *_, is_open in await store.gaps("run-1")] == [False, False]


async def test_several_writes_of_a_run_in_one_transaction(store: Store) -> None:
    """I3: In one transaction the furthest cursor and the last state of a run count."""
    await store.write(known("run-1", "run-2"))
    await store.write(
        RunWrite("run-1", AT, "following"),
        lot("run-1", 1, 3),
        lot("run-2", 1, 1),
        lot("run-1", 4, 8),
        ending("run-1", 9, 9),
        lot("run-2", 2, 2),
    )
    one, two = await store.run("run-1"), await store.run("run-2")
    assert (one.last_seq_id, one.chunk_count, one.state) == (9, 9, "complete")
    assert (two.last_seq_id, two.chunk_count, two.state) == (2, 2, "following")


async def test_late_rows_close_their_gap(store: Store) -> None:
    """I2, I5: A gap is closed when the last of its numbers has come, not before; others stay open."""
    first = accepted([row(1), row(5), row(7)], gaps=[Gap(2, 4, "not served"), Gap(6, 6, "not served")], count=3)
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", first))
    await store.write(RunWrite("run-1", later(1), None, accepted(rows(2, 3), cursor=7, count=5, late=True)))
    assert [is_open for *_, is_open in await store.gaps("run-1")] == [True, True]
    await store.write(RunWrite("run-1", later(2), None, accepted([row(4)], cursor=7, count=6, late=True)))
    assert [is_open for *_, is_open in await store.gaps("run-1")] == [False, True]
    assert (await store.run("run-1")).chunk_count == 6
    (closed,) = await store.all(sa.select(tables.gaps).where(tables.gaps.c.resolved_at.is_not(None)))
    assert (closed.resolution, closed.resolved_at) == ("filled", later(2))


async def test_an_open_ended_gap_is_not_closed_by_rows(store: Store) -> None:
    """I5: A gap up to the unknown end stays open behind what turns up, and the run stays what it was called."""
    gone = accepted([row(1)], gaps=[Gap(2, None, "expired")], finished=True)
    await store.write(known("run-1"), RunWrite("run-1", AT, "incomplete", gone))
    await store.write(RunWrite("run-1", AT, None, accepted(rows(2, 3), late=True)))
    assert await store.gaps("run-1") == [(4, None, "expired", True)]
    assert (await store.run("run-1")).state == "incomplete"


async def test_rejects_are_kept_verbatim_and_once(store: Store) -> None:
    """I6: Bytes that are no row are stored as they came; the same bytes at the same place once, others beside them."""
    raw = bytes(range(256)) * 4
    found = [Reject(3, raw, "not UTF-8"), Reject(3, b"", "not a JSON object"), Reject(4, raw, "not UTF-8")]
    for _ in range(2):
        await store.write(known("run-1"), RunWrite("run-1", AT, None, accepted(rejects=found)))
    stored = await store.all(sa.select(tables.rejects).order_by(tables.rejects.c.after_seq_id, tables.rejects.c.reason))
    assert sorted((r.after_seq_id, bytes(r.raw)) for r in stored) == [(3, b""), (3, raw), (4, raw)]


async def test_the_items_of_one_step_are_all_kept(store: Store) -> None:
    """I6: Reasoning and reply of a step share an id; with their otids or types both are rows, in the listed order."""
    listed = [
        MessageRecord("message-1", '{"n":1}', "reasoning_message", "o-1", "step-1", AT, "hm"),
        MessageRecord("message-1", '{"n":2}', "assistant_message", "o-2", "step-1", None, "yes"),
        MessageRecord("message-2", '{"n":3}', "tool_call_message"),
        MessageRecord("message-2", '{"n":4}', "tool_return_message"),
    ]
    await store.write(known("run-1"), RunWrite("run-1", AT, messages=listed))
    stored = await store.all(sa.select(tables.messages).order_by(tables.messages.c.position))
    assert [r.payload for r in stored] == [m.payload for m in listed]
    assert (stored[0].text, stored[0].date, stored[0].stored_at) == ("hm", AT, AT)


async def test_settling_keeps_the_record(store: Store) -> None:
    """I5: Settling a run stores the server's words, our remark or its error, and the time."""
    done = RunRecord("run-1", AT, "failed", stop_reason="llm_error", completed_at=later(5), error="out of tokens")
    await store.write(known("run-1", "run-2"), lot("run-1", 1, 1))
    await store.write(RunWrite("run-1", later(6), record=done, is_settled=True))
    run = await store.run("run-1")
    assert (run.status, run.stop_reason, run.completed_at) == ("failed", "llm_error", later(5))
    assert (run.error, run.settled_at, run.updated_at) == ("out of tokens", later(6), later(6))
    await store.write(RunWrite("run-2", later(6), record=done, error="no messages", is_settled=True))
    assert (await store.run("run-2")).error == "no messages"


async def test_an_old_record_does_not_undo_an_end(store: Store) -> None:
    """I4: A second worker that still believes the run is running does not make it so."""
    done = RunRecord("run-1", AT, "completed", stop_reason="end_turn", completed_at=later(5))
    await store.write(known("run-1"), RunWrite("run-1", AT, record=done, is_settled=True))
    await store.write(RunWrite("run-1", later(9), record=RunRecord("run-1", AT, "running"), is_settled=True))
    run = await store.run("run-1")
    assert (run.status, run.stop_reason, run.completed_at) == ("completed", "end_turn", later(5))


async def test_a_row_that_breaks_a_rule_stops_the_transaction(store: Store) -> None:
    """I2: A row the schema forbids is an error, not a row silently left out below the cursor."""
    await store.write(known("run-1"))
    good = ("run-1", 1, None, None, None, None, "{}", AT, "wire")
    bad = ("run-1", 2, None, None, None, None, "{}", AT, "guessed")

    def insert(connection: sa.Connection) -> None:
        store.dialect.load_chunks(connection, [good, bad])
        with pytest.raises(DBAPIError):
            store.dialect.insert_chunks(connection, [good, bad])
        connection.rollback()

    await store.transactions.run(insert)
    assert await store.chunks("run-1") == {}


async def test_derived_numbers_are_marked(store: Store) -> None:
    """I2: Whether a number was on the wire can be read off every row, with the columns people search by."""
    new = [row(1, message_id="m", otid="o", step_id="s"), row(2, message_type=None, is_derived=True)]
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", accepted(new)))
    one, two = await store.all(sa.select(tables.chunks).order_by(tables.chunks.c.seq_id))
    assert (one.seq_source, one.message_type, one.message_id, one.otid, one.step_id) == (
        "wire",
        "assistant_message",
        "m",
        "o",
        "s",
    )
    assert (two.seq_source, two.message_type, two.received_at) == ("derived", None, AT)


async def test_times_keep_their_microseconds_and_their_order(store: Store) -> None:
    """I3: Times come back to the microsecond and in UTC, from any zone, and sort as text as they do as times."""
    zone = dt.timezone(dt.timedelta(hours=5, minutes=30))
    times = [
        dt.datetime(2026, 1, 1, 0, 0, 0, 0, tzinfo=dt.UTC),
        dt.datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC),
        dt.datetime(2026, 1, 1, 5, 30, 0, 2, tzinfo=zone),
        dt.datetime(2026, 1, 1, 0, 0, 1, 0, tzinfo=dt.UTC),
        dt.datetime(2026, 10, 1, 9, 59, 59, 999999, tzinfo=dt.UTC),
    ]
    await store.write(known("run-1"))
    for number, at in enumerate(times, start=1):
        await store.write(known(f"run-{number}", created_at=at))
        await store.write(RunWrite("run-1", at, "following", accepted([row(number)])))
    stored = await store.all(sa.select(tables.chunks.c.received_at).order_by(tables.chunks.c.received_at))
    assert [r.received_at for r in stored] == times
    assert {r.received_at.utcoffset() for r in stored} == {dt.timedelta()}
    since = sa.select(tables.chunks.c.seq_id).where(tables.chunks.c.received_at > times[1])
    assert {r.seq_id for r in await store.all(since)} == {3, 4, 5}
    if store.engine.dialect.name == "sqlite":
        as_text = sa.text("SELECT typeof(received_at), length(received_at), received_at FROM chunks ORDER BY seq_id")
        async with store.engine.connect() as connection:
            texts = [tuple(r) for r in await connection.execute(as_text)]
        assert {t[:2] for t in texts} == {("text", 26)}
        assert [t[2] for t in texts] == sorted(t[2] for t in texts)


async def test_a_time_without_a_zone_is_refused(store: Store) -> None:
    """I7: A naive time is an error of ours and stops the write."""
    naive = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - that is the point
    with pytest.raises(sa.exc.StatementError, match="without a zone"):
        await store.write(known("run-1", created_at=naive))


async def test_a_lot_is_not_carried_along(postgresql_store: Store) -> None:
    """I8: PostgreSQL's table for a lot on its way in is empty after each: the next one brings its own rows only."""
    await postgresql_store.write(known("run-1"), lot("run-1", 1, 3))
    await postgresql_store.write(lot("run-1", 4, 6))
    waiting: list[int] = []

    def count(connection: sa.Connection) -> None:
        waiting.append(connection.exec_driver_sql("SELECT count(*) FROM pg_temp.chunk_lot").scalar_one())

    await postgresql_store.transactions.run(count)
    assert waiting == [0]
