"""`make bench`: everything side by side in one go, as ratios; prints the tables and writes docs/benchmarks.md.

    floor           raw sockets, a typed partial decode, one bulk load per 5,000 rows: what the machine can do
    letta-ingest    the installed worker as a process, with default settings
    dlt             a well-known loading library, wired to the same streams (where it is installed)
    naive           the official client's stream iterated, one ORM row and one commit a chunk

All data is checked by counting it. Nothing is pinned, and nothing is left out of a time but the start of the process,
where a table says so.
"""

import argparse
import json
import sys

from benchmarks import catch_up, growth, live_load, report, start
from benchmarks.catch_up import FLOOR, WORKER, Load
from benchmarks.database import DATABASES
from benchmarks.processes import ROOT
from tests.support.postgres import running_postgres

RECORDED = ROOT / "benchmarks" / "recorded.json"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
DLT = ROOT / ".cache" / "dlt" / "bin" / "python"
MOST_WORSE = 1.5


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; at least 3 for a number worth keeping (3)")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the database that is full (2,000,000)")
    parser.add_argument("--smoke", action="store_true", help="only the CPU a chunk takes, against what was recorded")
    parser.add_argument("--record", action="store_true", help="write docs/benchmarks.md and benchmarks/recorded.json")
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke()
        return
    whole = Load(100, 2000)
    with running_postgres() as server:
        contenders = catch_up.contenders(str(DLT) if DLT.exists() else None)
        results = report.Results(
            catch_up=catch_up.measure(contenders, whole, arguments.rounds, server),
            live=live_load.measure((1, 100, 500, 1000, 2000, 5000), server),
            restart=start.restart(100_000, 1000, server),
            idle=start.idle(5000, server),
            length=growth.length(1_000_000, server),
            second=growth.second(whole, server),
            flat=growth.flat(arguments.rows, whole, arguments.rounds, server),
        )
    text = report.document(results, whole, arguments.rounds)
    print(text)
    if arguments.record:
        DOCUMENT.write_text(text)
        (ROOT / "docs" / "benchmarks.svg").write_text(report.chart(results.catch_up))
        RECORDED.write_text(json.dumps(costs(results.catch_up), indent=2) + "\n")


def costs(results: catch_up.Results) -> dict[str, float]:
    """CPU a chunk as a multiple of the floor's, for each database."""

    def cost(contender: catch_up.Contender, database: str) -> float:
        return report.median(results[contender.name, database], "cpu")

    return {database: round(cost(WORKER, database) / cost(FLOOR, database), 2) for database in DATABASES}


def smoke() -> None:
    """Fail when a chunk costs half as much again, in units of the floor, as was recorded."""
    recorded = json.loads(RECORDED.read_text())
    with running_postgres() as server:
        found = costs(catch_up.measure([FLOOR, WORKER], Load(100, 2000), 3, server))
    for database in DATABASES:
        print(f"{database}: {found[database]:.1f} x the floor's CPU a chunk; {recorded[database]:.1f} x recorded")
    if worse := [d for d in DATABASES if found[d] > MOST_WORSE * recorded[d]]:
        sys.exit(f"bench: on {' and '.join(worse)} a chunk costs more than {MOST_WORSE} x what was recorded")


if __name__ == "__main__":
    main()
