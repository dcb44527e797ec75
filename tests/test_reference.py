"""The reference pages say what the code says: their tables are made of it (`make reference`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

from docs.generate import DOCS, PLACE, TABLES, generated
from worker.storage.tables import metadata

PAGES = [path for path in sorted(DOCS.glob("*.md")) if PLACE.search(path.read_text())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_page_is_what_the_code_says(path: Path) -> None:
    """A table that is made of the code is the one the code makes now; `make reference` writes it anew."""
    assert path.read_text() == generated(path.read_text())


def test_every_table_has_its_page() -> None:
    """No table is made for nobody, and each is on one page."""
    places = [found[1] for path in PAGES for found in PLACE.findall(path.read_text())]
    assert sorted(places) == sorted(TABLES)


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)
def test_the_schema_is_what_is_made(table: Table) -> None:
    """Each column of each table is on the page in its order, with its type, its key and whether it may be null."""
    text = (DOCS / "schema.md").read_text().split(f"\n## {table.name}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    said = [row[:3] for row in rows]
    dialect = postgresql.dialect()
    assert said == [
        [
            f"`{column.name}`{' *' if column.primary_key else ''}",
            column.type.compile(dialect),
            "null" if column.nullable else "",
        ]
        for column in table.columns
    ]
    assert all(row[3] for row in rows)


def test_the_schema_page_knows_no_other_table() -> None:
    """A table that is gone is gone from the page."""
    headings = set(re.findall(r"^## (.+)$", (DOCS / "schema.md").read_text(), re.MULTILINE))
    assert headings == {*metadata.tables, "Views"}


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to every page, and to none that is not there."""
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("path", [*sorted(DOCS.glob("*.md")), *sorted(DOCS.parent.glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    """What a page links to is there, the heading too."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)):
        if ":" in target:
            continue
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name} links to {target}"
        assert not heading or heading in anchors(page), f"{path.name} links to {target}#{heading}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
