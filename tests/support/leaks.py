"""No test may print a key or leave one behind: what every test of the suite says and writes is searched (I10).

tests/conftest.py does it after each test. All keys and passwords the tests make up begin alike, so that one search
finds them all.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MARK = "sk-never-to-be-seen"
INPUTS = {"config.toml", "key", "letta_api_key"}
"""Files in which a test hands a key to the worker, as an operator would."""


def leaks_of(item: pytest.Item, report: pytest.TestReport) -> list[str]:
    """Where a key is in what this test printed, logged or wrote into its own folder."""
    found = [title for title, text in report.sections if MARK in text]
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    return found + [str(path) for path in files_with(MARK.encode(), [] if folder is None else folder.rglob("*"))]


def files_with(mark: bytes, paths: Iterable[Path]) -> Iterator[Path]:
    """The files that hold these bytes."""
    for path in paths:
        if path.name not in INPUTS and path.is_file() and not path.is_symlink() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(mark) >= 0:
                    yield path


def fail_on_leaks(item: pytest.Item, report: pytest.TestReport) -> None:
    """Make the test's last report a failure that says where."""
    if report.when == "teardown" and (found := leaks_of(item, report)):
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr or ''}\na key ({MARK}...) is in: {', '.join(found)}"
