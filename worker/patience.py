"""How long the worker waits, and how it waits for a server in trouble. Used by follower, discovery and backfill."""

from collections.abc import Callable

import msgspec
import tenacity
from tenacity import wait_exponential, wait_random, wait_random_exponential

from worker.errors import BadRequestError, TroubleError


class Patience(msgspec.Struct, frozen=True):
    """Every wait has a bound. Seconds."""

    turn: float = 10.0
    """A caught-up run gives its place away after this time, if somebody waits. Not sooner: the server goes on
    working for a reader that left (letta-protocol g9)."""
    silence: float = 15.0
    """A run that sends no chunk for so long is looked up over REST; then ever less often."""
    most_silence: float = 300.0
    """The longest time between two such look-ups."""
    slow_chunk: float = 1800.0
    """So long the bytes of one chunk may take to come in; a stream whose bytes make no event for longer is silent."""
    ended: float = 30.0
    """A run the server calls completed or failed has its terminal marker in the stream already (letta-protocol
    trap 9). Two readings that are silent for so long say that the stream is gone; a frozen Redis is silent too."""
    cancelled: float = 60.0
    """A cancelled run's marker comes only with the model's next token, 20 s later in one case (letta-protocol g8)."""
    streamless: float = 3 * 3600.0
    """So long after its creation a run that has no stream is waited for, to fetch its messages when it is over."""
    record: float = 8.0
    """So long after the terminal marker the server may still call a run running (letta-protocol trap 9)."""

    @property
    def rest(self) -> float:
        """A place whose connection broke stays empty for up to so long.

        Else a thousand runs that are cut off would come back at one moment, and those that wait for a place would find
        out one after the other, in no time, that the server is down.
        """
        return self.turn / 10


class _WaitForServer(tenacity.wait.wait_base):
    """As long as the server asks for, and then growing; half of it is chance, so that who failed at once is spread."""

    def __init__(self, most_seconds: float) -> None:
        wait = {"multiplier": 0.2, "max": most_seconds / 2}
        self._growing = wait_exponential(**wait) + wait_random_exponential(**wait) + wait_random(0, 1)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        """Seconds to wait before the next attempt."""
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.retry_after if isinstance(error, TroubleError) else None
        # Added and not only at least: a server that tells a thousand to come back in 5 s means not all at that moment.
        return (asked or 0.0) + self._growing(retry_state)


class _StopAfterAnswers(tenacity.stop.stop_base):
    """So many failed answers; an outage, however long, says nothing of what was asked for and does not count."""

    def __init__(self, most_answers: int) -> None:
        self._left = most_answers

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        """Whether it is enough."""
        error = retry_state.outcome.exception() if retry_state.outcome else None
        self._left -= not (isinstance(error, TroubleError) and error.is_outage)
        return self._left <= 0


def until_it_works(
    before_sleep: Callable[[tenacity.RetryCallState], None] | None = None,
    *,
    most_seconds: float = 60.0,
    most_answers: int | None = None,
) -> tenacity.AsyncRetrying:
    """Attempts against a server in trouble; every other error goes straight through."""
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((TroubleError, BadRequestError)),
        wait=_WaitForServer(most_seconds),
        stop=tenacity.stop_never if most_answers is None else _StopAfterAnswers(most_answers),
        before_sleep=before_sleep,
        reraise=True,
    )
