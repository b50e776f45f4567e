"""The cache survives kill -9 with every reply, and two writers."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ual.errors import UserError
from ual.records import Message
from ual.uncertainty.budget import Spent
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Reply, Request, Token, key

WRITER = """
import sys
from pathlib import Path
from ual.uncertainty.protocol import Reply
from ual.uncertainty.cache import Cache
cache = Cache(Path(sys.argv[1]))
for i in range(int(sys.argv[3])):
    cache.add(f"{sys.argv[2]}-{i}".encode(), Reply(f"reply {i}"))
    if i % 50 == 49:
        print(i, flush=True)
"""


def writer(path: Path, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


floats = st.floats(-100, 0)
tokens = st.builds(Token, st.text(), floats, st.tuples(st.tuples(st.text(), floats)))


@given(
    st.builds(
        Reply,
        text=st.none() | st.text(),
        finish_reason=st.sampled_from(["stop", "length"]),
        tokens=st.tuples(tokens),
        prompt_tokens=st.integers(0, 10**9),
        scores=st.none() | st.dictionaries(st.sampled_from(["nll", "tokens"]), floats),
    )
)
def test_a_reply_survives_a_round_trip(reply: Reply) -> None:
    assert Reply.parse(reply.dump()) == reply


@pytest.mark.kills("ual/uncertainty/cache.py", "INSERT OR IGNORE INTO reply", "INSERT OR REPLACE INTO reply")
@pytest.mark.kills(
    "ual/uncertainty/cache.py", "os.O_CREAT | os.O_RDWR, 0o600", "os.O_CREAT | os.O_RDWR, 0o644"
)
def test_the_first_reply_of_a_key_stays_and_nothing_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    cache.add(b"k", Reply("first"))
    cache.add(b"k", Reply("second"))
    cache.note("run", Spent(2, 10, 1))
    cache.note("run", Spent(1, 5, 0))
    assert cache.spent("run") == Spent(3, 15, 1)
    assert cache.spent("other") == Spent()
    assert cache.get(b"k") == Reply("first")
    assert cache.get(b"other") is None
    assert (tmp_path / "c.sqlite").stat().st_mode & 0o077 == 0
    cache.close()
    db = sqlite3.connect(tmp_path / "c.sqlite")
    for statement in ("DELETE FROM reply", "UPDATE reply SET reply = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()


def test_everything_that_determines_a_reply_is_in_its_key() -> None:
    base = Request((Message("user", "q"),))
    others = [
        Request((Message("user", "r"),)),
        Request((Message("system", "q"),)),
        Request((Message("user", "q"),), task="score"),
        Request((Message("user", "q"),), max_tokens=17),
        Request((Message("user", "q"),), temperature=0.1),
        Request((Message("user", "q"),), top_logprobs=1),
        Request((Message("user", "q"),), draw=1),
        Request((Message("user", "q"),), json_schema={"type": "object"}),
    ]
    keys = {key({"model": "m"}, request) for request in (base, *others)} | {key({"model": "n"}, base)}
    assert len(keys) == len(others) + 2
    assert key({"model": "m"}, base) == key({"model": "m"}, Request((Message("user", "q"),)))


@pytest.mark.kills("ual/uncertainty/cache.py", "isolation_level=None", 'isolation_level="DEFERRED"')
def test_a_killed_writer_loses_no_added_reply(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    process = writer(path, "a", 10**6)
    assert process.stdout is not None
    for _ in range(10):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    cache = Cache(path)
    assert all(cache.get(f"a-{i}".encode()) == Reply(f"reply {i}") for i in range(last + 1))
    cache.add(b"more", Reply("after"))
    assert len(cache) >= last + 2
    cache.close()


def test_two_processes_write_to_one_cache(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    processes = [writer(path, name, 1500) for name in ("a", "b", "a")]
    started = time.monotonic()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    cache = Cache(path)
    assert len(cache) == 3000
    cache.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    assert time.monotonic() - started < 60


def test_a_file_that_is_no_cache_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "precious"}\n' * 100)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be used"):
        Cache(path)
    assert path.read_bytes() == before


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    cache = Cache(path)
    for i in range(2000):
        cache.add(f"{i}".encode(), Reply("x" * 50))
    cache.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)

    def read_all() -> None:
        damaged = Cache(path)
        for i in range(2000):
            damaged.get(f"{i}".encode())

    with pytest.raises(UserError, match="cannot be used"):
        read_all()
