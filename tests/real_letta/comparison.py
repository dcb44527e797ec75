"""Compares what is stored with what the server's Redis holds: entry by entry, byte by byte."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.real_letta.driver import Driver
from tests.real_letta.server_log import Row, RunLog, ServerLog
from tests.real_letta.stored import Database

_SHOWN = 20
_MESSAGES = "SELECT payload FROM messages WHERE run_id = '{}' ORDER BY position"


@dataclass
class Findings:
    """What a comparison found; `wrong` says each thing in words."""

    runs: int = 0
    chunks: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    late: int = 0
    """Gaps that were recorded and closed again."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{self.runs} runs, {self.chunks} chunks, lost {self.lost}, doubled {self.doubled}"
        late = f", {self.late} gaps closed by late chunks" if self.late else ""
        return f"{counts}, altered {self.altered}{late}"

    def add(self, other: "Findings") -> None:
        """Take the figures of another comparison along."""
        self.runs += other.runs
        self.chunks += other.chunks
        self.lost += other.lost
        self.doubled += other.doubled
        self.altered += other.altered
        self.late += other.late
        self.wrong += other.wrong

    def report(self) -> str:
        """The figures and the first of what is wrong."""
        return "\n  ".join([str(self), *self.wrong[:_SHOWN]])


def compare(database: Database, log: ServerLog, driver: Driver, run_ids: Iterable[str]) -> Findings:
    """Compare all these runs; each must have its end in the server's log.

    A busy server may write two batches of a log at once, so that the numbers of one come late. A gap recorded
    meanwhile must have been closed; where the end of the log came before the late batch, nobody is ever served it.
    """
    findings = Findings()
    stored = _stored_rows(database)
    for run_id in run_ids:
        server = log.read(run_id)
        findings.runs += 1
        findings.chunks += len(server.rows)
        if not server.is_over:
            findings.wrong.append(f"{run_id}: the server's own log has no end")
        compare_rows(findings, run_id, server.rows, stored[run_id])
        _compare_run(findings, database, driver, run_id, server)
    findings.late = database.closed_gap_count()
    rejects = database.fetch("SELECT run_id, reason FROM rejects")
    findings.wrong += [f"rejected: {reject}" for reject in rejects]
    return findings


def compare_rows(findings: Findings, run_id: str, expected: Iterable[Row], stored: list[Row]) -> None:
    """Count what is lost, doubled (or made up) and altered among the rows of one run."""
    wanted = {row.seq_id: row for row in expected}
    times = Counter(row.seq_id for row in stored)
    for seq_id in sorted(wanted.keys() - times.keys()):
        findings.lost += 1
        findings.wrong.append(f"{run_id}: lost {wanted[seq_id]}")
    for row in stored:
        if row.seq_id not in wanted or times[row.seq_id] > 1:
            findings.doubled += 1
            findings.wrong.append(f"{run_id}: doubled or made up {row}")
        elif row != wanted[row.seq_id]:
            findings.altered += 1
            findings.wrong.append(f"{run_id}: altered, stored {row}, must be {wanted[row.seq_id]}")


def stored_rows(database: Database, run_id: str) -> list[Row]:
    """The stored rows of one run."""
    return _stored_rows(database, f"WHERE run_id = '{run_id}'")[run_id]


def _stored_rows(database: Database, condition: str = "") -> defaultdict[str, list[Row]]:
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    columns = "run_id, seq_id, payload, seq_source, message_type, otid, step_id"
    for run_id, *values in database.fetch(f"SELECT {columns} FROM chunks {condition} ORDER BY run_id, seq_id"):
        rows[run_id].append(Row(*values))
    return rows


def _compare_run(findings: Findings, database: Database, driver: Driver, run_id: str, server: RunLog) -> None:
    said = driver.run(run_id)
    expected = {
        "conversation_id": said.conversation_id,
        "agent_id": said.agent_id,
        "background": True,
        "status": said.status,
        "stop_reason": said.stop_reason,
        "state": "incomplete" if server.holes else "complete",
        "last_seq_id": server.rows[-1].seq_id,
        "chunk_count": len(server.rows),
    }
    found = database.fetch(f"SELECT {', '.join(expected)} FROM runs WHERE run_id = '{run_id}'")
    if len(found) != 1:
        findings.wrong.append(f"{run_id}: {len(found)} rows in runs")
        return
    for (name, wanted), value in zip(expected.items(), found[0], strict=True):
        if value != wanted:
            findings.wrong.append(f"{run_id}: {name} is {value!r}, must be {wanted!r}")
    _compare_messages(findings, database, driver, run_id)
    if (gaps := database.gaps(run_id)) != server.holes:
        findings.wrong.append(f"{run_id}: gaps {gaps}, must be {server.holes}")


def _compare_messages(findings: Findings, database: Database, driver: Driver, run_id: str) -> None:
    stored = [json.loads(payload) for (payload,) in database.fetch(_MESSAGES.format(run_id))]
    listed = driver.messages(run_id)
    if stored != listed:
        findings.wrong.append(f"{run_id}: {len(stored)} messages stored, {len(listed)} listed, or not the same ones")
