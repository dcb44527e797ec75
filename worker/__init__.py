"""letta-ingest: stores every chunk of the runs of Letta agents in SQL, exactly once.

    cli.py          the commands; the only place that knows exit codes and terminals
    app.py          composition root: builds engine, HTTP client and stores from Config
    service.py      life of the process: one supervised task per unfinished run, signals, systemd
    reload.py       SIGHUP: what of a new configuration may change while it runs
    discovery.py    which runs exist that are not finished in the store
    follower.py     life of one run: load cursor -> stream -> accept -> commit -> finish
    backfill.py     what the stream does not hold, over REST
    checks.py  status.py  verify.py    what the commands of these names look at
    places.py       the few open streams the server can bear, shared fairly
    census.py       how many runs are in each state, counted seldom
    seldom.py       asking for what is dear, seldom
    monitor.py      /healthz /readyz /metrics: what the outside may know
    terminal.py     what `run` shows on a terminal
    page/           the status page, and transcripts where they are shown
    patience.py     every wait, with its reason
    systemd.py      telling systemd how the service is
    unit.py         the systemd unit of this installation
    config.py  errors.py  logs.py  metrics.py    leaves everybody outside core/ may use
    core/           pure: values in, values out
    letta/          edge: HTTP; speaks Chunk outward
    storage/        edge: SQL; speaks Chunk and cursor outward
    demo/           FakeLetta and the demo

Imports point down, never up; `make check` fails otherwise.
"""
