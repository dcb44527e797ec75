"""Payloads come back byte for byte, on both databases."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.storage.store import AT, accepted, known, row
from worker.core.chunks import Chunk, parse
from worker.core.records import MessageRecord
from worker.core.sse import SseEvent
from worker.storage import tables
from worker.storage.writes import RunWrite

if TYPE_CHECKING:
    from tests.storage.store import Store

STRANGE = {
    "an escaped NUL": r'{"seq_id":1,"content":"a\u0000b"}',
    "a lone surrogate, escaped": r'{"seq_id":1,"content":"\ud83d and \udc00\ud800"}',
    "separators JavaScript takes for line ends": '{"seq_id":1,"content":"a\u2028b\u2029c\u0085d"}',
    "emoji and what is above them": '{"seq_id":1,"content":"🦙👩‍👩‍👧‍👦\U0010ffff\uffff\ufeff"}',
    "characters of control": '{"seq_id":1,"content":"\x7f\x9f \\u0001\\u001b[31m"}',
    "combining marks, not normalised": '{"seq_id":1,"content":"e\u0301 \u00e9 \u212b"}',
    "white space around": '  {"seq_id" :\t1 ,  "seq_id": 1, "content" : null}   ',
    "numbers as they were written": '{"seq_id":1,"a":1e400,"b":1.0000000000000000000001,"c":-0,"d":NaN}',
    "SQL": """{"seq_id":1,"content":"'); DROP TABLE chunks; -- :c0 $1 ? %s {}"}""",
}


@pytest.mark.parametrize("name", STRANGE)
async def test_strange_payloads_are_stored_verbatim(store: Store, name: str) -> None:
    """I6: What Letta may send and a database may stumble over comes back byte for byte."""
    payload = STRANGE[name]
    chunk = parse(SseEvent(event="", data=payload.encode()))
    assert isinstance(chunk, Chunk)
    assert chunk.payload == payload
    await store.write(
        known("run-1"),
        RunWrite("run-1", AT, "following", accepted([row(1, payload)])),
        RunWrite("run-1", AT, messages=[MessageRecord("message-1", payload)]),
    )
    assert {k: v.encode() for k, v in (await store.chunks("run-1")).items()} == {1: payload.encode()}
    assert (await store.all(sa.select(tables.messages.c.payload)))[0].payload == payload


async def test_a_payload_of_ten_megabytes(store: Store) -> None:
    """I6: The largest event the worker takes is stored and comes back as it was."""
    payload = json.dumps({"seq_id": 1, "content": "🦙 and \u2028 text " * 600_000}, ensure_ascii=False)
    assert len(payload.encode()) > 10_000_000
    await store.write(known("run-1"), RunWrite("run-1", AT, "following", accepted([row(1, payload), row(2)])))
    stored = await store.chunks("run-1")
    assert hashlib.sha256(stored[1].encode()).digest() == hashlib.sha256(payload.encode()).digest()
    assert stored[2] == '{"seq_id":2}'


number = 0


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=200),
        min_size=1,
        max_size=20,
    )
)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_any_text_is_stored_verbatim(store: Store, texts: list[str]) -> None:
    """I6: Any text without NUL, which JSON cannot hold, comes back byte for byte, in its place."""
    global number  # noqa: PLW0603 - one run an example
    number += 1
    run_id = f"run-{number}"
    new = [row(seq_id, text) for seq_id, text in enumerate(texts, start=1)]
    await store.write(known(run_id), RunWrite(run_id, AT, "following", accepted(new)))
    assert await store.chunks(run_id) == dict(enumerate(texts, start=1))
