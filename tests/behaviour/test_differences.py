"""The known differences between FakeLetta and the real server are still some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.behaviour.differences import KNOWN_DIFFERENCES, Difference

if TYPE_CHECKING:
    import httpx

    from tests.behaviour.server import LettaUnderTest


@pytest.mark.parametrize("difference", KNOWN_DIFFERENCES, ids=lambda difference: difference.ask.__name__)
async def test_known_difference(letta: LettaUnderTest, client: httpx.AsyncClient, difference: Difference) -> None:
    """Each of the two servers answers as the list says, and not as the other one does."""
    assert difference.fake != difference.real
    assert await difference.ask(letta, client) == letta.own_answer(difference)
