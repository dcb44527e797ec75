"""What `letta-ingest verify` checks: every stored run, and on request that the server knows none we do not.

Used by cli.py. Reads only, each run in a snapshot of its own, so that it may run beside a working worker.
"""

from collections.abc import Callable, Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import app
from worker.config import Config
from worker.core.messages import Assembly, Comparison, compare
from worker.core.soundness import faults_of
from worker.discovery import Watch
from worker.letta.client import LettaClient
from worker.storage.audit import Audit, Dossier
from worker.storage.reads import Reads
from worker.storage.tables import UNFINISHED_STATES


class RunReport(msgspec.Struct, frozen=True):
    """What verify says of one run: `faults` contradict the promise, `missing` is what is known to be missing."""

    run_id: str
    state: str
    chunks: int
    faults: Sequence[str]
    missing: Sequence[str]


class DifferingRun(msgspec.Struct, frozen=True):
    """A run whose chunks are all there, but whose messages on the server say something else, and in what."""

    run_id: str
    differences: Sequence[str]


class Report(msgspec.Struct):
    """The whole result. It is sound when no run has faults and the server has no run we do not know."""

    runs: int = 0
    chunks: int = 0
    states: dict[str, int] = {}
    runs_with_gaps: int = 0
    differing: list[DifferingRun] = []
    """Complete runs whose messages say something else than what was streamed."""
    faulty: list[RunReport] = []
    unknown_runs: list[str] = []
    """Runs the server lists in the watched scope that are not stored."""
    server_runs: int | None = None
    """Runs of the watched scope that the server lists; None: it was not asked."""
    undiscovered_runs: int = 0
    """Those of them that are newer than the last sweep."""

    @property
    def is_sound(self) -> bool:
        """Nothing contradicts the promise."""
        return not self.faulty and not self.unknown_runs


async def verify(config: Config, *, with_server: bool, progress: Callable[[int, int], None]) -> Report:
    """Check everything. `progress` is told how many runs of how many are done."""
    report = Report()
    async with app.open_current_database(config) as engine:
        audit = Audit(engine)
        total = await audit.run_count()
        async for dossier in audit.dossiers():
            _count(report, dossier)
            progress(report.runs, max(total, report.runs))
        if with_server:
            async with app.open_letta(config) as letta:
                await _ask_server(report, app.watch(config), engine, letta)
    return report


def _count(report: Report, dossier: Dossier) -> None:
    comparison = _compare(dossier)
    found = inspect(dossier, comparison)
    report.runs += 1
    report.chunks += found.chunks
    report.states[found.state] = report.states.get(found.state, 0) + 1
    report.runs_with_gaps += bool(found.missing)
    if found.faults:
        report.faulty.append(found)
    if comparison is not None and comparison.verdict == "differs":
        report.differing.append(DifferingRun(found.run_id, comparison.differences))


def _compare(dossier: Dossier) -> Comparison | None:
    """What the stored chunks say against the stored messages; None while there is nothing to compare yet."""
    if dossier.run.state != "complete" or not dossier.is_settled:
        return None
    assembly = Assembly(keeps_texts=False)
    for chunk in dossier.chunks:
        assembly.add(chunk.seq_id, chunk.payload)
    return compare(assembly.messages(), dossier.messages)


def inspect(dossier: Dossier, comparison: Comparison | None) -> RunReport:
    """Check one run (I1, I2, I5, I7), and that its stored verdict is the one its chunks and messages give."""
    run = dossier.run
    open_gaps = [gap for gap in dossier.gaps if gap.is_open]
    faults = faults_of(
        run.record.run_id,
        state=run.state,
        cursor=run.cursor,
        chunk_count=run.chunk_count,
        chunks=dossier.chunks,
        open_gaps=open_gaps,
    )
    if run.state not in UNFINISHED_STATES and run.state != "complete" and not open_gaps:
        faults.append(f"the run is {run.state}, but no gap says what is missing")
    if comparison is not None and run.verdict not in {None, comparison.verdict}:
        faults.append(f"the stored verdict is {run.verdict}, but chunks and messages say: {comparison.verdict}")
    missing = [f"{gap.first_seq_id}-{gap.last_seq_id or '?'} ({gap.cause})" for gap in open_gaps]
    return RunReport(run.record.run_id, run.state, len(dossier.chunks), faults, missing)


async def _ask_server(report: Report, watch: Watch, engine: AsyncEngine, letta: LettaClient) -> None:
    """Every run the server lists in the watched scope must be stored, up to where discovery has listed."""
    audit = Audit(engine)
    state = await Reads(engine, is_patient=False).discovery_state()
    report.server_runs = report.undiscovered_runs = 0
    async for page in letta.newest_runs():
        wanted = [run for run in page.whole() if watch.wants(run, state.scopes)]
        listed = [run.run_id for run in wanted if state.position_at and run.created_at <= state.position_at]
        known = await audit.known_runs(listed) if listed else set()
        report.server_runs += len(wanted)
        report.undiscovered_runs += len(wanted) - len(listed)
        report.unknown_runs += [run_id for run_id in listed if run_id not in known]
