"""Prefect's database, where there is none yet: Prefect's own migrations, by a driver that does not wait.

A Prefect server makes it by aiosqlite, which hands each of some 30,000 calls to another thread and waits for the answer: 4.8 s on
an idle core, and nothing of a project's first run can begin before. The same migrations on a database in memory take 1.6 s.
"""

import sqlite3
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from prefect.server.database import provide_database_interface
from prefect.server.database.alembic_commands import alembic_config
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import SAWarning
from sqlalchemy.pool import StaticPool


def make() -> None:
    """Make the database that the settings name, if that is a file of sqlite's with nothing in it, or none yet. By one transaction
    of sqlite's: it is whole or empty, whoever else makes it or ends this process; any other a Prefect server brings up to date."""
    url = make_url(provide_database_interface().database_config.connection_url)
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:" or url.query:
        return
    file = Path(url.database)
    if file.is_dir():
        raise SystemExit(f"{file} is a folder, and must be a file")  # sqlite's own word names no file
    if file.exists() and file.stat().st_size:
        return
    statements = migrated()
    with closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        # else another server was faster, and works with it
        if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in statements:
                database.execute(statement)
        database.execute("COMMIT")


def migrated() -> list[str]:
    """The statements that make a database with all of Prefect's migrations done, and nothing else in it."""
    database, config = provide_database_interface(), alembic_config()
    script = ScriptDirectory.from_config(config)
    to_head = partial(script._upgrade_revs, "head")  # pyright: ignore[reportPrivateUsage]  # as alembic's own command does
    script.version_locations = [str(database.orm.versions_dir)]
    engine = create_engine("sqlite://", poolclass=StaticPool, isolation_level="AUTOCOMMIT")
    with (
        warnings.catch_warnings(action="ignore", category=SAWarning),  # indices by an expression stay as they are
        engine.connect() as connection,
        EnvironmentContext(config, script, fn=lambda at, _: to_head(at)) as environment,
    ):
        # the metadata name what a migration leaves without a name
        environment.configure(connection=connection, target_metadata=database.Base.metadata, render_as_batch=True)
        environment.run_migrations()
        memory: Any = connection.connection.driver_connection
        _begin, *statements, _commit = memory.iterdump()
    engine.dispose()
    return statements
