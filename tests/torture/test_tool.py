"""The campaign's own parts: its plan is repeatable, what does not happen fails it, and its chart hides nothing."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.torture.faults import ANYWHERE, ON_POSTGRESQL, Fault, inflict, plan
from tests.torture.figures import Figures, Kill, Point, chart

if TYPE_CHECKING:
    from tests.torture.campaign import Campaign


class Audience:
    """As much of a campaign as a fault that never happens needs."""

    def __init__(self) -> None:
        self.figures = Figures("sqlite", 1)
        self.checks = 0

    async def check(self) -> None:
        """Count."""
        self.checks += 1


def test_plan_has_everything_and_is_repeatable() -> None:
    """Every kind of fault comes once before any comes again, and the same seed gives the same plan."""
    first, second = (list(itertools.islice(plan(random.Random(7), is_server=True), 200)) for _ in range(2))
    assert first == second
    everything = {*ANYWHERE, *ON_POSTGRESQL}
    assert set(first[: len(everything)]) == everything


async def test_fault_that_does_not_happen_fails() -> None:
    """A fault that never fires fails the campaign; one that misses is tried again, and counted once."""
    audience: Any = Audience()
    outcomes = [False, True]

    async def sometimes(_: Campaign) -> bool:
        return outcomes.pop(0) if outcomes else False

    await inflict(audience, Fault("sometimes", 1, sometimes))
    assert (audience.figures.fired, audience.checks) == ({"sometimes": 1}, 2)
    with pytest.raises(AssertionError, match=r"sometimes: .* did not happen"):
        await inflict(audience, Fault("sometimes", 1, sometimes))


def test_chart_and_table_show_damage() -> None:
    """What was lost, doubled or altered is in the chart, as a line and as a number, and in the table."""
    figures = Figures("sqlite", 1, lost=3, altered=1, restart_seconds=[0.5, 1.5])
    figures.kills = [
        Kill("at any moment", 1.0, None, is_mid_write=True),
        Kill("in COMMIT: x", 2.0, "gone", is_mid_write=True),
    ]
    figures.points = [Point(10.0, 30, 1000, 0, 0, 0), Point(20.0, 80, 2000, 3, 0, 1)]
    drawn = ET.fromstring(chart([figures, figures]))
    words = ["".join(element.itertext()) for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("lost, doubled or altered: 4") == 2
    lines = [element.get("points", "").split() for element in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    heights = {tuple(point.split(",")[1] for point in line) for line in lines}
    assert len(heights) == 3, "kills, chunks and damage are three different lines"
    text = figures.as_text()
    assert "3 lost, 0 doubled, 1 altered" in text
    assert "100% mid-write" in text
    assert "1 gone" in text
