"""Which runs exist: one cheap listing per interval serves everything that is watched. Used by service.py.

Runs are listed, not conversations, and by creation, not by activity: a run shorter than the interval is never in a
list of active ones (letta-protocol e, trap 12).
"""

import datetime as dt
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from worker.core.records import RunRecord
from worker.errors import TroubleError
from worker.letta.client import LettaClient
from worker.logs import Log
from worker.storage.committer import Committer
from worker.storage.reads import Reads, StoredRun
from worker.storage.writes import SweepWrite

OVERLAP = dt.timedelta(minutes=5)
"""A run becomes visible when its transaction commits but carries the time that began: look back so far (trap 12)."""
LONG_AGO = dt.datetime(1970, 1, 2, tzinfo=dt.UTC)


class Watch(msgspec.Struct, frozen=True):
    """Whose runs are wanted. A scope is `all`, a conversation's id or an agent's.

    `direct_agents` are agents whose agent-direct (`default`) conversation is watched; those runs carry no
    conversation_id (letta-protocol e).
    """

    is_all: bool = False
    conversations: frozenset[str] = frozenset()
    direct_agents: frozenset[str] = frozenset()
    agents: frozenset[str] = frozenset()

    def scopes_of(self, run: RunRecord) -> list[str]:
        """The watched scopes this run belongs to."""
        scopes = ["all"] if self.is_all else []
        if run.conversation_id in self.conversations:
            scopes.append(f"conversation:{run.conversation_id}")
        if run.conversation_id is None and run.agent_id in self.direct_agents:
            scopes.append(f"direct:{run.agent_id}")
        if run.agent_id in self.agents:
            scopes.append(f"agent:{run.agent_id}")
        return scopes

    def wants(self, run: RunRecord, starts: Mapping[str, "Start"]) -> bool:
        """A scope of the run is watched since before the run was made; `starts` says of each scope from when on."""
        watched = [starts[scope] for scope in self.scopes_of(run) if scope in starts]
        return any(start is None or run.created_at >= start for start in watched)

    @property
    def scopes(self) -> set[str]:
        """All watched scopes by the names the store keeps them under."""
        named = (("conversation", self.conversations), ("direct", self.direct_agents), ("agent", self.agents))
        scopes = {f"{kind}:{name}" for kind, names in named for name in names}
        return scopes | {"all"} if self.is_all else scopes


StartFrom = Literal["earliest", "latest"] | dt.datetime
"""From when on the runs of a newly watched scope are wanted."""
Start = dt.datetime | None
"""The same as a time; None: from the earliest."""


class Discovery:
    """Finds runs, newest first down to what is known. Its position is stored, so a restart does not list the past."""

    def __init__(self, letta: LettaClient, committer: Committer, reads: Reads, log: Log) -> None:
        self._letta = letta
        self._committer = committer
        self._reads = reads
        self._log = log
        self._position_at: dt.datetime | None = None
        self._scopes: dict[str, Start] = {}
        self._new: dict[str, Start] = {}
        self._known: dict[str, RunRecord] = {}
        self._wanted: tuple[Watch, StartFrom] | None = None

    def change(self, watch: Watch, start: StartFrom) -> None:
        """Watch this from the next sweep on. Runs that were found stay wanted."""
        self._wanted = watch, start

    async def load(self, watch: Watch, start: StartFrom) -> None:
        """Take up the stored position; scopes that are new are looked for from `start`, or from now on."""
        self._watch = watch
        self._is_latest = start == "latest"
        state = await self._reads.discovery_state()
        self._position_at = state.position_at
        self._scopes = {scope: state.scopes[scope] for scope in watch.scopes & state.scopes.keys()}
        start_at = start if isinstance(start, dt.datetime) else None
        self._new = dict.fromkeys(watch.scopes - state.scopes.keys(), start_at)
        self._dropped = sorted(state.scopes.keys() - watch.scopes)
        self._known = {}  # runs that nobody wanted are among them

    async def sweep(self) -> AsyncIterator[list[StoredRun]]:
        """List what is new once; give of each page, as it comes, the watched runs there is something to do for.

        Raises TroubleError, BadRequestError or RefusedError; the next sweep then begins where this one began. An entry
        that is no run is trouble, too, but only after all others have been given.
        """
        if self._wanted is not None:
            await self.load(*self._wanted)
            self._wanted = None
        newest: dt.datetime | None = None
        trouble: TroubleError | None = None
        listed: dict[str, RunRecord] = {}
        async for page in self._letta.newest_runs():
            trouble = trouble or page.trouble
            if newest is None and (newest := _newest_of(page.runs)) is not None:
                self._start_new_scopes_at(newest)
            floor = self._floor()
            recent = [run for run in page.runs if floor is None or run.created_at >= floor]
            yield await self._store([run for run in recent if self._is_wanted(run)])
            listed.update((run.run_id, run) for run in recent)
            if len(recent) < len(page.runs):
                break
        if trouble is not None:
            raise trouble
        await self._move(newest)
        self._known = {run_id: run for run_id, run in listed.items() if self._is_in_overlap(run)}

    def _start_new_scopes_at(self, newest: dt.datetime) -> None:
        if self._is_latest:
            self._new = {scope: newest + dt.timedelta(microseconds=1) for scope in self._new}

    def _floor(self) -> dt.datetime | None:
        """Nothing older needs to be listed: the position, or, where a scope is new, the time it starts from."""
        floors: list[Start] = list(self._new.values())
        if self._scopes or not floors:
            floors.append(self._known_until())
        return None if None in floors else min(floor for floor in floors if floor is not None)

    def _known_until(self) -> Start:
        """Older runs have been listed. A position no sweep can have reached, from a clock gone wrong, says nothing."""
        position = self._position_at
        if position is None or not LONG_AGO <= position <= _now() + OVERLAP:
            return None
        return position - OVERLAP

    def _is_wanted(self, run: RunRecord) -> bool:
        return self._watch.wants(run, {**self._scopes, **self._new})

    async def _store(self, runs: Sequence[RunRecord]) -> list[StoredRun]:
        """Store what is new or has changed; return those of the new ones that are not settled."""
        changed = [run for run in runs if self._known.get(run.run_id) != run]
        if not changed:
            return []
        await self._committer.commit(SweepWrite(at=_now(), runs=changed))
        new = [run.run_id for run in changed if run.run_id not in self._known]
        # Known as soon as they are stored, so that a sweep that fails half way does not report them again.
        self._known.update((run.run_id, run) for run in changed)
        found = await self._reads.unsettled_among(new) if new else []
        if found:
            self._log.info("discovery.swept", new_runs=len(found))
        return found

    async def _move(self, newest: dt.datetime | None) -> None:
        """Make the position durable, and with it that the new scopes have been looked for."""
        position = None if self._known_until() is None else self._position_at
        is_ahead = newest is not None and (position is None or newest > position)
        if not (is_ahead or self._new or self._dropped):
            return
        position_at = newest if is_ahead else None
        await self._committer.commit(
            SweepWrite(_now(), (), position_at, new_scopes=self._new, dropped_scopes=self._dropped)
        )
        self._scopes |= self._new
        self._new, self._dropped = {}, []
        self._position_at = position_at or self._position_at

    def _is_in_overlap(self, run: RunRecord) -> bool:
        known_until = self._known_until()
        return known_until is None or run.created_at >= known_until


def _newest_of(page: Sequence[RunRecord]) -> dt.datetime | None:
    """The time of the newest run. One that claims to be of tomorrow must not hide those that come after it today."""
    return next((run.created_at for run in page if run.created_at <= _now() + OVERLAP), None)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def watch_of(*, is_all: bool, conversations: Iterable[str], agents: Iterable[str]) -> Watch:
    """The watch a configuration names; a conversation written as an agent's id is that agent's `default` one."""
    names = frozenset(conversations)
    direct = frozenset(name for name in names if name.startswith("agent-"))
    return Watch(is_all, names - direct, direct, frozenset(agents))
