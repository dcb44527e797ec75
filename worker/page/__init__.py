"""The status page, and the transcripts where they are shown (docs/status-page.md). Built by app.py.

snapshot.py (what is so) -> view.py (in words) -> html.py (as a page); routes.py answers, access.py says to whom.
"""
