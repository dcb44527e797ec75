"""What the server's answers mean: status codes -> errors by reaction, JSON -> records. Used by client.py."""

import contextlib
import datetime as dt
import json
import math
import re
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import msgspec

from worker.core.chunks import MAX_COLUMN_CHARS
from worker.core.messages import storable, text_of
from worker.core.records import MessageRecord, RunRecord
from worker.errors import (
    BadRequestError,
    NoBackgroundError,
    NotFoundError,
    NotStreamableError,
    RateLimitedError,
    RefusedError,
    RunExpiredError,
    TroubleError,
    WorkerError,
)

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec says of bytes that are no JSON; of those that are no UTF-8 it does not raise an error of its own."""
MAX_RETRY_AFTER = 3600.0
"""Seconds; a server that names more than an hour is asked again after an hour."""
MAX_DETAIL_CHARS = 500


def error_of(status: int, headers: Mapping[str, str], body: bytes, key: str = "") -> WorkerError:
    """The error a status code stands for (letta-protocol d, trap 15); its text does not hold the key."""
    detail = without_key(_detail(body), key)[:MAX_DETAIL_CHARS]
    message = f"HTTP {status}: {detail}" if detail else f"HTTP {status}"
    error: WorkerError
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        error = RefusedError(
            f"the Letta server refuses the API key ({message}): put the right one into letta.api_key or"
            " letta.api_key_file"
            if key
            else f"the Letta server wants an API key ({message}): set letta.api_key or letta.api_key_file"
        )
    elif status == HTTPStatus.NOT_FOUND and not _is_letta_own(body):
        # A proxy without its backend says 404 too, and a run must not be given up for that.
        error = TroubleError(f"{message} (not from Letta: is base_url right, and the server behind it up?)")
    elif status == HTTPStatus.NOT_FOUND:
        error = NotFoundError(message)
    elif status == HTTPStatus.GONE:
        error = RunExpiredError(message)
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        error = RateLimitedError(message)
    elif status == HTTPStatus.SERVICE_UNAVAILABLE and "requires Redis" in detail:
        error = NoBackgroundError(f"this Letta server has no background streaming: {detail}")
    elif status == HTTPStatus.BAD_REQUEST and "not created in background mode" in detail:
        error = NotStreamableError(message)
    elif (
        status >= HTTPStatus.INTERNAL_SERVER_ERROR
        or status == HTTPStatus.REQUEST_TIMEOUT
        or status < HTTPStatus.BAD_REQUEST
    ):
        error = TroubleError(message)
    else:
        error = BadRequestError(message)
    if isinstance(error, TroubleError):
        error.retry_after = _retry_after(headers.get("retry-after"))
        # These may be said of one thing, and for good: 500 is Letta's word for whatever fails inside it.
        error.is_outage = status not in {HTTPStatus.NOT_FOUND, HTTPStatus.INTERNAL_SERVER_ERROR}
    return error


def without_key(text: str, key: str) -> str:
    """What another side says; a proxy, or whatever else is there, may answer with the request it was sent (I10)."""
    return text.replace(key, "(the API key)") if key else text


def _is_letta_own(body: bytes) -> bool:
    """The answer is about the thing asked for; `Not Found` alone is any web framework's word for an unknown path."""
    try:
        answer = msgspec.json.decode(body)
    except _UNREADABLE:
        return False
    return isinstance(answer, dict) and answer.get("detail") not in {None, "", "Not Found"}


def is_event_stream(headers: Mapping[str, str]) -> bool:
    """The answer is a stream and not, say, a proxy's page."""
    return headers.get("content-type", "").split(";")[0].strip().lower() == "text/event-stream"


class RunPage(msgspec.Struct, frozen=True):
    """A page of the list of runs, newest first. `trouble`: of its `entries` one could not be read as a run.

    Whoever takes `runs` must raise it in the end: passing it over would hide a run.
    """

    runs: Sequence[RunRecord]
    entries: int
    trouble: TroubleError | None = None

    def whole(self) -> Sequence[RunRecord]:
        """The runs, for whoever has no use for a part of them. Raises the trouble."""
        if self.trouble is not None:
            raise self.trouble
        return self.runs


def read_runs(body: bytes) -> RunPage:
    """A listing. An entry without a usable id or creation time cannot be followed, and must not hide the others."""
    listed = _array(body)
    runs: list[RunRecord] = []
    trouble: TroubleError | None = None
    for raw in listed:
        try:
            runs.append(_run(_object(raw)))
        except TroubleError as error:
            trouble = error
    return RunPage(runs, len(listed), trouble)


def read_run(body: bytes) -> RunRecord:
    """One run's record."""
    return _run(_object(body))


def read_messages(body: bytes) -> list[MessageRecord]:
    """The message items of a listing, each with its payload as the server wrote it."""
    return [_message(raw, _object(raw)) for raw in _array(body)]


def read_version(body: bytes) -> str:
    """The version in the server's own description of itself."""
    return str(_object(body).get("version"))


def read_ids(body: bytes) -> list[str]:
    """The ids of a listing."""
    return [str(fields["id"]) for fields in _objects(body) if "id" in fields]


def _run(fields: dict[str, Any]) -> RunRecord:
    run_id, created_at = _text(fields.get("id")), _time(fields.get("created_at"))
    if not run_id or created_at is None:
        raise TroubleError("the server lists a run without id or created_at")
    background = fields.get("background")
    metadata = fields.get("metadata")
    return RunRecord(
        run_id=run_id,
        created_at=created_at,
        status=_text(fields.get("status")),
        conversation_id=_text(fields.get("conversation_id")),
        agent_id=_text(fields.get("agent_id")),
        background=background if isinstance(background, bool) else None,
        stop_reason=_text(fields.get("stop_reason")),
        completed_at=_time(fields.get("completed_at")),
        error=_error(metadata.get("error") if isinstance(metadata, dict) else None),
    )


def _error(value: object) -> str | None:
    """An object for a failure while streaming, a string for one at the start (letta-protocol e)."""
    if value is None:
        return None
    return storable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _message(payload: bytes, fields: dict[str, Any]) -> MessageRecord:
    message_id = _text(fields.get("id"))
    if not message_id:
        raise TroubleError("the server lists a message without id")
    text = text_of(fields)
    return MessageRecord(
        message_id=message_id,
        payload=payload.decode(),
        message_type=_text(fields.get("message_type")),
        otid=_text(fields.get("otid")),
        step_id=_text(fields.get("step_id")),
        date=_time(fields.get("date")),
        text=storable(text) if text is not None else None,
    )


def _objects(body: bytes) -> list[dict[str, Any]]:
    return [_object(raw) for raw in _array(body)]


def _array(body: bytes) -> list[bytes]:
    try:
        return [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except _UNREADABLE:
        pass
    try:
        return _array_by_standard_library(body.decode())
    except (ValueError, RecursionError) as error:
        raise TroubleError(f"the server's answer is not the JSON list it should be: {body[:100]!r}") from error


def _array_by_standard_library(text: str) -> list[bytes]:
    """The same; also reads what msgspec refuses, lone surrogates and NaN, because one entry must not hide the rest."""
    if not isinstance(json.loads(text), list):
        raise ValueError("not a list")  # noqa: TRY004 - the caller takes it for bad JSON, which it is
    decoder, place, items = json.JSONDecoder(), text.index("[") + 1, []
    while text[start := _end_of_separator(text, place)] != "]":
        _, place = decoder.raw_decode(text, start)
        items.append(text[start:place].encode())
    return items


def _end_of_separator(text: str, place: int) -> int:
    found = re.compile(r"[ \t\r\n,]*").match(text, place)
    return found.end() if found else place


def _object(raw: bytes) -> dict[str, Any]:
    fields: object = None
    try:
        fields = msgspec.json.decode(raw)
    except _UNREADABLE:
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(raw.decode())  # of bytes it would also take what is no UTF-8
    if not isinstance(fields, dict):
        raise TroubleError(f"the server sends something that is not a JSON object: {raw[:100]!r}")
    return fields


def _detail(body: bytes) -> str:
    try:
        fields = msgspec.json.decode(body)
        text = str(fields.get("detail", fields) if isinstance(fields, dict) else fields)
    except _UNREADABLE:
        text = body.decode("utf-8", "replace")
    return storable(" ".join(text.split()))  # one line, and it may become the run's stored error


def _text(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > MAX_COLUMN_CHARS:
        return None
    return value if storable(value) == value else None


def _time(value: object) -> dt.datetime | None:
    """UTC; a time without a zone is UTC too (letta-protocol e: completed_at)."""
    if not isinstance(value, str):
        return None
    try:
        time = dt.datetime.fromisoformat(value)
    except ValueError:
        return None
    try:
        return time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC)
    except OverflowError:  # at the ends of the calendar
        return None


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header is a number of seconds or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - dt.datetime.now(dt.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    if math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
