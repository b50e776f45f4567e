"""Tokenized samples on disk, under a hash of everything that they depend on: a second run starts at once."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ual.data.render import IGNORE_INDEX, Renderer, TokenizedSample
from ual.files import aside
from ual.records import Sample

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the files; another number is another cache
_LARGEST = 8 << 30  # bytes kept; beyond them what was not read for longest goes


def tokenize(
    samples: Sequence[Sample],
    renderer: Renderer,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, TokenizedSample]:
    """Render all samples, or read what an earlier call rendered of the same rows in the same way.

    The key is a hash of every row (id, messages, tools), of the tokenizer, the template and the options, and
    of the library that tokenizes. Smoothings and weights are not in it, for they are not in the tokens.

    Args:
        samples: rows with ids of their own.
        renderer: what renders; its `counts` are those of the samples either way.
        folder: where the cache lies; None keeps none. A file that cannot be read is made again, and a cache
            that cannot be written is passed over with a line in the log: it is no reason to stop.
        advance: called with the number of rows done.

    Returns:
        The rows that were not dropped, by sample id, in order.
    """
    if folder is None:
        return _render(samples, renderer, advance)
    path = folder / f"{_key(samples, renderer)}.npz"
    if (found := _read(path)) is not None:
        rows, counts = found
        _log.info("%d tokenized rows from %s", len(rows), path)
        renderer.counts.update(counts)
        advance(len(samples))
        return rows
    before = Counter(renderer.counts)
    rows = _render(samples, renderer, advance)
    try:
        _write(path, rows, renderer.counts - before)
        _keep_within(folder, _LARGEST, path)
    except OSError as error:
        _log.warning("tokenized rows are not kept: %s", error)
    return rows


def _render(
    samples: Sequence[Sample], renderer: Renderer, advance: Callable[[int], None]
) -> dict[str, TokenizedSample]:
    rows = {}
    for sample in samples:
        if (row := renderer.render(sample)) is not None:
            rows[sample.id] = row
        advance(1)
    return rows


def _key(samples: Sequence[Sample], renderer: Renderer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {renderer.fingerprint}".encode())
    for sample in samples:
        chat = [message.as_dict() for message in sample.messages]
        digest.update(json.dumps([sample.id, chat, sample.tools]).encode() + b"\n")
    return digest.hexdigest()


def _write(path: Path, rows: dict[str, TokenizedSample], counts: Counter[str]) -> None:
    about = json.dumps({"ids": list(rows), "counts": counts}).encode()
    lengths = [len(row.input_ids) for row in rows.values()]
    tokens = [token for row in rows.values() for token in row.input_ids]
    trained = [label != IGNORE_INDEX for row in rows.values() for label in row.labels]
    with aside(path) as scratch, scratch.open("wb") as file:
        np.savez(
            file,
            about=np.frombuffer(about, dtype=np.uint8),
            ends=np.cumsum(lengths, dtype=np.int64),
            input_ids=np.array(tokens, dtype=np.int32),
            trained=np.packbits(np.array(trained, dtype=np.bool_)),
            checksum=np.frombuffer(_checksum(tokens, trained), dtype=np.uint8),
        )


def _read(path: Path) -> tuple[dict[str, TokenizedSample], Counter[str]] | None:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["about"].tobytes())
        tokens = arrays["input_ids"].tolist()
        trained = np.unpackbits(arrays["trained"], count=len(tokens)).astype(bool).tolist()
        if arrays["checksum"].tobytes() != _checksum(tokens, trained):
            raise ValueError("its checksum is wrong")
        path.touch()
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, numpy and json each have their own for a damaged file
        _log.warning("%s is made again: %s", path, error)
        return None
    rows, start = {}, 0
    for sample_id, end in zip(about["ids"], arrays["ends"].tolist(), strict=True):
        ids = tokens[start:end]
        labels = [t if kept else IGNORE_INDEX for t, kept in zip(ids, trained[start:end], strict=True)]
        rows[sample_id] = TokenizedSample(sample_id, ids, labels)
        start = end
    return rows, Counter(about["counts"])


def _checksum(tokens: list[int], trained: list[bool]) -> bytes:
    digest = hashlib.sha256(np.array(tokens, dtype=np.int32).tobytes())
    digest.update(np.array(trained, dtype=np.bool_).tobytes())
    return digest.digest()


def _keep_within(folder: Path, most: int, newest: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > most and path != newest:
            path.unlink(missing_ok=True)
