"""The pages as HTML, with every text escaped, and the policy a browser shows them under. Pure. Used by routes.py."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

from worker.page.view import TONES, Cell, Figure, View, name, transcript_path, words
from worker.storage.transcripts import Said, Told, TranscriptPage

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text()
_SCRIPT = (_FOLDER / "page.js").read_text()
_STATUS = Template((_FOLDER / "status.html").read_text())
_TRANSCRIPT = Template((_FOLDER / "transcript.html").read_text())

_FOLLOWED = ("run", "conversation", "state", "status", "cursor", "last chunk", "expires in")
_NEWEST = ("run", "conversation", "created", "status", "chunks", "completeness", "what is missing")
_LOGGED = ("when", "level", "event", "what it said")

_FIND = """<form action="/conversations"><label for="id">Open a conversation</label>
<input id="id" name="id" placeholder="conv-... or agent-..." required> <button>Open</button></form>"""


def _source(text: str) -> str:
    """How a policy names an inline style or script: by what is in it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_source(_STYLE)}",
        f"script-src {_source(_SCRIPT)}",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


def status_page(view: View, *, with_transcripts: bool) -> str:
    """The status page as it is at this moment; its script keeps it live."""
    return _STATUS.substitute(
        style=_STYLE,
        script=_SCRIPT,
        version=escape(version("letta-ingest")),
        state=view.state,
        headline=escape(view.headline),
        reasons="".join(f"<li>{escape(reason)}</li>" for reason in view.reasons),
        at=escape(view.at),
        figures="".join(map(_figure, view.figures)),
        followed=_table("followed", _FOLLOWED, view.followed),
        followed_note=escape(view.followed_note),
        newest=_table("newest", _NEWEST, view.newest),
        logged=_table("logged", _LOGGED, view.logged),
        find=_FIND if with_transcripts else "<p>Transcripts are not shown here.</p>",
    )


def transcript_page(conversation: str, page: TranscriptPage) -> str:
    """A page of a conversation, run by run, each with its verdict."""
    following = page.next
    path = transcript_path(conversation, following.run_id, following.after) if following else ""
    said = {run.run_id: [message for message in page.messages if message.run_id == run.run_id] for run in page.runs}
    return _TRANSCRIPT.substitute(
        style=_STYLE,
        conversation=escape(name(conversation)),
        beginning=escape(transcript_path(conversation)),
        runs="".join(_run(run, said[run.run_id]) for run in page.runs),
        following=f'<a href="{escape(path)}" rel="next">Read on</a>' if path else "This is the end of it.",
    )


def _figure(figure: Figure) -> str:
    return (
        f'<div class="{escape(figure.tone)}"><dt>{escape(figure.label)}</dt>'
        f"<dd>{escape(figure.value)}</dd><dd>{escape(figure.note)}</dd></div>"
    )


def _table(table_id: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in rows)
    return f'<table><thead><tr>{head}</tr></thead><tbody id="{table_id}">{body}</tbody></table>'


def _cell(column: str, cell: Cell) -> str:
    text = f'<a href="{escape(cell.href)}">{escape(cell.text)}</a>' if cell.href else escape(cell.text)
    return f'<td class="{escape(cell.tone)}" data-label="{escape(column)}">{text}</td>'


def _run(run: Told, messages: Sequence[Said]) -> str:
    reasons = [
        f"missing: {run.missing}" if run.missing else "",
        run.error or "",
        f"the server's messages: {run.verdict}" if run.verdict else "",
        run.verdict_detail or "",
    ]
    told = "".join(f"<li>{escape(words(reason))}</li>" for reason in reasons if reason)
    said = (
        "".join(map(_message, messages)) or '<p class="quiet">Nothing to read: a run is read here when it is over.</p>'
    )
    return (
        f'<section><h2>{escape(name(run.run_id))}</h2><p><b class="verdict {TONES[run.completeness]}">'
        f"{escape(run.completeness)}</b> {run.created_at:%Y-%m-%d %H:%M:%S} UTC, status {escape(name(run.status))},"
        f" {run.chunk_count:,} chunks</p><ul>{told}</ul>{said}</section>"
    )


def _message(message: Said) -> str:
    text = message.text or ""
    more = message.size - len(text)
    rest = f'<p class="quiet">{more:,} characters more: read them in the view transcript.</p>' if more > 0 else ""
    from_stream = ", from the stream" if message.source == "stream" else ""
    return (
        f'<article class="{escape(message.speaker)}"><h3>{escape(message.speaker)}'
        f" <small>{escape(name(message.message_type))}, {message.said_at:%H:%M:%S} UTC{from_stream}</small></h3>"
        f"<pre>{escape(text)}</pre>{rest}</article>"
    )
