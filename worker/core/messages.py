"""Chunks of a run -> messages, and whether they say the same as the messages REST lists.

All chunks of one message share its id and otid; text and tool arguments come as deltas (letta-protocol f). Used by
follower.py when a run is over and by verify.py; letta/answers.py reads the text of listed messages by the same rule.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
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
MAX_DIFFERENCES = 10
CHARS_DIGESTED_AT_ONCE = 4096


class Message(msgspec.Struct, frozen=True):
    """One message as its chunks say it: text, or the name and the arguments of a tool call.

    Where the assembly keeps no texts, `text` and `tool_arguments` are empty, and only their digests tell what was said.
    """

    message_id: str
    message_type: str
    otid: str | None = None
    first_seq_id: int = 0
    text: str = ""
    text_digest: str = ""
    tool_name: str = ""
    tool_arguments: str = ""
    tool_arguments_digest: str = ""

    @property
    def as_said(self) -> str:
        """What a reader of the conversation is shown, as a database can hold it."""
        return storable(f"{self.tool_name}({self.tool_arguments})" if self.tool_name else self.text)


class Comparison(msgspec.Struct, frozen=True):
    """The verdict, and the first differences in words."""

    verdict: Verdict
    differences: Sequence[str] = ()


class Assembly:
    """Puts the messages of one run together; add its payloads in the order of their numbers.

    With `keeps_texts` they can be read; without, a message costs the same however long it is, and can be compared.
    """

    def __init__(self, *, keeps_texts: bool) -> None:
        self._keeps_texts = keeps_texts
        self._messages: dict[tuple[str, str], _Parts] = {}

    def add(self, seq_id: int, payload: str) -> None:
        """Take in one chunk. What belongs to no message, or cannot be read, is passed over."""
        body = _read(payload)
        if type(body.id) is not str or _string(body.message_type) not in STREAMED_TYPES:
            return
        key = body.id, _string(body.otid) or body.message_type
        parts = self._messages.get(key)
        if parts is None:
            parts = self._messages[key] = _Parts(seq_id, body, keeps_texts=self._keeps_texts)
        parts.add(body)

    def messages(self) -> list[Message]:
        """The messages so far, in the order of their first chunks."""
        return [parts.joined() for parts in self._messages.values()]


def compare(streamed: Sequence[Message], stored: Sequence[MessageRecord]) -> Comparison:
    """Hold what was streamed against what the server stored of a complete run."""
    if not stored:
        return Comparison("unmatched")
    listed = {_key_of(message): message for message in map(_message_of, stored) if message is not None}
    differences = []
    for message in streamed:
        other = listed.pop(_key_of(message), None)
        if other is None:
            differences.append(f"{message.message_type} {message.message_id} was streamed, but is not stored")
        else:
            differences += _differences(message, other)
    differences += [f"{m.message_type} {m.message_id} is stored, but was not streamed" for m in listed.values()]
    return Comparison("differs" if differences else "agrees", differences[:MAX_DIFFERENCES])


def text_of(fields: Mapping[str, Any]) -> str | None:
    """What a message, or one chunk of it, says; None when that is nothing."""
    for name in _TEXTS:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):  # content parts
            texts = [part.get("text") for part in value if isinstance(part, dict)]
            return "".join(text for text in texts if isinstance(text, str))
    call = fields.get("tool_call")
    return f"{_string(call.get('name'))}({_string(call.get('arguments'))})" if isinstance(call, dict) else None


def storable(text: str) -> str:
    """Text as a database column can hold it; payloads keep the original."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


_TEXTS = ("content", "reasoning", "tool_return")
_COMPARED = {
    "message type": "message_type",
    "text": "text_digest",
    "tool name": "tool_name",
    "tool arguments": "tool_arguments_digest",
}


class _Body(msgspec.Struct, gc=False):
    """The fields of a payload that say something; the rest is skipped, not decoded."""

    message_type: Any = None
    id: Any = None
    otid: Any = None
    content: Any = None
    reasoning: Any = None
    tool_return: Any = None
    tool_call: Any = None


_decode_body = msgspec.json.Decoder(_Body).decode


class _Parts:
    """A message while its chunks come in."""

    def __init__(self, seq_id: int, first: _Body, *, keeps_texts: bool) -> None:
        self._message = Message(first.id, first.message_type, _string(first.otid) or None, seq_id)
        self._text = _Said(keeps_texts=keeps_texts)
        self._arguments = _Said(keeps_texts=keeps_texts)
        self._names: list[str] = []

    def add(self, body: _Body) -> None:
        if isinstance(body.tool_call, dict):
            self._names.append(_string(body.tool_call.get("name")))
            self._arguments.add(_string(body.tool_call.get("arguments")))
        elif type(body.content) is str:
            self._text.add(body.content)
        else:
            self._text.add(text_of({name: getattr(body, name) for name in _TEXTS}) or "")

    def joined(self) -> Message:
        return msgspec.structs.replace(
            self._message,
            text=self._text.text,
            text_digest=self._text.digest,
            tool_name="".join(self._names),
            tool_arguments=self._arguments.text,
            tool_arguments_digest=self._arguments.digest,
        )


class _Said:
    """A text that comes in parts."""

    def __init__(self, *, keeps_texts: bool) -> None:
        self._kept: list[str] | None = [] if keeps_texts else None
        self._undigested: list[str] = []
        self._undigested_chars = 0
        self._hash = hashlib.sha256()

    def add(self, part: str) -> None:
        if self._kept is not None:
            self._kept.append(part)
        self._undigested.append(part)
        self._undigested_chars += len(part)
        if self._undigested_chars >= CHARS_DIGESTED_AT_ONCE:
            self._digest()

    @property
    def text(self) -> str:
        return "".join(self._kept or ())

    @property
    def digest(self) -> str:
        self._digest()
        return self._hash.hexdigest()

    def _digest(self) -> None:
        # The server drops U+0000 when it stores (letta-protocol f). In UTF-16 it does not matter whether a character
        # comes whole or in two halves.
        said = "".join(self._undigested).replace("\x00", "")
        self._hash.update(said.encode("utf-16-le", "surrogatepass"))
        self._undigested.clear()
        self._undigested_chars = 0


def _message_of(record: MessageRecord) -> Message | None:
    """A listed message as one that was streamed; None for what is never streamed."""
    assembly = Assembly(keeps_texts=False)
    assembly.add(0, record.payload)
    return next(iter(assembly.messages()), None)


def _key_of(message: Message) -> tuple[str, str]:
    return message.message_id, message.otid or message.message_type


def _differences(streamed: Message, stored: Message) -> list[str]:
    return [
        f"{streamed.message_type} {streamed.message_id}: its {what} differs from the stored one"
        for what, name in _COMPARED.items()
        if getattr(streamed, name).replace("\x00", "") != getattr(stored, name).replace("\x00", "")
    ]


def _string(value: object) -> str:
    return value if type(value) is str else ""


def _read(payload: str) -> _Body:
    try:
        return _decode_body(payload)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:  # the standard library also reads lone surrogates and NaN, which chunks.py lets through
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return _Body()
    return (
        _Body(**{name: fields.get(name) for name in _Body.__struct_fields__}) if isinstance(fields, dict) else _Body()
    )
