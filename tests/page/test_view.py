"""Figures in words, and what is kept of the log for the page: pure, so checked at their edges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import structlog

from worker.logs import KEPT_CHARS, KEPT_TROUBLES, Troubles, set_up_logging
from worker.metrics import Metrics
from worker.page.snapshot import bound, figures
from worker.page.view import amount, duration, name, words

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """Leave the process's logging as it was."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "59 min"),
        (3600, "1 h 0 min"),
        (10799, "2 h 59 min"),
        (86_400, "1 d 0 h"),
        (1e6, "11 d 13 h"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    """A duration never says more than is left, and a past one nothing."""
    assert duration(seconds) == said


def test_amount() -> None:
    """Bytes grow through their units."""
    assert [amount(count) for count in (0, 999, 1000, 2.5e6, 7e9, 1.5e12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "2 MB",
        "7 GB",
        "1.5 TB",
    ]


def test_lag_is_the_histograms() -> None:
    """Half and 99 of 100 of the observations are below what is said; without any nothing is said."""
    metrics = Metrics()
    assert (figures(metrics).lag_half, figures(metrics).lag_most) == (None, None)
    for seconds in [0.0009] * 60 + [0.09] * 39 + [1000.0]:
        metrics.lag_seconds.observe(seconds)
    assert (figures(metrics).lag_half, figures(metrics).lag_most) == (0.001, 0.1)
    metrics.lag_seconds.observe(1000.0)
    assert figures(metrics).lag_most == math.inf
    assert bound({}, 0.5) is None


def test_long_words_are_cut() -> None:
    """I8: an id or a reason without end takes no page over, and what turns text around is spelt out."""
    assert name("x" * 1000) == "x" * 200 + "…"
    assert words("x" * 1000) == "x" * 500 + "…"
    assert name("\u202egnp") == "\\x202egnp"
    assert name(None) == "-"


def test_log_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """I8: the last warnings and errors are kept, bounded in number and length, also those the level does not write."""
    troubles = Troubles()
    log = set_up_logging("error", "json", troubles).bind(run_id="run-1")
    log.info("run.following")
    for number in range(100):
        log.warning("run.gap_found", number=number, error="x" * 10_000)
    log.error("worker.task_failed", exc_info=ValueError("what is in a traceback stays there"))

    kept = troubles.newest()

    assert len(kept) == KEPT_TROUBLES
    assert (kept[0].level, kept[0].event, kept[0].fields) == ("error", "worker.task_failed", {"run_id": "run-1"})
    assert [trouble.fields["number"] for trouble in kept[1:4]] == ["99", "98", "97"]
    assert {len(trouble.fields["error"]) for trouble in kept[1:]} == {KEPT_CHARS}
    assert "gap_found" not in capsys.readouterr().err
