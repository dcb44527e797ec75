"""core/messages.py: what the chunks of a run say, and whether the server's messages say the same."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.core.messages import Assembly, Message, compare
from worker.core.records import MessageRecord


def delta(message_id: str = "message-1", kind: str = "assistant_message", otid: str | None = None, **said: Any) -> str:
    """The payload of one chunk."""
    return json.dumps({"id": message_id, "message_type": kind, "otid": otid, "run_id": "run-1", **said})


def assembled(*payloads: str, keeps_texts: bool = True) -> list[Message]:
    """The messages of these payloads, numbered from 1."""
    assembly = Assembly(keeps_texts=keeps_texts)
    for seq_id, payload in enumerate(payloads, start=1):
        assembly.add(seq_id, payload)
    return assembly.messages()


def listed(payload: str) -> MessageRecord:
    """A message as REST lists it."""
    fields = json.loads(payload)
    return MessageRecord(fields["id"], payload, fields["message_type"], fields.get("otid"))


@given(st.lists(st.text(max_size=5), min_size=1, max_size=20))
def test_deltas_become_the_whole_text(parts: list[str]) -> None:
    """However the server cuts a text into deltas, it is put together again and agrees with the stored whole (I5)."""
    streamed = assembled(*(delta(content=part) for part in parts))
    whole = "".join(parts)
    assert [message.text for message in streamed] == [whole]
    # PostgreSQL holds no U+0000, so the server's own store has lost it (letta-protocol f).
    stored = [listed(delta(content=whole.replace("\0", "")))]
    assert compare(streamed, stored).verdict == "agrees"
    digested = assembled(*(delta(content=part) for part in parts), keeps_texts=False)
    assert compare(digested, stored).verdict == "agrees"
    assert [message.text for message in digested] == [""]
    other = [listed(delta(content=whole.replace("\0", "") + "!"))]
    assert compare(digested, other).verdict == compare(streamed, other).verdict == "differs"


def test_a_character_cut_in_two_agrees_with_the_whole_one() -> None:
    """A delta may end between the two halves of a character that JSON writes as two escapes (I5)."""
    whole = delta(content="a\U0001f600b")
    halves = [whole.replace(r"\ude00b", ""), whole.replace(r"a\ud83d", "")]
    assert compare(assembled(*halves, keeps_texts=False), [listed(whole)]).verdict == "agrees"


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_messages_stand_in_the_order_they_began(order: list[str]) -> None:
    """Interleaved messages are kept apart and stand where their first chunk stood (I5)."""
    streamed = assembled(*(delta(f"message-{letter}", content=letter) for letter in order))
    assert [message.message_id for message in streamed] == [f"message-{letter}" for letter in dict.fromkeys(order)]
    assert [message.first_seq_id for message in streamed] == [order.index(m.message_id[-1]) + 1 for m in streamed]
    assert {m.message_id[-1]: len(m.text) for m in streamed} == {letter: order.count(letter) for letter in order}


def test_the_parts_of_one_step_are_told_apart() -> None:
    """Reasoning and reply of one step share the message id; the otid tells them apart, or the type does (I5)."""
    thought = delta(kind="reasoning_message", otid="o-0", reasoning="hm")
    answer = delta(otid="o-1", content="yes")
    assert [m.text for m in assembled(thought, answer, thought)] == ["hmhm", "yes"]
    bare = [delta(kind="reasoning_message", reasoning="hm"), delta(content="yes")]
    assert [m.text for m in assembled(*bare)] == ["hm", "yes"]


def test_a_tool_call_is_read_as_one() -> None:
    """The name and the arguments of a tool call come as deltas too, and are shown as a call (I5)."""
    deltas = [
        delta(kind="tool_call_message", tool_call={"name": "look", "arguments": '{"at'}),
        delta(kind="tool_call_message", tool_call={"name": None, "arguments": '":1}'}),
    ]
    (call,) = assembled(*deltas)
    assert (call.tool_name, call.tool_arguments, call.as_said) == ("look", '{"at":1}', 'look({"at":1})')
    whole = delta(kind="tool_call_message", tool_call={"name": "look", "arguments": '{"at":1}'})
    assert compare([call], [listed(whole)]).verdict == "agrees"
    other = delta(kind="tool_call_message", tool_call={"name": "look", "arguments": '{"at":2}'})
    assert compare([call], [listed(other)]).differences == [
        "tool_call_message message-1: its tool arguments differs from the stored one"
    ]


def test_what_is_never_streamed_is_not_missed() -> None:
    """The user's prompt is only listed, pings and statistics are only streamed: neither is a difference (I5)."""
    prompt = listed(delta("message-0", "user_message", content="hi"))
    answer = delta(content="yes")
    ping, usage = delta("ping-1", "ping"), json.dumps({"message_type": "usage_statistics", "id": None})
    assert compare(assembled(ping, answer, usage), [prompt, listed(answer)]).verdict == "agrees"


def test_every_kind_of_difference_is_named() -> None:
    """A message only streamed, only stored, or stored with another text each makes the verdict `differs` (I5)."""
    streamed = assembled(delta("message-1", content="one"), delta("message-2", content="two"))
    stored = [listed(delta("message-2", content="TWO")), listed(delta("message-3", content="three"))]
    found = compare(streamed, stored)
    assert found.verdict == "differs"
    assert found.differences == [
        "assistant_message message-1 was streamed, but is not stored",
        "assistant_message message-2: its text differs from the stored one",
        "assistant_message message-3 is stored, but was not streamed",
    ]


def test_without_stored_messages_there_is_no_verdict_on_them() -> None:
    """A cancelled or failed run has no stored messages: unmatched, not different (I5)."""
    assert compare(assembled(delta(content="one")), []).verdict == "unmatched"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("id", "message_type", "otid", "content", "reasoning", "tool_return", "tool_call")
KINDS = st.sampled_from(["assistant_message", "tool_call_message", "ping"])


@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON | KINDS)) | JSON, max_size=5))
def test_no_payload_stops_it(values: list[Any]) -> None:
    """Whatever JSON a payload holds, assembling it raises nothing and gives text that a database takes (I6)."""
    payloads = [json.dumps(value) for value in values]
    streamed = assembled(*payloads, "no JSON", "[" * 100_000, '{"id":"\\ud800","message_type":"assistant_message"}')
    stored = [MessageRecord("message-1", payload) for payload in payloads]
    assert compare(streamed, stored).verdict in {"agrees", "differs", "unmatched"}
    for message in streamed:
        assert "\0" not in message.as_said
        message.as_said.encode()
