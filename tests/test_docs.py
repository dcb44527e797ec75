"""The documentation tells the truth about the tests: every quirk has its proof, and what a page names is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from tests.behaviour.differences import KNOWN_DIFFERENCES

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "quirks.md").read_text()
HEADINGS = {"Quirk", "Trap", "The real server"}
NODE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows_of(text: str, columns: int) -> list[list[str]]:
    """The rows of all tables with so many columns."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and row[0] not in HEADINGS]


@functools.cache
def functions_in(file: str) -> set[str]:
    """The names of a file's functions."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_page_is_complete() -> None:
    """All sections and traps of the protocol page are there, and no cell is empty."""
    numbers = [row[0].split(" ")[0] for row in rows_of(PAGE.partition("## Traps")[2], columns=4)]

    assert re.findall(r"^## ([a-j](?:, [a-j])*)\b", PAGE, re.MULTILINE) == [*"abcdefg", "h, i", "j"]
    assert numbers == [str(number) for number in range(1, 19)]
    assert [row for row in rows_of(PAGE, columns=4) if not all(row)] == []
    assert {line.count("|") for line in PAGE.splitlines() if line.startswith("|")} == {4, 5}


def test_the_proof_is_there() -> None:
    """Every test that is named exists, in the last column one of the real server; where none is, why not is said."""
    for quirk, _, fake, real in rows_of(PAGE, columns=4):
        for file, name in NODE.findall(fake + real):
            assert name in functions_in(file), f"{file}::{name}"
        assert NODE.search(fake) or fake.startswith("nothing to prove: "), quirk
        assert NODE.search(real) or real.startswith("cannot be "), quirk
        assert all(file.startswith(("behaviour/", "real_letta/")) for file, _ in NODE.findall(real)), quirk


def test_the_tests_of_reliability_are_there() -> None:
    """Every test that docs/reliability.md names exists; `::name` is in the file that was named last."""
    file, count = "", 0
    text = (TESTS.parent / "docs" / "reliability.md").read_text()
    for named, name in re.findall(r"`(?:tests/([\w/]+\.py))?(?:::(\w+)(?:\[\w+\])?)?`", text):
        file = named or file
        if name:
            count += 1
            assert name in functions_in(file), f"{file}::{name}"
    assert count > 50


def test_known_differences_are_shown() -> None:
    """The page shows where FakeLetta differs, all of it and nothing else."""
    known = [[known.real_does, known.fake_does, known.reason] for known in KNOWN_DIFFERENCES]
    assert rows_of(PAGE, columns=3) == known
