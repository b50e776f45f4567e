"""Replies on disk, by the hash of what determines them: append-only, consistent after kill -9.

The cache is an SQLite file in write-ahead mode. Each reply is one transaction, on disk before the estimator
sees it. A killed process loses only the requests in flight; the next process repeats no answered request.
After a power failure the last replies may be missing; the file stays consistent.

Two processes may write to one file. If both send the same request at the same moment, both pay for it, and
the first reply stays. Triggers refuse updates and deletions. Memory is bounded by SQLite's page cache.
Write-ahead mode needs a local disk: on a network file system each machine needs its own file.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ual.errors import UserError
from ual.uncertainty.budget import Spent
from ual.uncertainty.protocol import Reply

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reply (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS unread (id INTEGER PRIMARY KEY, key BLOB NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spent (
    run TEXT NOT NULL, requests INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON reply BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON reply BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE INDEX IF NOT EXISTS unread_key ON unread (key);
"""
_VERSION = 1
_TIMEOUT = 60.0  # seconds to wait for another process's transaction


class Cache:
    """The replies in one file, which is created if absent and readable by its owner only.

    Raises:
        UserError: the file is not such a cache, is damaged, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None)
            self._open()

    def _open(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"its version is {version}, expected {_VERSION}")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def get(self, key: bytes) -> Reply | None:
        """Return the reply of a key, or None."""
        with self._errors((sqlite3.Error, ValueError, KeyError, TypeError)):
            row = self._db.execute("SELECT reply FROM reply WHERE key = ?", (key,)).fetchone()
            return Reply.parse(row[0]) if row else None

    def add(self, key: bytes, reply: Reply) -> None:
        """Add a reply; the first reply of a key stays."""
        with self._errors():
            self._db.execute("INSERT OR IGNORE INTO reply (key, reply) VALUES (?, ?)", (key, reply.dump()))

    def keep_unread(self, key: bytes, body: str) -> None:
        """Keep a reply that cannot be read, for a later version that can."""
        with self._errors():
            self._db.execute("INSERT INTO unread (key, body) VALUES (?, ?)", (key, body))

    def unread(self, key: bytes) -> list[str]:
        """Return the bodies that could not be read, the last one first."""
        with self._errors():
            query = "SELECT body FROM unread WHERE key = ? ORDER BY id DESC LIMIT 10"
            return [row[0] for row in self._db.execute(query, (key,))]

    def note(self, run: str, spent: Spent) -> None:
        """Record what a run has just spent."""
        row = (run, spent.requests, spent.prompt_tokens, spent.completion_tokens)
        with self._errors():
            self._db.execute("INSERT INTO spent VALUES (?, ?, ?, ?)", row)

    def spent(self, run: str) -> Spent:
        """Return what all processes of a run have spent."""
        row = self._db.execute(
            "SELECT total(requests), total(prompt_tokens), total(completion_tokens) FROM spent WHERE run = ?",
            (run,),
        ).fetchone()
        return Spent(*map(int, row))

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM reply").fetchone()[0])

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self, kinds: tuple[type[Exception], ...] = (OSError, sqlite3.Error)) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            raise UserError(
                f"the cache of replies cannot be used: {error}",
                place=str(self.path),
                remedy="free some space or correct its permissions. If it is damaged, or another program's "
                "file, name another file with `cache`; this one was not changed",
            ) from error
