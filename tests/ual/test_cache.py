"""Tokenized samples from disk are those that would be made now, or they are made now."""

import copy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ual.data import Renderer, tokenize
from ual.records import Message, Sample


def chat(i: int, question: str = "What is it?", answer: str = "It is.") -> Sample:
    return Sample(f"row {i}", (Message("user", question), Message("assistant", f"{answer} {i}")))


SAMPLES = [chat(i, answer="It is. " * i) for i in range(1, 9)]


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def renderer(tokenizer: Any, **options: Any) -> Renderer:
    defaults = {"chat_template": "plain", "context_length": 512, "max_length": 48, "overlong": "drop"}
    return Renderer(tokenizer, **(defaults | options))


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
    assert rows == expected
    assert list(rows) == list(expected)
    assert made.counts == fresh.counts
    assert sum(done) == len(samples)
    return not rendered


@pytest.mark.kills("ual/data/tokenize.py", "renderer.counts.update(counts)", "pass")
def test_a_second_run_reads_what_the_first_made(tokenizer: Any, tmp_path: Path) -> None:
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    again = renderer(tokenizer)
    assert from_cache(again, SAMPLES, tmp_path)
    # they are counted though nothing was rendered
    assert again.counts["dropped"] > 0
    assert again.counts["rendered"] > 0
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path / "elsewhere")
    assert tokenize(SAMPLES, renderer(tokenizer)) == tokenize(SAMPLES, renderer(tokenizer), tmp_path)


@pytest.mark.kills("ual/data/tokenize.py", "[sample.id, chat, sample.tools]", "[sample.id]")
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
        [Sample("row 1", (Message("system", "x"), *SAMPLES[0].messages)), *SAMPLES[1:]],
    ):
        assert not from_cache(renderer(tokenizer), samples, tmp_path)
    # what only the loss sees is not
    weighted = [Sample(s.id, s.messages, label_smoothing=0.1, sample_weight=2.0) for s in SAMPLES]
    assert from_cache(renderer(tokenizer), weighted, tmp_path)


@pytest.mark.kills(
    "ual/data/tokenize.py", 'arrays["checksum"].tobytes() != _checksum(tokens, trained)', "False"
)
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: flip(b)])
def test_a_damaged_file_is_made_again(damage: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert not from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES, tmp_path)


def flip(content: bytes) -> bytes:
    """Another token, in a file that is whole otherwise."""
    import io

    import numpy as np

    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name].copy() for name in file.files}
    arrays["input_ids"][3] += 1
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_a_cache_that_cannot_be_written_is_passed_over(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert tokenize(SAMPLES, renderer(tokenizer), file / "below") == tokenize(SAMPLES, renderer(tokenizer))


def test_the_oldest_goes_first(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        tokenize(SAMPLES[: 3 + i], renderer(tokenizer), tmp_path)
        time.sleep(0.01)
    tokenize(SAMPLES[:3], renderer(tokenizer), tmp_path)  # read, so no longer the oldest
    size = max(path.stat().st_size for path in tmp_path.glob("*.npz"))
    monkeypatch.setattr(sys.modules["ual.data.tokenize"], "_LARGEST", 3 * size)
    tokenize(SAMPLES, renderer(tokenizer), tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES, tmp_path)
    assert from_cache(renderer(tokenizer), SAMPLES[:3], tmp_path)
    assert not from_cache(renderer(tokenizer), SAMPLES[:4], tmp_path)
