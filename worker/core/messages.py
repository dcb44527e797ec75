"""Chunks of a run -> messages, and whether they say the same as the messages REST lists. Used by follower and verify.

All chunks of one message share its id and otid; text and tool arguments come as deltas (letta-protocol f).
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from worker.core.records import MessageRecord

Verdict = Literal["agrees", "differs", "unmatched"]
"""agrees: streamed and stored say the same. differs: they do not. unmatched: REST has no messages to compare with."""

STREAMED_TYPES = frozenset(
    {
        "assistant_message",
        "reasoning_message",
        "hidden_reasoning_message",
        "tool_call_message",
        "tool_return_message",
        "approval_request_message",
    }
)
"""What is both streamed and stored; prompts are only stored, pings and statistics only streamed."""


class Message(msgspec.Struct):
    """One message put together from its chunks."""

    message_id: str
    message_type: str
    otid: str | None
    first_seq_id: int
    text: str = ""
    tool_name: str = ""
    tool_arguments: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """The verdict, and the first differences in words."""

    verdict: Verdict
    differences: Sequence[str] = ()


def assemble(payloads: Iterable[tuple[int, str]]) -> list[Message]:
    """Put messages together from a run's (seq_id, payload) pairs, in the order of their first chunks."""
    messages: dict[tuple[str, str], Message] = {}
    for seq_id, payload in payloads:
        fields = _fields(payload)
        message_id, message_type = fields.get("id"), fields.get("message_type")
        if message_type not in STREAMED_TYPES or not isinstance(message_id, str):
            continue
        otid = fields.get("otid")
        new = Message(message_id, message_type, otid if isinstance(otid, str) else None, seq_id)
        _add(messages.setdefault(_key(new.message_id, new.otid, new.message_type), new), fields)
    return list(messages.values())


def compare(assembled: Sequence[Message], stored: Sequence[MessageRecord]) -> Comparison:
    """Hold what was streamed against what the server stored of a complete run."""
    if not stored:
        return Comparison("unmatched")
    listed = {
        _key(record.message_id, record.otid, record.message_type or ""): _read(record)
        for record in stored
        if record.message_type in STREAMED_TYPES
    }
    differences = []
    for message in assembled:
        other = listed.pop(_key(message.message_id, message.otid, message.message_type), None)
        if other is None:
            differences.append(f"{message.message_type} {message.message_id} was streamed, but is not stored")
        else:
            differences += _differences(message, other)
    differences += [f"{m.message_type} {m.message_id} is stored, but was not streamed" for m in listed.values()]
    return Comparison("differs" if differences else "agrees", differences[:10])


def _differences(streamed: Message, stored: Message) -> list[str]:
    return [
        f"{streamed.message_type} {streamed.message_id}: its {name.replace('_', ' ')} differs from the stored one"
        for name in ("message_type", "text", "tool_name", "tool_arguments")
        # The server drops U+0000 when it stores (letta-protocol f).
        if getattr(streamed, name).replace("\x00", "") != getattr(stored, name).replace("\x00", "")
    ]


def _read(record: MessageRecord) -> Message:
    message = Message(record.message_id, record.message_type or "", record.otid, 0)
    _add(message, _fields(record.payload))
    return message


def _key(message_id: str, otid: str | None, message_type: str) -> tuple[str, str]:
    return message_id, otid or message_type


def _add(message: Message, fields: dict[str, Any]) -> None:
    message.text += _text(fields)
    call = fields.get("tool_call")
    if isinstance(call, dict):
        message.tool_name += call.get("name") or ""
        message.tool_arguments += call.get("arguments") or ""


def _text(fields: dict[str, Any]) -> str:
    for name in ("content", "reasoning", "tool_return"):
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):  # content parts
            return "".join(
                part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
    return ""


def _fields(payload: str) -> dict[str, Any]:
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
