"""Prefect's database as this project makes it, held to the one that Prefect's own command makes."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

MAKE = "from tasks import fresh_database; fresh_database.make()"
THEIRS = "from prefect.cli import app; app()"


def begun(code: str, *words: str, home: Path, **variables: str) -> "subprocess.Popen[str]":
    """A process of its own, for Prefect reads its settings once."""
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Warning" not in said


def content(file: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Everything that the database is made of, and its revision. A table's constraints stand in any order."""
    with closing(sqlite3.connect(file)) as database:
        made = database.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master").fetchall()
        revision = database.execute("SELECT version_num FROM alembic_version").fetchall()
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return sorted((*of, *sorted(line.strip(" \t,") for line in sql.splitlines())) for *of, sql in made), revision


def test_it_is_what_prefects_own_command_makes(tmp_path: Path) -> None:
    theirs = begun(THEIRS, "server", "database", "upgrade", "-y", home=tmp_path / "theirs")
    ended(begun(MAKE, home=tmp_path / "ours"))
    ended(theirs)
    ours = content(tmp_path / "ours" / "prefect.db")
    assert ours == content(tmp_path / "theirs" / "prefect.db")
    assert len(ours[0]) > 200
    assert [file.name for file in (tmp_path / "ours").iterdir()] == ["prefect.db"]


def test_of_many_at_once_one_makes_it_and_it_stays(tmp_path: Path) -> None:
    for process in [begun(MAKE, home=tmp_path) for _ in range(3)]:
        ended(process)
    file = tmp_path / "prefect.db"
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("INSERT INTO flow (name) VALUES ('kept')")
    ended(begun(MAKE, home=tmp_path))
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT name FROM flow").fetchall() == [("kept",)]


KILLED = "os.kill(os.getpid(), 9)"
MIGRATING = f"fresh_database.EnvironmentContext.run_migrations = lambda self: {KILLED}"
WRITING = f"fresh_database.migrated = lambda: ({KILLED} if word == 'END' else word for word in HALF)"


@pytest.mark.parametrize("when", [MIGRATING, WRITING])
def test_a_kill_meanwhile_leaves_nothing_in_the_way(tmp_path: Path, when: str) -> None:
    first, make = MAKE.split("; ")
    killed = begun(f"import os; {first}; HALF = ['CREATE TABLE half (x)', 'END']; {when}; {make}", home=tmp_path)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert {file.name for file in tmp_path.iterdir()} <= {"prefect.db", "prefect.db-journal"}
    ended(begun(MAKE, home=tmp_path))
    assert len(content(tmp_path / "prefect.db")[0]) > 200
    assert [file.name for file in tmp_path.iterdir()] == ["prefect.db"]


def test_it_is_made_where_no_hard_links_are(tmp_path: Path) -> None:
    refuse = "def no(*_): raise PermissionError(1, 'no links here')"
    ended(begun(f"import os\n{refuse}\nos.link = no\n{MAKE}", home=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["prefect.db"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    away = tmp_path / "share"
    address = f"sqlite+aiosqlite:///{away}/prefect.db"  # of a share that is not mounted
    process = begun(MAKE, home=tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=address)
    said, _ = process.communicate(timeout=300)
    assert (process.returncode, said.splitlines()[-1]) == (1, "sqlite3.OperationalError: unable to open database file")
    assert not away.exists()


def test_a_folder_in_its_place_is_said_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").mkdir()
    process = begun(MAKE, home=tmp_path)
    said, _ = process.communicate(timeout=300)
    assert (process.returncode, said) == (1, f"{tmp_path}/prefect.db is a folder, and must be a file\n")


@pytest.mark.parametrize(
    "address", ["sqlite+aiosqlite:///:memory:", "postgresql+asyncpg://nobody:none@127.0.0.1:9/none"]
)
def test_no_other_database_is_touched(tmp_path: Path, address: str) -> None:
    ended(begun(MAKE, home=tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=address))
    assert not list(tmp_path.iterdir())
