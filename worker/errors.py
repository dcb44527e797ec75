"""What can go wrong, grouped by what the worker does about it. Raised at the edges, caught by whoever reacts.

WorkerError
|- TroubleError               the server is in trouble: wait, reconnect, resume from the cursor
|  |- RateLimitedError        the same, after the delay the server names
|  `- NoBackgroundError       this server has no background streaming (no Redis): the same, and say so
|- RunExpiredError            410: the stream is gone for good; what REST still holds is fetched
|- NotFoundError              404: the server does not know the run
|- NotStreamableError         the run was not made in background mode: it never had a stream
|- RunIdIgnoredError          the conversation endpoint answered for another run: ask at the run's own endpoint
|- BadRequestError            the server does not accept what we send: log, try again rarely
|- RefusedError               credentials, database or schema refuse us: say it in one sentence, exit 3
|- ConfigError                the configuration is wrong: say all of it, exit 2
`- InvariantError             our own data is inconsistent (I7): stop loudly, exit 1
"""


class WorkerError(Exception):
    """Base of everything the worker raises on purpose."""


class TroubleError(WorkerError):
    """The server, or the way to it, is in trouble."""

    retry_after: float | None = None
    """Seconds the server asks us to wait, where it says so."""
    is_outage: bool = False
    """The network, a proxy or an overload: nobody has said anything about what was asked for."""


class RateLimitedError(TroubleError):
    """429."""


class NoBackgroundError(TroubleError):
    """503: the server runs without Redis, so it keeps no streams."""


class RunExpiredError(WorkerError):
    """410: the run was created more than three hours ago."""


class NotFoundError(WorkerError):
    """404."""


class NotStreamableError(WorkerError):
    """400: the run was not created in background mode."""


class RunIdIgnoredError(WorkerError):
    """The conversation endpoint does not honour `run_id`."""


class BadRequestError(WorkerError):
    """400, 405, 422: the server does not accept the request as it is."""


class RefusedError(WorkerError):
    """Credentials, database or schema: waiting does not help, an operator does."""


class ConfigError(WorkerError):
    """The configuration is wrong; the message lists every fault with its key."""


class InvariantError(WorkerError):
    """What is stored contradicts itself."""
