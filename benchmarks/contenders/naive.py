"""What people write first: the official client's stream iterated, one ORM row and one commit a chunk.

`python -m benchmarks.contenders.naive URL DATABASE_URL RUNS`, one run after the other.
"""

import asyncio
import sys

from letta_client import AsyncLetta
from sqlalchemy import Text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.blaster import run_id


class Base(DeclarativeBase):
    """As the tutorial says."""


class Chunk(Base):
    """A row a chunk."""

    __tablename__ = "chunks"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    seq_id: Mapped[int] = mapped_column(primary_key=True)
    message_type: Mapped[str]
    payload: Mapped[str] = mapped_column(Text)


async def main() -> None:
    """Catch up once."""
    url, database_url, runs = sys.argv[1:]
    driver = database_url.replace("sqlite:", "sqlite+aiosqlite:").replace("postgresql:", "postgresql+asyncpg:")
    engine = create_async_engine(driver)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    client = AsyncLetta(base_url=url, api_key="none")
    async with AsyncSession(engine) as session:
        for run in map(run_id, range(1, int(runs) + 1)):
            last = 0
            async for chunk in await client.runs.messages.stream(run):
                last = getattr(chunk, "seq_id", None) or last + 1
                row = Chunk(run_id=run, seq_id=last, message_type=chunk.message_type, payload=chunk.model_dump_json())
                session.add(row)
                await session.commit()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
