"""Creates the Letta server's tables from its ORM, because its wheel ships no migrations.

`python create_db.py DATABASE_URL`, with the Python of the server's own virtual environment.
"""

import importlib
import pkgutil
import sys

import letta.orm
from letta.orm.base import Base
from sqlalchemy import create_engine, text


def main() -> None:
    """Create every table of the ORM in the database named on the command line."""
    for module in pkgutil.iter_modules(letta.orm.__path__):
        if not module.name.startswith("sqlite"):
            importlib.import_module(f"letta.orm.{module.name}")
    engine = create_engine(sys.argv[1].replace("postgresql://", "postgresql+pg8000://"))
    with engine.begin() as connection:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        Base.metadata.create_all(connection)
        # Upstream does this in a migration; the ORM only declares a server-side default.
        connection.execute(text("CREATE SEQUENCE message_seq_id OWNED BY messages.sequence_id"))
        connection.execute(
            text("ALTER TABLE messages ALTER COLUMN sequence_id SET DEFAULT nextval('message_seq_id')"),
        )


if __name__ == "__main__":
    main()
