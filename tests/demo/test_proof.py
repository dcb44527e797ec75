"""The count that the demo and the kill campaign rest on: it must find every kind of damage."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from worker.demo.fake_run import FakeRun, Ids
from worker.demo.proof import StoredRun, compare
from worker.demo.report import Kill, Outcome

Row = tuple[str, int, str]


@pytest.fixture
def run() -> FakeRun:
    """A run of six chunks, one of them written twice by the server."""
    run = FakeRun(
        Ids(random.Random(1)),
        conversation_id=None,
        agent_id="agent-1",
        background=True,
        pings=True,
        created_at=datetime.now(UTC),
        prompt="hi",
        max_length=lambda: 10_000,
    )
    for word in ("one", "two", "two"):
        run.say(word)
    run.repeat(2, 3)
    run.complete()
    return run


@pytest.fixture
def rows(run: FakeRun) -> list[Row]:
    """What a perfect worker stores."""
    return [(run.id, seq_id, payload) for seq_id, payload in run.expected_rows()]


def test_perfect_rows_are_exact(run: FakeRun, rows: list[Row]) -> None:
    """I1: rows that are what the server served are exact, whatever their order and whatever it sent twice."""
    tally = compare({run.id: run}, rows[::-1])
    assert (tally.chunks, tally.stored, tally.is_exact) == (6, 6, True)


def test_damage_is_found(run: FakeRun, rows: list[Row]) -> None:
    """I1: a row that is lost, doubled, altered, renumbered or another run's is counted as what it is."""
    (first, second), rest = rows[:2], rows[2:]
    again = (run.id, 7, second[2])
    other = (run.id, 1, first[2].replace("ping", "pong"))
    foreign = ("run-2", *first[1:])
    found = {
        "lost": compare({run.id: run}, [first, *rest]),
        "doubled": compare({run.id: run}, [first, second, second, *rest]),
        "under another number too": compare({run.id: run}, [*rows, again]),
        "altered": compare({run.id: run}, [other, second, *rest]),
        "renumbered": compare({run.id: run}, [first, again, *rest]),
        "foreign": compare({run.id: run}, [*rows, foreign]),
        "nothing": compare({run.id: run}, []),
    }
    assert {name: (tally.lost, tally.doubled, tally.altered) for name, tally in found.items()} == {
        "lost": (1, 0, 0),
        "doubled": (0, 1, 0),
        "under another number too": (0, 1, 0),
        "altered": (0, 0, 1),
        "renumbered": (1, 1, 0),
        "foreign": (0, 1, 0),
        "nothing": (6, 0, 0),
    }
    assert not any(tally.is_exact for tally in found.values())


def test_proof_needs_every_part(run: FakeRun, rows: list[Row]) -> None:
    """I5: the demo's proof holds only with exact rows, complete runs, kills in mid-stream and a worker that drained."""
    tally, stored = compare({run.id: run}, rows), {run.id: StoredRun("complete", 6, 6, is_settled=True)}
    hit = Kill(1, 4, {run.id: 4})

    def holds(**other: object) -> bool:
        parts = {"stored": stored, "tally": tally, "kills": [hit], "exit_code": 0} | other
        return Outcome(runs={run.id: run}, **parts).holds  # type: ignore[arg-type]

    assert holds()
    assert not holds(tally=compare({run.id: run}, rows[1:]))
    assert not holds(stored={run.id: StoredRun("following", 6, 6, is_settled=False)})
    assert not holds(stored={run.id: StoredRun("complete", 7, 6, is_settled=True)})
    assert not holds(stored={})
    assert not holds(kills=[hit, Kill(2, 6, {run.id: 6})])
    assert not holds(kills=[Kill(2, 6, {})])
    assert not holds(exit_code=1)
