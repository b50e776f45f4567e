"""Tokenized samples from the cache are those that rendering gives now."""

import copy
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from ual.data import Renderer, TokenizedSample, tokenize
from ual.records import Message, Sample


def chat(i: int, question: str = "What is it?", answer: str = "It is.") -> Sample:
    return Sample(f"sample {i}", (Message("user", question), Message("assistant", f"{answer} {i}")))


SAMPLES = [chat(i, answer="It is. " * i) for i in range(1, 9)]


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def renderer(tokenizer: Any, **options: Any) -> Renderer:
    defaults = {"chat_template": "plain", "context_length": 512, "max_length": 48, "overlong": "drop"}
    return Renderer(tokenizer, **(defaults | options))


def plain(rows: dict[str, TokenizedSample]) -> list[Any]:
    """What can be compared."""
    assert all(row.id == id for id, row in rows.items())
    return [(r.id, r.input_ids.tolist(), r.labels.tolist(), r.truncated) for r in rows.values()]


def from_cache(made: Renderer, samples: list[Sample], folder: Path) -> bool:
    """Whether nothing was rendered; and what came is what rendering gives."""
    rendered = []
    render = made.render
    made.render = lambda sample: rendered.append(sample) or render(sample)  # type: ignore[method-assign]
    done: list[int] = []
    rows = tokenize(samples, made, folder, done.append)
    fresh = copy.copy(made)
    fresh.counts = type(made.counts)()
    expected = {s.id: row for s in samples if (row := Renderer.render(fresh, s)) is not None}
    assert plain(rows) == plain(expected)
    assert made.counts == fresh.counts
    assert sum(done) == len(samples)
    return not rendered


@pytest.mark.kills("ual/data/tokenize.py", "update(dropped=dropped, undecided", "update(undecided")
def test_a_second_run_reads_what_the_first_made(tokenizer: Any, tmp_path: Path) -> None:
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    again = renderer(tokenizer)
    assert from_cache(again, SAMPLES, tmp_path)
    # they are counted though nothing was rendered
    assert again.counts["dropped"] > 0
    assert again.counts["rendered"] > 0
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path / "elsewhere")
    in_memory = tokenize(SAMPLES, renderer(tokenizer))
    assert plain(in_memory) == plain(tokenize(SAMPLES, renderer(tokenizer), tmp_path))
    assert tokenize([], renderer(tokenizer), tmp_path) == {}


@pytest.mark.kills(
    "ual/data/tokenize.py", "[sample.id, chat, sample.tools, list(sample.options)]", "[sample.id]"
)
def test_whatever_changes_the_tokens_is_in_the_key(tokenizer: Any, tmp_path: Path) -> None:
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    for options in (
        {"max_length": 49},
        {"overlong": "truncate"},
        {"chat_template": "chatml"},
        {"system_prompt": "Be brief."},
        {"train_on": "last"},
    ):
        assert not from_cache(renderer(tokenizer, **options), SAMPLES, tmp_path), options
        assert from_cache(renderer(tokenizer, **options), SAMPLES, tmp_path), options
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["It"])
    assert not from_cache(renderer(other), SAMPLES, tmp_path)
    for samples in (
        SAMPLES[:-1],
        SAMPLES[::-1],
        [chat(0), *SAMPLES[1:]],
        [Sample("other", SAMPLES[0].messages), *SAMPLES[1:]],
        [Sample("sample 1", (Message("system", "x"), *SAMPLES[0].messages)), *SAMPLES[1:]],
    ):
        assert not from_cache(renderer(tokenizer), samples, tmp_path)
    # what only the loss sees is not
    weighted = [Sample(s.id, s.messages, label_smoothing=0.1, sample_weight=2.0) for s in SAMPLES]
    assert from_cache(renderer(tokenizer), weighted, tmp_path)


@pytest.mark.kills("ual/data/tokenize.py", "list(map(_checksum, found)) != checksums", "False")
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: flip(b)])
def test_a_damaged_file_is_made_again(damage: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(damage(path.read_bytes()))
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES, tmp_path)


@pytest.mark.kills("ual/data/tokenize.py", "len(found) != count", "False")
def test_a_file_cut_between_batches_is_made_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ual.data.tokenize"], "_BATCH", 3)
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    with pa.ipc.open_stream(content) as reader:
        batches = list(reader)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, reader.schema) as writer:
            for batch in batches[:-1]:
                writer.write_batch(batch)
    assert len(batches) == 3
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert path.read_bytes() == content


def flip(content: bytes) -> bytes:
    """Another token, in a file that is complete otherwise."""
    first = pa.ipc.open_stream(content).read_next_batch()["input_ids"].values
    start = content.index(bytes(first.buffers()[1])[:8])
    return content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :]


def test_a_cache_that_cannot_be_written_is_passed_over(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert not from_cache(renderer(tokenizer), SAMPLES, file / "below")
    assert "tokenized samples are not cached: " in caplog.text


def test_a_file_system_without_locks_has_no_cache(
    tokenizer: Any, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")  # older filelock

    monkeypatch.setattr("filelock.FileLock.acquire", flock)
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert "tokenized samples are not cached: FileSystem" in caplog.text


@pytest.mark.kills("ual/data/tokenize.py", 'folder.glob(f".{path.name}.*.partial")', "()")
def test_what_a_killed_process_left_is_removed(tokenizer: Any, tmp_path: Path) -> None:
    tokenize(SAMPLES, renderer(tokenizer), tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    left, of_another = (tmp_path / f".{name}.1.partial" for name in (path.name, "other.arrow"))
    path.rename(left)
    of_another.touch()  # another file's lock is not held
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert sorted(file.name for file in tmp_path.glob(".*")) == [of_another.name]
    assert path.exists()


@pytest.mark.kills("ual/data/tokenize.py", "renderer.counts = before", "pass")
def test_a_full_disk_does_not_stop_a_run(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        made = renderer(tokenizer)
        assert len(tokenize(SAMPLES, made, tmp_path)) == made.counts["rendered"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "tokenized samples are not cached: " in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert sum(made.counts.values()) == len(SAMPLES)


@pytest.mark.kills(
    "ual/data/tokenize.py", 'with FileLock(path.with_suffix(".lock")):', "with suppress(ValueError):"
)
def test_of_two_processes_one_renders(tokenizer: Any, tmp_path: Path) -> None:
    """Two threads lock like two processes: each opens the lock file for itself."""
    calls = []

    def work() -> list[Any]:
        made = renderer(tokenizer)
        render = made.render
        made.render = lambda sample: calls.append(sample.id) or render(sample)  # type: ignore[method-assign]
        return plain(tokenize(SAMPLES, made, tmp_path))

    with ThreadPoolExecutor(2) as pool:
        first, second = (future.result() for future in [pool.submit(work), pool.submit(work)])
    assert first == second
    assert len(calls) == len(SAMPLES)


def test_tokens_are_views_of_a_file_that_datasets_opens(tokenizer: Any, tmp_path: Path) -> None:
    for _ in range(2):
        rows = tokenize(SAMPLES, renderer(tokenizer), tmp_path)
        for row in rows.values():
            assert not row.input_ids.flags.owndata
            assert not row.labels.flags.writeable
    (path,) = tmp_path.glob("*.arrow")
    opened = datasets.Dataset.from_file(str(path))
    assert [row["input_ids"] for row in opened if row["id"]] == [r.input_ids.tolist() for r in rows.values()]


def test_the_oldest_goes_first(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        tokenize(SAMPLES[: 3 + i], renderer(tokenizer), tmp_path)
        time.sleep(0.01)
    tokenize(SAMPLES[:3], renderer(tokenizer), tmp_path)  # read, so no longer the oldest
    size = max(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    monkeypatch.setattr(sys.modules["ual.data.tokenize"], "_LARGEST", 3 * size)
    tokenize(SAMPLES, renderer(tokenizer), tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES[:3], tmp_path)
    assert not from_cache(renderer(tokenizer), SAMPLES[:4], tmp_path)
