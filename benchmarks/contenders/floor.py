"""What the machine can do: raw sockets, a split, a typed partial decode, one bulk load per 5,000 rows. Nothing else.

No resume, no errors, no order proven, no cursor, no index but the key. `python -m benchmarks.contenders.floor URL
DATABASE_URL RUNS`; reads 16 streams at once as the worker does by default.
"""

import asyncio
import datetime as dt
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import asyncpg
import msgspec

from benchmarks.blaster import run_id

ROWS_A_LOAD = 5000
STREAMS = 16
COLUMNS = ("run_id", "seq_id", "message_type", "message_id", "otid", "step_id", "payload", "received_at", "seq_source")
TABLE = (
    "CREATE TABLE chunks (run_id TEXT NOT NULL, seq_id BIGINT NOT NULL, message_type TEXT, message_id TEXT, otid TEXT,"
    " step_id TEXT, payload TEXT NOT NULL, received_at {time} NOT NULL, seq_source TEXT NOT NULL,"
    " PRIMARY KEY (run_id, seq_id))"
)

Row = tuple[str, int, str | None, str | None, str | None, str | None, str, object, str]
Load = Callable[[list[Row]], Awaitable[None]]


class Head(msgspec.Struct, gc=False):
    """The fields that become columns."""

    seq_id: int | None = None
    message_type: str | None = None
    id: str | None = None
    otid: str | None = None
    step_id: str | None = None


decode = msgspec.json.Decoder(Head).decode


def rows_of(run: str, pieces: list[bytes], last: int, at: object) -> Iterator[Row]:
    """A row for each event; HTTP's own framing stands before `data: ` and is passed over."""
    for piece in pieces:
        data = piece[piece.find(b"data: ") + 6 :]
        if data == b"[DONE]":
            return
        head = decode(data)
        last = head.seq_id or last + 1
        yield (run, last, head.message_type, head.id, head.otid, head.step_id, data.decode(), at, "wire")


async def read(host: str, port: int, run: str, take: Callable[[list[Row]], Awaitable[None]]) -> None:
    """Read one run to its end."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    body = b'{"starting_after":0,"run_id":"%s"}' % run.encode()
    writer.write(b"POST /v1/runs/%s/stream HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (run.encode(), len(body), body))
    buffer, last = b"", 0
    while not buffer.endswith(b"\r\n0\r\n\r\n"):
        buffer += await reader.read(1 << 18)
        *pieces, buffer = buffer.split(b"\n\n")
        if rows := list(rows_of(run, pieces, last, dt.datetime.now(dt.UTC))):
            last = rows[-1][1]
            await take(rows)
    writer.close()


async def read_all(url: str, runs: int, load: Load) -> None:
    """Read all runs, a few at once, and load whenever there is enough."""
    address = urlsplit(url)
    waiting: list[Row] = []
    places = asyncio.Semaphore(STREAMS)

    async def take(rows: list[Row]) -> None:
        nonlocal waiting
        waiting += rows
        if len(waiting) >= ROWS_A_LOAD:
            lot, waiting = waiting, []
            await load(lot)

    async def follow(run: str) -> None:
        async with places:
            await read(address.hostname or "", address.port or 80, run, take)

    await asyncio.gather(*(follow(run_id(number)) for number in range(1, runs + 1)))
    await load(waiting)


async def on_sqlite(url: str, path: str, runs: int) -> None:
    """One executemany and one commit a load."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute(TABLE.format(time="TEXT"))
    insert = f"INSERT INTO chunks VALUES ({', '.join('?' * len(COLUMNS))})"

    async def load(rows: list[Row]) -> None:
        database.executemany(insert, [(*row[:7], str(row[7]), row[8]) for row in rows])
        database.commit()

    await read_all(url, runs, load)
    database.close()


async def on_postgresql(url: str, database_url: str, runs: int) -> None:
    """One COPY a load."""
    database = await asyncpg.connect(database_url)
    await database.execute(TABLE.format(time="TIMESTAMPTZ"))
    turn = asyncio.Lock()

    async def load(rows: list[Row]) -> None:
        async with turn:
            await database.copy_records_to_table("chunks", columns=COLUMNS, records=rows)

    await read_all(url, runs, load)
    await database.close()


def main() -> None:
    """Catch up once."""
    url, database_url, runs = sys.argv[1:]
    path = database_url.removeprefix("sqlite:///")
    on = on_postgresql(url, database_url, int(runs)) if path == database_url else on_sqlite(url, path, int(runs))
    asyncio.run(on)


if __name__ == "__main__":
    main()
