"""Results of model calls, kept on disk by content key: what is here need not be computed again."""

import errno
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefopt.errors import InputError
from prefopt.files import advice, reporting_write_errors

WAIT = 60.0  # seconds for another process to end its writing
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: no such table
_NUMBERS = {  # the errno of SQLite's errors
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
_TABLE = "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INT NOT NULL)"
_ADD = "INSERT OR REPLACE INTO results VALUES (?, ?, ?)"
# A damaged file may hold a value of any type.
_FIND = "SELECT coalesce(CAST(value AS BLOB), x''), crc FROM results WHERE key = ?"


class Ledger:
    """Results that JSON can hold, by content key, in SQLite files.

    Each process adds to a file of its own, `name-00000.sqlite` and so on, and reads all of them, also those
    of other machines in a shared folder. What `add` returned from is on the disk: neither `kill -9` nor a
    power cut loses it; of an `add` that was killed, all is there or nothing. Opening reads no entries, so its
    time and memory do not grow with them. A damaged file is an InputError that names it.
    """

    def __init__(self, folder: Path, name: str, process: int = 0):
        self.folder, self.name = folder, name
        self._own = folder / f"{name}-{process:05d}.sqlite"
        self._files: dict[Path, sqlite3.Connection] = {}
        with reporting_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __del__(self) -> None:
        for connection in self._files.values():
            connection.close()

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str) -> Any:
        if (value := self._find(key)) is None:
            raise KeyError(f"{key} is not in the ledger {self.folder / self.name}")
        return json.loads(value)

    def __len__(self) -> int:
        """The entries of all files, read one by one; a key that two processes added counts twice."""
        return sum(self._rows(file, "SELECT count(*) FROM results")[0][0] for file in self._files)

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep some results, all or none; they are on the disk when this returns."""
        values = {key: json.dumps(value, allow_nan=False).encode() for key, value in results.items()}
        rows = [(key, value, _crc(key, value)) for key, value in values.items()]
        with _reporting_errors(self._own):
            if self._own not in self._files:
                with reporting_write_errors(self._own):
                    self._own.touch()  # SQLite would not say why it cannot
                self._keep(self._own, _opened(self._own))
                self._files[self._own].execute(_TABLE)
            with self._files[self._own] as own:  # a transaction
                own.executemany(_ADD, rows)

    def refresh(self) -> None:
        """Find the files of processes that began to write after this ledger was opened."""
        for file in sorted(set(self.folder.glob(f"{self.name}-*.sqlite")) - self._files.keys()):
            with _reporting_errors(file):
                connection = _opened(file)
                if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    self._keep(file, connection)
                else:  # its process has yet to make the table
                    connection.close()

    def _keep(self, file: Path, connection: sqlite3.Connection) -> None:
        # In one order for all processes: where two files have a key, the same one answers.
        self._files = dict(sorted({**self._files, file: connection}.items()))

    def _find(self, key: str) -> bytes | None:
        for file in self._files:
            for value, crc in self._rows(file, _FIND, key):
                if crc != _crc(key, value):
                    raise InputError(_damaged(file, f"the entry {key} was changed"))
                return value
        return None

    def _rows(self, file: Path, query: str, *values: str) -> list[tuple]:
        with _reporting_errors(file):
            return self._files[file].execute(query, values).fetchall()


def _opened(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=WAIT)
    # Not read only, even to read: what a killed process left is undone first. A write-ahead log would be
    # faster, but is for one machine alone.
    connection.execute("PRAGMA journal_mode = TRUNCATE")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _crc(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


@contextmanager
def _reporting_errors(file: Path) -> Iterator[None]:
    """Turn SQLite's errors about a file into an InputError that names it."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in _DAMAGED:  # the other bits are details
            raise InputError(_damaged(file, error)) from error
        kind = error.sqlite_errorcode & 0xFF
        if kind == sqlite3.SQLITE_BUSY:
            raise InputError(f"{file}: {error}. Wait until no other process uses it") from error
        # To SQLite, a file that was removed meanwhile is one that may not be written.
        number = _NUMBERS.get(kind) if file.exists() else errno.ENOENT
        raise InputError(f"could not write {file}: {error}. {advice(number)}") from error


def _damaged(file: Path, why: object) -> str:
    return f"{file} is damaged: {why}. Delete it, and run the same command again"
