"""The reference pages say what the code says: their tables are made of it (`make reference`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate import DOCS, PLACE, TABLES, generated

PAGES = [path for path in sorted(DOCS.glob("*.md")) if PLACE.search(path.read_text())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_is_what_the_code_says(path: Path) -> None:
    """A table that is made of the code is the one the code makes now; `make reference` writes it anew."""
    assert path.read_text() == generated(path.read_text())


def test_every_table_has_its_page() -> None:
    """No table is made for nobody, and each is on one page."""
    places = [found[1] for path in PAGES for found in PLACE.findall(path.read_text())]
    assert sorted(places) == sorted(TABLES)
