"""core/soundness.py: what is stored of a run is sound exactly if a plain reading of I1, I2 and I5 says so."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.soundness import faults_of


@dataclass(frozen=True)
class Row:
    """A stored chunk."""

    seq_id: int
    payload: str
    seq_source: str = "wire"


@dataclass(frozen=True)
class Gap:
    """A stored gap."""

    first_seq_id: int
    last_seq_id: int | None


def row(seq_id: int) -> Row:
    """A row as it should be."""
    return Row(seq_id, json.dumps({"message_type": "assistant_message", "seq_id": seq_id, "run_id": "run-1"}))


def faults(
    rows: list[Row], *, state: str = "following", cursor: int, count: int | None = None, gaps: tuple[Gap, ...] = ()
) -> list[str]:
    """The faults of a run; its count is right unless given."""
    counted = sum(r.seq_id <= cursor for r in rows) if count is None else count
    return faults_of("run-1", state=state, cursor=cursor, chunk_count=counted, chunks=rows, open_gaps=gaps)


SMALL = st.integers(1, 12)


@given(st.sets(SMALL), st.integers(0, 12), st.lists(st.tuples(SMALL, SMALL | st.none()), max_size=3))
def test_holes_are_found_by_number(numbers: set[int], cursor: int, ranges: list[tuple[int, int | None]]) -> None:
    """A number up to the cursor that is neither stored nor in a gap is a fault, and nothing else is (I2)."""
    gaps = tuple(Gap(first, last) for first, last in ranges if last is None or last >= first)
    explained = {n for gap in gaps for n in range(gap.first_seq_id, (gap.last_seq_id or cursor) + 1)}
    unexplained = set(range(1, cursor + 1)) - numbers - explained
    found = faults([row(n) for n in sorted(numbers)], cursor=cursor, gaps=gaps)
    assert bool(found) == bool(unexplained)
    assert all("neither stored nor a gap" in fault for fault in found)


def test_a_huge_number_costs_nothing() -> None:
    """A server that names an absurd number makes a long gap, not a large set (I8)."""
    far = 2**31 - 1
    assert faults([row(1), row(far)], cursor=far, gaps=(Gap(2, far - 1),)) == []
    assert faults([row(1), row(far)], cursor=far) == [
        f"the cursor is {far}, but 2-{far - 1} are neither stored nor a gap"
    ]


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (faults([row(1), row(2)], cursor=2, count=3), "chunk_count is 3, but 2 rows are stored up to the cursor"),
        (faults([row(0), row(1)], cursor=1), "there is a row with a number below 1"),
        (
            faults([row(1)], state="complete", cursor=1, gaps=(Gap(2, None),)),
            "called complete, but something is missing",
        ),
        (faults([row(1), row(2)], state="complete", cursor=1), "there are rows behind its last number"),
        (faults([Row(1, "no JSON")], cursor=1), "the payload of 1 is not a chunk"),
        (faults([Row(1, '{"run_id":"run-2","seq_id":1}')], cursor=1), "the payload of 1 names another run"),
        (faults([Row(1, '{"seq_id":2}')], cursor=1), "the payload of 1 (wire) carries number 2"),
        (faults([Row(1, '{"seq_id":1}', "derived")], cursor=1), "the payload of 1 (derived) carries number 1"),
    ],
)
def test_what_contradicts_itself_is_told(found: list[str], fault: str) -> None:
    """Counts, states and payloads that contradict the numbers are each named (I1, I5)."""
    assert any(fault in text for text in found), found


def test_many_holes_are_summed_up() -> None:
    """The first holes are named, the others counted: one line stays one line."""
    (fault,) = faults([row(n) for n in range(2, 21, 2)], cursor=20)
    assert fault == "the cursor is 20, but 1, 3, 5, 7, 9 and 5 more ranges are neither stored nor a gap"
