"""RunLog quirk by quirk, in the words of responses.py. The properties behind it are in test_runlog_model.py."""

from __future__ import annotations

import time

import pytest

from tests.core.responses import event, read, read_whole, rows, taken, words
from tests.core.server_model import HIDDEN, RUN
from worker.core import runlog
from worker.core.chunks import parse
from worker.core.runlog import MAX_UNNUMBERED, Gap, RunLog
from worker.core.sse import SseEvent

# A run's log and its end


def test_a_healthy_run() -> None:
    """Rows are 1..last, with the numbers the wire does not show, and `[DONE]` is a marker and no row (I2, I5, I9)."""
    lot = read_whole(RunLog(RUN), "p1 2-7 s u D")
    assert rows(lot) == "1 2 3 4 5 6 7 ~8 ~9"
    assert (lot.cursor, lot.stored_count, lot.is_finished, lot.is_complete) == (9, 9, True, True)


def test_the_end_is_a_marker_and_not_an_end_of_file() -> None:
    """Without a marker the run is not finished, and what has no number yet is not stored (I2, I5)."""
    log = RunLog(RUN)
    assert read(log, "1-3 s u") == "1 2 3"
    assert not log.is_finished
    assert log.cursor == 3
    assert read(log, "s u D") == "~4 ~5"
    assert log.is_finished


def test_the_cursor_is_never_a_derived_number() -> None:
    """One asks only for what comes after a number that was seen: past the terminal the server hangs (I2)."""
    log = RunLog(RUN)
    cursors = []
    for word in words("1 s u 4 t"):
        log.accept(event(word))
        cursors.append(log.cursor)
    assert cursors == [1, 1, 1, 4, 4]
    assert rows(taken(log)) == "1 ~2 ~3 4"


def test_a_failed_run_ends_with_its_own_error() -> None:
    """The run's error event has a number and is the last thing sent; no `[DONE]` follows (I5)."""
    lot = read_whole(RunLog(RUN), "p1 2-4 t s E7")
    assert rows(lot) == "1 2 3 4 ~5 ~6 7"
    assert lot.is_complete


def test_an_error_of_the_reader_is_not_the_run_s() -> None:
    """The server's reader may fail; nothing is stored of that, and the run goes on (I5)."""
    log = RunLog(RUN)
    assert read(log, "1-3 s !") == "1 2 3"
    assert not log.is_finished
    assert read(log, "s ! u D") == "~4 ~5"


def test_a_live_cancel_is_not_the_end() -> None:
    """A cancelled run's reader gets a stop_reason that is not in the log; the log goes on after a new request (I5)."""
    log = RunLog(RUN)
    assert read(log, "p1 2-47 c") == " ".join(words("1-47"))
    assert not log.is_finished
    lot = read_whole(log, "48-58 c D")
    assert rows(lot) == " ".join([*words("48-58"), "~59"])
    assert lot.is_complete


def test_a_finished_run_takes_nothing_more() -> None:
    """The server may append a second `[DONE]`; a finished run is never reopened (I5)."""
    log = RunLog(RUN)
    read(log, "1 s D")
    assert rows(read_whole(log, "3 4 D")) == ""
    assert log.cursor == 2


# Pings


def test_keepalive_pings_move_nothing() -> None:
    """Pings repeat the last number or have none; they are no rows, no duplicates, and end nothing (I9)."""
    log = RunLog(RUN)
    assert read(log, "p p1 p1 2-4 p4 p4 5 s p5 u p5 D p5") == "1 2 3 4 5 ~6 ~7"
    assert log.duplicate_count == 0


def test_pings_of_a_silent_resumed_stream_move_nothing() -> None:
    """A reader that has read nothing yet sends pings without a number; they end nothing (I9)."""
    log = RunLog(RUN, cursor=5, stored_count=5)
    assert read(log, "p p p") == ""
    assert (log.cursor, log.is_finished, log.wants_reread, log.is_unproven) == (5, False, False, False)


@pytest.mark.parametrize("response", ["1 2 x p3 p3 4 D", "1 2 f3 p3 p3 4 D"])
def test_a_ping_may_repeat_a_number_that_was_not_read(response: str) -> None:
    """After an entry that could not be read a ping's number proves nothing (I1, I9)."""
    assert read(RunLog(RUN), response) == "1 2 4"


def test_a_ping_with_a_new_number_is_an_entry_wherever_it_stands() -> None:
    """A ping is a keepalive for its number, not for its place (I9)."""
    assert read(RunLog(RUN), "1 x 3 p4 p4 5 D") == "1 3 4 5"


# What comes twice


def test_a_batch_written_twice() -> None:
    """As captured: `1-15 3-41 29-154`, numbers going backwards; each is stored once, the rest is counted (I1)."""
    log = RunLog(RUN)
    lot = read_whole(log, "p1 2-15 3-41 29-154 s u D")
    assert rows(lot) == " ".join([*words("1-154"), "~155", "~156"])
    assert lot.is_complete
    assert log.duplicate_count == 13 + 13


@pytest.mark.parametrize(
    "response", ["1 2 s s u D", "1 2 s u s u D", "1 2 s s u s u D", "1 2 s 2 s u D", "1 2 s u 1 2 s u D", "1 2 s u u D"]
)
def test_unnumbered_entries_written_twice(response: str) -> None:
    """What has no number and follows itself is a repetition, wherever the batch began and ended (I1, I5)."""
    lot = read_whole(RunLog(RUN), response)
    assert rows(lot) == "1 2 ~3 ~4"
    assert lot.is_complete


def test_equal_neighbours_that_fit_are_no_repetition() -> None:
    """Where the numbers around them leave room for both, two equal entries are two (I1)."""
    assert read(RunLog(RUN), "1 s s 4 D") == "1 ~2 ~3 4"


def test_a_resumed_response_may_repeat_the_entries_after_the_cursor() -> None:
    """The server filters by number: of a batch written twice it sends again what is above the cursor (I1)."""
    assert read(RunLog(RUN, cursor=10, stored_count=10), "s s 12 s 12 u D") == "~11 12 ~13"


def test_two_workers_make_the_same_rows() -> None:
    """Wherever each one's responses were cut, both derive the same numbers (I4)."""
    first, second = RunLog(RUN), RunLog(RUN)
    one = [read(first, "1-3 s"), read(first, "s 5 t u"), read(first, "t u D")]
    two = [read(second, "1 2"), read(second, "3 s 5 t u D")]
    assert " ".join(one) == " ".join(two) == "1 2 3 ~4 5 ~6 ~7"


# What is missing


def test_a_hole_is_recorded_after_a_second_response() -> None:
    """Chunks that two responses skipped are lost: a gap, and the run can never be complete (I2, I5)."""
    log = RunLog(RUN)
    assert read(log, "1-5 9 10") == "1 2 3 4 5"
    assert log.wants_reread
    assert log.cursor == 5
    lot = read_whole(log, "9 10 s u D")
    assert rows(lot) == "9 10 ~11 ~12"
    assert list(lot.gaps) == [Gap(6, 8, "not served")]
    assert (lot.cursor, lot.is_finished, lot.is_complete) == (12, True, False)


def test_a_resumed_response_that_begins_too_late_is_asked_for_again() -> None:
    """One response that skips the number after the cursor proves nothing yet (I2)."""
    log = RunLog(RUN, cursor=5, stored_count=5)
    assert read_whole(log, "9 10 D") == taken(RunLog(RUN, cursor=5))
    assert log.wants_reread
    assert read(log, "6-10 s D") == "6 7 8 9 10 ~11"


def test_a_hole_may_close_by_itself() -> None:
    """Chunks that were only late come with the second response, however many they are, and nothing is recorded (I2)."""
    log = RunLog(RUN)
    assert read(log, "1-5 9") == "1 2 3 4 5"
    lot = read_whole(log, "6 p6 7-12 s u D")
    assert rows(lot) == "6 7 8 9 10 11 12 ~13 ~14"
    assert lot.is_complete
    assert not lot.gaps


def test_a_marker_before_the_hole_is_closed_is_not_the_end() -> None:
    """While chunks are held behind missing numbers, `[DONE]` finishes nothing before a second response (I5)."""
    log = RunLog(RUN)
    assert read(log, "1 5") == "1"
    assert read(log, "2 s D") == "2"
    assert log.wants_reread
    assert not log.is_finished
    lot = read_whole(log, "D")
    assert (rows(lot), list(lot.gaps)) == ("5", [Gap(3, 4, "not served")])
    assert (lot.is_finished, lot.is_complete) == (True, False)


def test_a_log_longer_than_ten_thousand() -> None:
    """As captured: `1-1090`, then 1651, then, asked again, from 3001 on: two gaps, and 1651 is not lost (I2, I5)."""
    log = RunLog(RUN)
    read(log, "1-1090 1651-1750")
    lot = read_whole(log, "3001-13001 s u D")
    assert list(lot.gaps) == [Gap(1091, 1650, "not served"), Gap(1652, 3000, "not served")]
    assert rows(lot).split() == ["1651", *words("3001-13001"), "~13002", "~13003"]
    assert (lot.stored_count, lot.is_complete) == (1090 + 1 + 10001 + 2, False)


@pytest.mark.parametrize(
    ("first", "second"), [("1 s 5 u D", "s 5 u D"), ("1 3 D", "s u 3 D"), ("1 s u 5 E6", "s u 5 E6")]
)
def test_unnumbered_entries_next_to_a_hole_get_no_number(first: str, second: str) -> None:
    """Which of the missing numbers they hold nobody can say: their bytes are kept, and the hole is a gap (I1, I6)."""
    log = RunLog(RUN)
    assert read(log, first) == "1"
    assert log.wants_reread
    lot = read_whole(log, second)
    assert lot.gaps[0] == Gap(2, lot.rows[0].seq_id - 1, "not served")
    assert {reject.raw for reject in lot.rejects} <= {HIDDEN[0].encode(), HIDDEN[1].encode()}
    assert lot.rejects
    assert not lot.is_complete


def test_a_chunk_that_comes_after_its_gap_was_recorded() -> None:
    """A gap that fills up after all is none any more, and the run can be complete (I5)."""
    log = RunLog(RUN)
    read(log, "1 4")
    lot = read_whole(log, "4 2 3 3 4 s D")
    assert list(lot.gaps) == [Gap(2, 3, "not served")]
    assert rows(lot) == "4 2 3 ~5"
    assert (lot.has_late_rows, lot.stored_count, lot.is_complete) == (True, 5, True)
    assert log.duplicate_count == 2


def test_giving_up_names_what_is_missing() -> None:
    """What the server serves no more is a gap up to the unknown end; what was received is kept (I5, I6)."""
    log = RunLog(RUN)
    read(log, "1-3 s x")
    log.give_up("expired")
    lot = taken(log)
    assert list(lot.gaps) == [Gap(4, None, "expired")]
    assert [reject.raw for reject in lot.rejects] == [HIDDEN[0].encode(), b"no JSON"]
    assert (lot.cursor, lot.is_finished, lot.is_complete) == (3, True, False)


def test_giving_up_at_a_hole() -> None:
    """The chunk behind a hole was received and is stored; both sides of it are gaps (I5)."""
    log = RunLog(RUN)
    read(log, "1 2 5")
    log.give_up("not served")
    lot = taken(log)
    assert rows(lot) == "5"
    assert list(lot.gaps) == [Gap(3, 4, "not served"), Gap(6, None, "not served")]


# What cannot be read


def test_an_unreadable_entry_holds_its_place() -> None:
    """Bytes that are no chunk are kept, hold a number, and make the run incomplete; the rest is stored (I5, I6)."""
    lot = read_whole(RunLog(RUN), "1 x 3 x D")
    assert rows(lot) == "1 3"
    assert [(reject.after_seq_id, reject.raw) for reject in lot.rejects] == [(1, b"no JSON"), (3, b"no JSON")]
    assert list(lot.gaps) == [Gap(2, 2, "rejected"), Gap(4, 4, "rejected")]
    assert (lot.is_finished, lot.is_complete) == (True, False)


def test_an_entry_of_another_run_is_no_row() -> None:
    """A chunk that names another run is never stored as this one's; its bytes and its place are kept (I1, I6)."""
    lot = read_whole(RunLog(RUN), "1 f2 3 s D")
    assert rows(lot) == "1 3 ~4"
    assert [reject.after_seq_id for reject in lot.rejects] == [1]
    assert not lot.is_complete


def test_an_event_for_which_there_is_no_number_is_kept() -> None:
    """Between two neighbours there is no entry: the bytes are kept, and nothing is missing (I1, I6)."""
    lot = read_whole(RunLog(RUN), "1 s 2 D")
    assert rows(lot) == "1 2"
    assert [reject.raw for reject in lot.rejects] == [HIDDEN[0].encode()]
    assert lot.is_complete


def test_the_end_behind_a_repetition_that_breaks_off_is_asked_for_again() -> None:
    """Behind numbers that went back nobody knows where the end stands: it is asked for from the cursor (I2)."""
    log = RunLog(RUN)
    assert rows(read_whole(log, "1-5 3 s D")) == "1 2 3 4 5"
    assert log.wants_reread
    assert not log.is_finished
    lot = read_whole(log, "s D")
    assert (rows(lot), lot.is_complete) == ("~6", True)


def test_an_end_that_goes_back_even_when_asked_again_is_not_numbered() -> None:
    """A server that repeats what lies before the cursor it was asked after is not asked for ever (I1, I5, I6)."""
    log = RunLog(RUN)
    read_whole(log, "1-5 3 s D")
    lot = read_whole(log, "3 s D")
    assert (list(lot.gaps), len(lot.rejects), lot.is_complete) == ([Gap(6, None, "rejected")], 1, False)


# Whose events these are


@pytest.mark.parametrize("response", ["f6", "s u D", "x D", "s f6", "! s D"])
def test_a_response_that_may_be_another_run_s_changes_nothing(response: str) -> None:
    """A server may ignore the run_id asked for: what does not name this run is asked for again, by run (I1, I5)."""
    log = RunLog(RUN, cursor=5, stored_count=5)
    read_whole(log, response, is_by_run=False)
    assert log.is_unproven
    assert log.take() is None
    assert log.cursor == 5
    assert read(log, "s u D") == "~6 ~7"


def test_one_event_that_names_the_run_proves_the_response() -> None:
    """A chunk of this run, or a ping that names it, proves whose the rest is (I5)."""
    assert read(RunLog(RUN), "1 s u D", is_by_run=False) == "1 ~2 ~3"
    assert read(RunLog(RUN, cursor=5, stored_count=5), "p s u D", is_by_run=False) == "~6 ~7"


def test_a_numbered_chunk_that_names_no_run_proves_nothing() -> None:
    """A number alone may be any run's: it counts only where the address names the run (I1)."""
    chunk = parse(SseEvent(b'{"message_type":"assistant_message","seq_id":1}'))
    log = RunLog(RUN)
    for is_by_run in (False, True):
        log.begin_read(is_by_run=is_by_run)
        log.accept(chunk)
        assert (log.is_unproven, log.cursor) == ((False, 1) if is_by_run else (True, 0))


# Crashes and bounds


def test_a_new_process_goes_on_from_what_is_stored() -> None:
    """A RunLog made from cursor, count and open gaps goes on as the old one would have (I3)."""
    log = RunLog(RUN)
    read(log, "1 5")
    read(log, "5 6 s")
    again = RunLog(RUN, cursor=6, stored_count=3, gaps=[Gap(2, 4, "not served")])
    lots = [read_whole(each, "s u D") for each in (log, again)]
    assert lots[0] == lots[1]
    assert (lots[0].stored_count, lots[0].is_complete) == (5, False)


@pytest.mark.parametrize("word", ["s", "x"])
def test_endless_events_without_a_number_take_no_memory(word: str) -> None:
    """Only so many wait for a number; then they are kept as bytes, and the run can never be complete (I5, I6, I8)."""
    log = RunLog(RUN)
    log.begin_read(is_by_run=True)
    log.accept(event("1"))
    reject_count = 0
    for _ in range(5 * MAX_UNNUMBERED):
        log.accept(event(word))
        assert len(log._tail) <= MAX_UNNUMBERED
        reject_count += len(taken(log).rejects)
    assert reject_count >= 4 * MAX_UNNUMBERED
    log.accept(event("D"))
    lot = taken(log)
    assert (lot.is_finished, lot.is_complete) == (True, False)
    assert list(lot.gaps) == [Gap(2, None, "rejected")]


def test_large_events_without_a_number_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events that wait for a number are bounded by their bytes, too (I8)."""
    monkeypatch.setattr(runlog, "MAX_UNNUMBERED_BYTES", 100)
    log = RunLog(RUN)
    lot = read_whole(log, "1 s s s 5 D")
    assert len(lot.rejects) == 2
    assert not lot.is_complete


def test_after_too_many_events_without_a_number_a_number_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next numbered chunk is a place to count from again; what stands before it gets no number (I1, I6)."""
    monkeypatch.setattr(runlog, "MAX_UNNUMBERED", 2)
    lot = read_whole(RunLog(RUN), "1 s t u 2 s D")
    assert rows(lot) == "1 2 ~3"
    assert [reject.after_seq_id for reject in lot.rejects] == [1, 1, 1]
    log = RunLog(RUN)
    assert [read(log, "1 s t u s 3 D"), read(log, "s t u s 3 D")] == ["1", "3"]


def test_a_flood_that_may_be_another_run_s_is_not_even_rejected() -> None:
    """Too many events without a number in a response that proved nothing: asked for again, nothing kept (I8)."""
    log = RunLog(RUN)
    read_whole(log, "s " * 3000, is_by_run=False)
    assert log.is_unproven
    assert log.take() is None


def test_a_thousand_unnumbered_entries_in_a_row_are_numbered_quickly() -> None:
    """Looking for repetitions among the events that wait does not hold up the worker (I8)."""
    log = RunLog(RUN)
    log.begin_read(is_by_run=True)
    log.accept(event("1"))
    for n in range(MAX_UNNUMBERED):
        log.accept(parse(SseEvent(b'{"n":%d}' % n)))
    started = time.process_time()
    log.accept(event("D"))
    assert time.process_time() - started < 1
    assert taken(log).cursor == 1 + MAX_UNNUMBERED


def test_behind_a_hole_nothing_more_is_held() -> None:
    """Whoever goes on feeding a log with a hole fills no memory: all of it comes again (I8)."""
    log = RunLog(RUN)
    read_whole(log, " ".join(str(n) for n in range(2, 4000, 2)))
    assert log.wants_reread
    assert len(log._held) == 1


def test_a_log_shows_its_state() -> None:
    """Its repr says what a person debugging a run asks for first."""
    log = RunLog(RUN)
    read(log, "1 2 s")
    assert repr(log) == "<RunLog run-own cursor=2 held=0 tail=1 finished=False>"
