"""What may stand in `[storage] url`."""

from __future__ import annotations

import pytest

from worker.storage.engine import create_engine, parse_url


@pytest.mark.parametrize(
    ("text", "driver", "database"),
    [
        ("sqlite:///letta-ingest.db", "sqlite+aiosqlite", "letta-ingest.db"),
        ("sqlite:////var/lib/letta-ingest.db", "sqlite+aiosqlite", "/var/lib/letta-ingest.db"),
        ("sqlite+pysqlite:///a.db", "sqlite+aiosqlite", "a.db"),
        ("postgresql://user@host/db", "postgresql+asyncpg", "db"),
        ("postgres://user:word@host:5432/db", "postgresql+asyncpg", "db"),
        ("postgresql+psycopg://user@host/db", "postgresql+asyncpg", "db"),
        ("postgresql://user@[::1]:5432/db?sslmode=require", "postgresql+asyncpg", "db"),
    ],
)
def test_usual_urls_are_understood(text: str, driver: str, database: str) -> None:
    """I7: Whatever driver a URL names, the worker uses its own."""
    url = parse_url(text)
    assert (url.drivername, url.database) == (driver, database)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "sqlite:///letta-ingest.db"),
        ("letta-ingest.db", "sqlite:///letta-ingest.db"),
        ("mysql://user@host/db", "postgresql://"),
        ("sqlite://", "sqlite:///letta-ingest.db"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///a.db?mode=ro", "a SQLite URL has none"),
        ("postgresql://user@host:port/db", "postgresql://"),
        ("postgresql://user@host/db?sslmode=on", "verify-full"),
        ("postgresql://user@host/db?sslmode=require&sslmode=disable", "verify-full"),
        ("postgresql://user@host/db?connect_timeout=3", "sslmode"),
    ],
)
def test_a_wrong_url_is_answered_with_what_is_right(text: str, right: str) -> None:
    """I7: The error of a URL that cannot be used names one that can."""
    with pytest.raises(ValueError, match=right):
        parse_url(text)


@pytest.mark.parametrize("text", ["postgresql://user:hunter2@host:port/db", "oracle://user:hunter2@host/db"])
def test_an_error_does_not_show_the_password(text: str) -> None:
    """I10: A URL that is refused is not repeated."""
    with pytest.raises(ValueError, match="write") as raised:
        parse_url(text)
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in str(create_engine("postgresql://user:hunter2@host/db").url)
