"""The comparison can fail: each kind of damage is counted. Needs no server, so `make test` runs it."""

import dataclasses

from tests.real_letta.comparison import Findings, compare_rows
from tests.real_letta.server_log import Row, RunLog, row_of_entry

RUN = "run-00000000-0000-4000-8000-000000000001"


def rows(*numbers: int) -> list[Row]:
    """Rows with these numbers."""
    return [Row(number, f'{{"n":{number}}}', "wire", "assistant_message", None, None) for number in numbers]


def found(stored: list[Row]) -> tuple[int, int, int]:
    """What is lost, doubled and altered, where the server has 1, 2, 3."""
    findings = Findings()
    compare_rows(findings, RUN, rows(1, 2, 3), stored)
    assert bool(findings.wrong) == ((findings.lost, findings.doubled, findings.altered) != (0, 0, 0))
    return findings.lost, findings.doubled, findings.altered


def test_damage_is_counted() -> None:
    """A missing, a made-up, a repeated and a changed row are each noticed (I1)."""
    changed = dataclasses.replace(rows(2)[0], payload='{"n": 2}')
    assert found(rows(1, 2, 3)) == (0, 0, 0)
    assert found(rows(1, 3)) == (1, 0, 0)
    assert found(rows(1, 2, 3, 4)) == (0, 1, 0)
    assert found(rows(1, 2, 2, 3)) == (0, 2, 0)
    assert found([*rows(1), changed, *rows(3)]) == (0, 0, 1)


def test_rows_follow_from_entries() -> None:
    """A numbered event gets the number and the run, an unnumbered one keeps its text, the end marker is no row (I9)."""
    numbered = row_of_entry(RUN, 7, 'data: {"message_type":"ping","seq_id":null,"run_id":null}\n\n')
    unnumbered = row_of_entry(RUN, 8, 'data: {"message_type": "stop_reason", "stop_reason": "cancelled"}\n\n')
    failure = row_of_entry(RUN, 9, 'event: error\ndata: {"message_type":"error_message","seq_id":null}\n\n')
    assert numbered is not None
    assert numbered.payload == f'{{"message_type":"ping","seq_id":7,"run_id":"{RUN}"}}'
    assert numbered.seq_source == "wire"
    assert unnumbered is not None
    assert (unnumbered.seq_source, unnumbered.payload[:3]) == ("derived", '{"m')
    assert failure is not None
    assert failure.payload == '{"message_type":"error_message","seq_id":9}'
    assert row_of_entry(RUN, 10, "data: [DONE]\n\n") is None


def test_holes_are_found() -> None:
    """The ranges missing from a log are those between its numbers (I5)."""
    assert RunLog(tuple(rows(1, 2, 3)), is_over=True).holes == []
    assert RunLog(tuple(rows(3, 4, 8)), is_over=True).holes == [(1, 2), (5, 7)]
