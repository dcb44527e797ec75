"""Writes the tables of docs/ that are made of the code: `make reference`. tests/test_reference.py compares.

A page has a place for each, between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from worker.observe import EVENTS, LINES_A_MINUTE

DOCS = Path(__file__).parent
PLACE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def events() -> str:
    """The log events."""
    lines = ["| event | level | fields | meaning |", "| --- | --- | --- | --- |"]
    for name, event in EVENTS.items():
        fields = ", ".join(f"`{field}`" for field in event.fields.split())
        repeated = f" (at most {LINES_A_MINUTE} a minute)" if event.is_repeated else ""
        lines.append(f"| `{name}` | {', '.join(event.levels.split())} | {fields} | {event.meaning}{repeated} |")
    return "\n".join(lines)


TABLES = {"events": events}


def generated(page: str) -> str:
    """The page with its tables as the code knows them. Raises KeyError for a table that nobody makes."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> None:
    """Write every page anew that has such a place."""
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text()
        if page != generated(page):
            path.write_text(generated(page))
            print(f"{path.name} is renewed")


if __name__ == "__main__":
    main()
