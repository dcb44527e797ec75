"""What can be set on FakeLetta: a server that pages otherwise, ignores run_id, or gives up on silence.

What it does as the real server does is in tests/behaviour/, where both are asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.demo.wire import in_short, probe

if TYPE_CHECKING:
    import httpx

    from worker.demo.fake_letta import FakeLetta


async def test_run_id_is_ignored(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """An older server that knows no run_id delivers the conversation's newest active run instead."""
    letta.honours_run_id = False
    conversation_id = letta.new_conversation()
    done = letta.new_run(conversation_id, pings=False)
    done.complete()
    letta.new_run(conversation_id)
    body = f'{{"run_id":"{done.id}","include_pings":false}}'

    lines = await probe(client, "POST", f"/v1/conversations/{conversation_id}/stream", body, 0.2)

    assert lines[1:] == ["ping seq=1", "end: TIMEOUT"]


async def test_silent_stream_is_cut_without_a_word(letta: FakeLetta, client: httpx.AsyncClient) -> None:
    """After max_stream_silence of nothing but pings the response just ends."""
    letta.max_stream_silence = 0.05
    run = letta.new_run(pings=False)

    lines = await probe(client, "POST", f"/v1/runs/{run.id}/stream", "{}")

    assert lines[0] == "HTTP 200 text/event-stream; charset=utf-8"
    assert set(lines[1:-1]) == {"ping seq=None"}
    assert lines[-1] == "end: EOF"


@pytest.mark.parametrize(
    ("paging", "after", "before"), [("named", [2, 3], [0]), ("ignored", [0, 1, 2, 3], [0, 1, 2, 3])]
)
async def test_other_pagings(
    client: httpx.AsyncClient, letta: FakeLetta, paging: str, after: list[int], before: list[int]
) -> None:
    """A server that pages as its parameters are named, or not at all, can be had too."""
    letta.paging = paging  # type: ignore[assignment]
    runs = [letta.new_run() for _ in range(4)]

    for cursor, expected in (("after", after), ("before", before)):
        answer = await client.get("/v1/runs/", params={"order": "asc", cursor: runs[1].id})
        assert [run["id"] for run in answer.json()] == [runs[index].id for index in expected]


def test_probe_names_what_it_sees() -> None:
    """The probe of these tests describes an event as the captures do."""
    assert in_short('event: error\ndata: {"error": "e", "code": "c"}') == (
        'event: error None seq=- {"error": "e", "code": "c"}'
    )
