"""A snapshot in words: every text of the status page, ready to be put into it. Pure. Used by html.py and routes.py.

The page is rendered from it once, and the page's script is sent it again every tick: neither computes anything.
"""

import datetime as dt
import math
from urllib.parse import quote

import msgspec

from worker.logs import Trouble, shown
from worker.page.snapshot import Snapshot
from worker.status import SHOWN_RUNS, FollowedRun
from worker.storage.tables import UNFINISHED_STATES
from worker.storage.transcripts import Told

ID_CHARS = 200
WORDS_CHARS = 500
SOON_SECONDS = 30 * 60.0
"""A stream that is dropped so soon is worth a look."""


class Cell(msgspec.Struct, frozen=True):
    """A text; where it leads to; and its tone: `good`, `bad`, `warn` or none."""

    text: str
    href: str = ""
    tone: str = ""


class Figure(msgspec.Struct, frozen=True):
    """A number with its name, and what else there is to say of it."""

    label: str
    value: str
    note: str
    tone: str = ""


class View(msgspec.Struct, frozen=True):
    """The whole page. `state` is starting, ready, degraded or stuck; `reasons` say why."""

    state: str
    headline: str
    reasons: list[str]
    at: str
    figures: list[Figure]
    followed: list[list[Cell]]
    followed_note: str
    newest: list[list[Cell]]
    logged: list[list[Cell]]


TONES = {
    "complete": "good",
    "following": "",
    "differs": "bad",
    "partial": "bad",
    "nothing": "bad",
    "messages only": "warn",
}
"""Of a run's completeness."""


def view(snapshot: Snapshot, *, with_transcripts: bool) -> View:
    """What the page says."""
    state = _state(snapshot)
    headline = {
        "starting": "Starting: the server's runs are listed for the first time.",
        "ready": "Ready: the Letta server and the database work.",
        "degraded": f"Degraded: {' and '.join(snapshot.troubles)} in trouble. It goes on by itself as soon as it can.",
        "stuck": f"Stuck: {' and '.join(snapshot.stuck)} should move and does not.",
    }[state]
    status = snapshot.status
    unfinished = sum(status.runs.get(name, 0) for name in UNFINISHED_STATES) if status is not None else 0
    followed = status.unfinished if status is not None else []
    return View(
        state=state,
        headline=headline,
        reasons=[words(f"{name}: {reason}") for name, reason in snapshot.troubles.items()],
        at=f"{snapshot.at:%Y-%m-%d %H:%M:%S} UTC",
        figures=_figures(snapshot),
        followed=[_followed(run, with_transcripts=with_transcripts) for run in followed],
        followed_note=_followed_note(len(followed), unfinished),
        newest=[_newest(run, snapshot.at, with_transcripts=with_transcripts) for run in snapshot.newest],
        logged=[_logged(trouble) for trouble in snapshot.logged],
    )


def _state(snapshot: Snapshot) -> str:
    if snapshot.stuck:
        return "stuck"
    if snapshot.is_starting and snapshot.troubles.keys() <= {"letta"}:
        return "starting"
    return "degraded" if snapshot.troubles else "ready"


def _figures(snapshot: Snapshot) -> list[Figure]:
    now, own, status = snapshot.at.timestamp(), snapshot.figures, snapshot.status
    left = None if own.expires_at is None else own.expires_at - now
    streams, followers = own.followers["reading"], sum(own.followers.values())
    others = [f"{count} {state}" for state, count in own.followers.items() if count and state != "reading"]
    listed = "never" if own.discovery_at is None else f"{duration(now - own.discovery_at)} ago"
    committed = "never" if own.commit_at is None else f"{duration(now - own.commit_at)} ago"
    shown_figures = [
        Figure(
            "Streams open", f"{streams}", ", ".join(others) or ("all followed" if followers else "nothing to follow")
        ),
        Figure(
            "Lag",
            _lag(own.lag_half),
            f"or less for half, {_lag(own.lag_most)} for 99 of 100: receipt to commit, since the start",
        ),
        Figure("Waiting for commit", f"{own.waiting_chunks}", f"chunks, {amount(own.waiting_bytes)}"),
        Figure("Last commit", committed, f"{own.chunks:,} chunks stored since the start"),
        Figure("Runs last listed", listed, "", "" if own.discovery_at is not None else "warn"),
        Figure(
            "Nearest expiry",
            "none" if left is None else f"in {duration(left)}",
            "then the server drops that run's stream",
            "warn" if left is not None and left < SOON_SECONDS else "",
        ),
    ]
    if status is not None:
        shown_figures += [
            Figure(
                "Open gaps",
                f"{status.open_gaps:,}",
                f"{own.gaps:,} found since the start",
                "warn" if status.open_gaps else "good",
            ),
            Figure("Rejects", f"{status.rejects:,}", "events kept as bytes", "warn" if status.rejects else "good"),
            Figure(
                "Runs stored",
                f"{sum(status.runs.values()):,}",
                ", ".join(f"{count:,} {state}" for state, count in sorted(status.runs.items())),
            ),
            Figure("Chunks stored", f"{status.chunks:,}", f"as of {status.at:%H:%M:%S} UTC"),
        ]
    return [
        *shown_figures,
        Figure("Received", amount(own.received_bytes), f"{own.duplicates:,} chunks sent twice, which is normal"),
        Figure(
            "Reconnects", f"{own.reconnects:,}", f"in {duration((snapshot.at - snapshot.started_at).total_seconds())}"
        ),
    ]


def _followed(run: FollowedRun, *, with_transcripts: bool) -> list[Cell]:
    last = "-" if run.last_chunk_seconds_ago is None else f"{duration(run.last_chunk_seconds_ago)} ago"
    tone = "warn" if run.seconds_to_expiry < SOON_SECONDS else ""
    return [
        Cell(name(run.run_id)),
        _conversation(run.conversation_id, run.run_id, with_transcripts=with_transcripts),
        Cell(name(run.state)),
        Cell(name(run.status)),
        Cell(f"{run.cursor:,}"),
        Cell(last),
        Cell(duration(run.seconds_to_expiry), tone=tone),
    ]


def _followed_note(count: int, unfinished: int) -> str:
    if not unfinished:
        return "No run is unfinished."
    if count < unfinished:
        return f"{count} of {unfinished:,} unfinished runs: those of the last three hours, at most {SHOWN_RUNS}."
    return "Every unfinished run; the one that expires first comes first."


def _newest(run: Told, now: dt.datetime, *, with_transcripts: bool) -> list[Cell]:
    return [
        Cell(name(run.run_id)),
        _conversation(run.conversation, run.run_id, with_transcripts=with_transcripts),
        Cell(f"{duration((now - run.created_at).total_seconds())} ago"),
        Cell(name(run.status)),
        Cell(f"{run.chunk_count:,}"),
        Cell(run.completeness, tone=TONES[run.completeness]),
        Cell(words(run.missing or run.error or "")),
    ]


def _logged(trouble: Trouble) -> list[Cell]:
    told = ", ".join(f"{key}: {value}" for key, value in trouble.fields.items())
    tone = "warn" if trouble.level == "warning" else "bad"
    return [
        Cell(f"{trouble.at:%m-%d %H:%M:%S} UTC"),
        Cell(trouble.level, tone=tone),
        Cell(trouble.event),
        Cell(words(told)),
    ]


def _conversation(conversation: str | None, run_id: str, *, with_transcripts: bool) -> Cell:
    if conversation is None:
        return Cell("(agent-direct)")
    return Cell(name(conversation), transcript_path(conversation, run_id) if with_transcripts else "")


def transcript_path(conversation: str, run_id: str | None = None, after: int | None = None) -> str:
    """Where a conversation is read; from this run, and after this position in it."""
    path = f"/conversations/{quote(conversation, safe='')}"
    if run_id is None:
        return path
    return f"{path}?run={quote(run_id, safe='')}" + (f"&after={after}" if after is not None else "")


def name(text: str | None) -> str:
    """An id or a word of the server's, however long, with what would disturb the text around it spelt out."""
    return "-" if text is None else _cut(shown(text[:ID_CHARS]), len(text) > ID_CHARS)


def words(text: str) -> str:
    """The same for a sentence."""
    return _cut(shown(text[:WORDS_CHARS]), len(text) > WORDS_CHARS)


def _cut(text: str, is_cut: bool) -> str:  # noqa: FBT001
    return f"{text}…" if is_cut else text


def duration(seconds: float) -> str:
    """Seconds as a person says it; what is past has none left."""
    seconds = max(0.0, seconds)
    if seconds < 120:  # noqa: PLR2004
        return f"{math.floor(seconds)} s"
    hours, minutes = divmod(math.floor(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def amount(count: float) -> str:
    """Bytes as a person says it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _lag(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if math.isinf(seconds):
        return "over a minute"
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"
