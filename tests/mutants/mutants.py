"""Deliberate bugs, one line each, and for each the test that must notice it. Planted by test_mutants.py.

To add one: name it, say what is wrong with it, copy the line as it stands, change it, and name the test. A bug that no
test notices is worth more than a mutant: write the test first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One line of one file made wrong on purpose.

    `was` occurs once in the file, and may for that reach into the lines around the changed one. `killed_by` is the id
    of one test; `dies_of` is the exception it fails by: TimeoutError for a bug that waits or tries for ever.
    """

    name: str
    bug: str
    file: str
    was: str
    becomes: str
    killed_by: str
    dies_of: str = "AssertionError"

    def planted_in(self, source: str) -> str:
        """The source with the bug in it."""
        count = source.count(self.was)
        assert count == 1, f"{self.file} has changed: what mutant {self.name} replaces occurs {count} times in it"
        return source.replace(self.was, self.becomes)


# The ten that people write first

TEN = (
    Mutant(
        name="cursor-is-max-seq",
        bug="The cursor is the highest number seen, so what is missing below it is never asked for again.",
        file="worker/core/runlog.py",
        was="if seq_id == self.cursor + 1 and not self._held:",
        becomes="if seq_id > self.cursor:",
        killed_by="tests/core/test_runlog.py::test_a_hole_is_recorded_after_a_second_response",
    ),
    Mutant(
        name="drop-at-or-below-last",
        bug="Whatever is not above the cursor is dropped as a duplicate, chunks that come late into their gap too.",
        file="worker/core/runlog.py",
        was="            self._store_late(place)",
        becomes="            self.duplicate_count += 1",
        killed_by="tests/core/test_runlog.py::test_a_chunk_that_comes_after_its_gap_was_recorded",
    ),
    Mutant(
        name="ping-moves-cursor",
        bug="A keepalive that repeats a number which was not read takes the place of the chunk that has it.",
        file="worker/core/runlog.py",
        was="is_keepalive = chunk.seq_id is None or chunk.seq_id <= self._anchor or self._holds_unknown",
        becomes="is_keepalive = chunk.seq_id is None",
        killed_by="tests/core/test_runlog.py::test_a_ping_may_repeat_a_number_that_was_not_read[1 2 x p3 p3 4 D]",
    ),
    Mutant(
        name="rows-and-cursor-apart",
        bug="Rows are committed in one transaction, and gaps, cursor and state in the next.",
        file="worker/storage/writes.py",
        was="dialect.insert_chunks(connection, rows)",
        becomes="dialect.insert_chunks(connection, rows);"
        ' [connection.exec_driver_sql(word) for word in ("COMMIT", "BEGIN")]',
        killed_by="tests/storage/test_atomic.py::test_a_failure_at_any_statement_leaves_nothing[sqlite]",
    ),
    Mutant(
        name="eof-is-done",
        bug="A response that ends is taken for a run that has ended.",
        file="worker/follower.py",
        was="return Outcome.CUT\n\n    async def _watch",
        becomes="return Outcome.FINISHED\n\n    async def _watch",
        killed_by="tests/follower/test_cuts.py::test_truncated_chunk_is_not_parsed",
    ),
    Mutant(
        name="cursor-per-conversation",
        bug="The cursor is kept for the conversation, so its next run begins where the last one ended.",
        file="worker/storage/writes.py",
        was='FROM v WHERE runs.run_id = v.run_id"\n    )',
        becomes="FROM v WHERE runs.conversation_id ="
        ' (SELECT conversation_id FROM runs AS r WHERE r.run_id = v.run_id)"\n    )',
        killed_by="tests/storage/test_write.py::test_runs_of_one_conversation_have_a_cursor_each[sqlite]",
    ),
    Mutant(
        name="derived-unproven",
        bug="An unnumbered chunk is given the next number at once, before a later number or the end proves it.",
        file="worker/core/runlog.py",
        was="self._tail.append(event)",
        becomes="self._store(self._as_place(self.cursor + 1, event))",
        killed_by="tests/core/test_runlog.py::test_a_live_cancel_is_not_the_end",
    ),
    Mutant(
        name="if-seq-id",
        bug="`if seq_id:` takes 0 for no number, so the chunk is neither refused nor stored.",
        file="worker/core/chunks.py",
        was="return value is None or (",
        becomes="return not value or (",
        killed_by="tests/core/test_chunks.py::test_an_absurd_number_is_refused_and_kept[0]",
    ),
    Mutant(
        name="expired-retried-for-ever",
        bug="410 is taken for trouble that passes: the stream is asked for again and again, and REST never.",
        file="worker/letta/answers.py",
        was="error = RunExpiredError(message)",
        becomes="error = TroubleError(message)",
        killed_by="tests/follower/test_expiry.py::test_expired_at_discovery[sqlite]",
        dies_of="TimeoutError",
    ),
    Mutant(
        name="page-with-after",
        bug="The list of runs is walked with `after`, as its name and the official client say, and not checked.",
        file="worker/letta/paging.py",
        was="await self._older_than(page.runs[-1], page_of, limit, proven)",
        becomes='await page_of(limit, {"after": page.runs[-1].run_id})',
        killed_by="tests/discovery/test_discovery.py::test_past_runs_are_found[sqlite]",
    ),
)

# What a later change is most likely to break

LIKELY = (
    Mutant(
        name="row-is-updated",
        bug="ON CONFLICT DO UPDATE: what comes again under a stored number takes the place of what came first.",
        file="worker/storage/writes.py",
        was="{values} ON CONFLICT DO NOTHING",
        becomes="{values} ON CONFLICT (run_id, seq_id) DO UPDATE SET payload = excluded.payload",
        killed_by="tests/storage/test_write.py::test_a_row_is_never_changed[sqlite]",
    ),
    Mutant(
        name="row-is-updated-on-postgresql",
        bug="The same on PostgreSQL, whose statement is another one.",
        file="worker/storage/writes.py",
        was="FROM pg_temp.chunk_lot ON CONFLICT DO NOTHING",
        becomes="FROM pg_temp.chunk_lot ON CONFLICT (run_id, seq_id) DO UPDATE SET payload = excluded.payload",
        killed_by="tests/storage/test_write.py::test_a_row_is_never_changed[postgresql]",
    ),
    Mutant(
        name="lot-carried-along",
        bug="Each commit on PostgreSQL brings the rows of all before it once more, and takes ever longer.",
        file="worker/storage/writes.py",
        was="ON COMMIT DELETE ROWS",
        becomes="ON COMMIT PRESERVE ROWS",
        killed_by="tests/storage/test_write.py::test_a_lot_is_not_carried_along",
    ),
    Mutant(
        name="cursor-goes-back",
        bug="The cursor is set and not only moved forward: a worker that is behind takes it back.",
        file="worker/storage/writes.py",
        was="SET last_seq_id = max(runs.last_seq_id, v.cursor)",
        becomes="SET last_seq_id = v.cursor",
        killed_by="tests/storage/test_write.py::test_the_cursor_never_goes_back[sqlite]",
    ),
    Mutant(
        name="cursor-goes-back-on-postgresql",
        bug="The same on PostgreSQL.",
        file="worker/storage/writes.py",
        was="SET last_seq_id = GREATEST(runs.last_seq_id, v.cursor)",
        becomes="SET last_seq_id = v.cursor",
        killed_by="tests/storage/test_write.py::test_the_cursor_never_goes_back[postgresql]",
    ),
    Mutant(
        name="commit-not-awaited-to-disk",
        bug="SQLite does not wait for the disk, so that a power cut takes back what was durable.",
        file="worker/storage/engine.py",
        was="PRAGMA synchronous=FULL",
        becomes="PRAGMA synchronous=NORMAL",
        killed_by="tests/storage/test_sqlite_file.py::test_a_commit_is_on_disk",
    ),
    Mutant(
        name="commit-not-shielded",
        bug="Whoever is cancelled while it waits for a commit takes the write out of the queue.",
        file="worker/storage/committer.py",
        was="return asyncio.shield(self.durable).__await__()",
        becomes="return self.durable.__await__()",
        killed_by="tests/storage/test_committer.py::test_giving_up_waiting_does_not_take_a_write_back[sqlite]",
        dies_of="CancelledError",
    ),
    Mutant(
        name="yields-with-a-lot-in-hand",
        bug="A run gives its place away while what it has read waits for room at the committer, and loses that.",
        file="worker/follower.py",
        was="and is_turn_over and not was_ended and not self._is_handing_over:",
        becomes="and is_turn_over and not was_ended:",
        killed_by="tests/follower/test_sharing.py::test_waiting_for_the_database_is_neither_idleness_nor_silence[live]",
    ),
    Mutant(
        name="slow-database-is-silence",
        bug="Time spent waiting for the database counts as silence of the run, which is then given up half read.",
        file="worker/follower.py",
        was="        if self._is_handing_over:\n            return 0.0",
        becomes="        if False:\n            return 0.0",
        killed_by="tests/follower/test_sharing.py::test_waiting_for_the_database_is_neither_idleness_nor_silence[over]",
    ),
    Mutant(
        name="builds-on-a-failed-write",
        bug="A follower goes on behind a lot the database could not take, and the cursor passes it.",
        file="worker/follower.py",
        was="submit(write, after=self._last_commit)",
        becomes="submit(write)",
        killed_by="tests/follower/test_sharing.py::test_nothing_is_built_upon_a_write_that_failed",
        dies_of="Failed",
    ),
    Mutant(
        name="silent-run-asks-at-once",
        bug="A silent run that gave its place away wants it back at once, and each reading goes on costing the server.",
        file="worker/follower.py",
        was="await asyncio.sleep(self._absence)",
        becomes="await asyncio.sleep(0)",
        killed_by="tests/follower/test_sharing.py::test_silent_runs_come_back_ever_less_often",
    ),
    Mutant(
        name="gap-without-reread",
        bug="A number that one response skips is recorded as lost, although it may only be late.",
        file="worker/core/runlog.py",
        was="return self._confirming_at == self.cursor",
        becomes="return True",
        killed_by="tests/core/test_runlog.py::test_a_hole_may_close_by_itself",
    ),
    Mutant(
        name="gaps-forgotten-at-restart",
        bug="A restarted worker does not know of the gaps found before, and calls the run complete.",
        file="worker/follower.py",
        was="RunLog(self._record.run_id, self._run.cursor, self._run.chunk_count, gaps)",
        becomes="RunLog(self._record.run_id, self._run.cursor, self._run.chunk_count)",
        killed_by="tests/follower/test_gaps.py::test_gap_outlives_its_worker[sqlite]",
    ),
    Mutant(
        name="gap-behind-another-s-rows",
        bug="What a second worker stores behind the place where the first gave up is still called missing.",
        file="worker/storage/writes.py",
        was="    if gapped:",
        becomes="    if False:",
        killed_by="tests/storage/test_two_writers.py::test_open_end_moves[sqlite]",
    ),
    Mutant(
        name="reject-dropped",
        bug="Bytes that are no chunk hold their place, but are not kept.",
        file="worker/core/runlog.py",
        was="self._rejects.append(place)",
        becomes="pass",
        killed_by="tests/follower/test_gaps.py::test_bytes_that_are_no_chunk",
    ),
    Mutant(
        name="run-id-not-checked",
        bug="A chunk is believed to be of the run that was asked for, whatever run it names.",
        file="worker/core/runlog.py",
        was="def _accept_chunk(self, chunk: Chunk) -> None:\n        if chunk.run_id is not None and chunk",
        becomes="def _accept_chunk(self, chunk: Chunk) -> None:\n        if chunk.run_id is None and chunk",
        killed_by="tests/follower/test_wrong_run.py::test_chunks_of_another_run",
    ),
    Mutant(
        name="stop-reason-is-done",
        bug="The stop_reason ends the run, as in the documentation, although a cancelled run's is made up.",
        file="worker/core/runlog.py",
        was="if chunk.ends_run:",
        becomes='if chunk.ends_run or chunk.message_type == "stop_reason":',
        killed_by="tests/follower/test_endings.py::test_cancelled_while_followed",
    ),
    Mutant(
        name="silence-is-done",
        bug="One silence of a run that is over is taken for the loss of its stream.",
        file="worker/follower.py",
        was="if self._quiet_count == 1:",
        becomes="if self._quiet_count == 0:",
        killed_by="tests/follower/test_endings.py::test_frozen_for_a_while[0]",
    ),
    Mutant(
        name="payload-written-anew",
        bug="The payload is decoded and encoded again, and so not what was received.",
        file="worker/core/chunks.py",
        was="    chunk = Chunk(\n        payload,",
        becomes="    chunk = Chunk(\n        json.dumps(json.loads(payload)),",
        killed_by="tests/follower/test_endings.py::test_completed[sqlite]",
    ),
    Mutant(
        name="overlap-left-out",
        bug="Runs are listed down to the newest one known: one that became visible late is never found.",
        file="worker/discovery.py",
        was="if floor is None or run.created_at >= floor]",
        becomes="if floor is None or run.created_at >= (self._position_at or floor)]",
        killed_by="tests/discovery/test_discovery.py::test_run_committed_late",
    ),
    Mutant(
        name="entry-passed-over",
        bug="An entry of the list of runs that cannot be read is skipped, and its run is never found.",
        file="worker/discovery.py",
        was="trouble = trouble or page.trouble",
        becomes="trouble = None",
        killed_by="tests/faults/test_hostile_answers.py::test_a_listing_with_a_run_nobody_can_follow[fields3]",
        dies_of="Failed",
    ),
    Mutant(
        name="ready-too-early",
        bug="systemd is told READY=1 before anybody knows whether the server answers.",
        file="worker/service.py",
        was='            self._start("status", self._tell_status())',
        becomes='            self._start("status", self._tell_status()); systemd.notify("READY=1")',
        killed_by="tests/system/test_liveness.py::test_ready_comes_with_the_first_listing",
    ),
    Mutant(
        name="reload-forgets-the-unwanted",
        bug="A run that was listed before its conversation was watched counts as known, and is never followed.",
        file="worker/discovery.py",
        was="        self._known = {}  # runs that nobody wanted are among them",
        becomes="",
        killed_by="tests/system/test_reload.py::test_what_may_change_does",
        dies_of="TimeoutError",
    ),
)

MUTANTS = TEN + LIKELY
