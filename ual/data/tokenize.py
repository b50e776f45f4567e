"""Tokenized samples, mapped from a file whose name is a hash of everything that decides their tokens."""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from ual.data.render import Renderer, TokenizedSample
from ual.files import aside
from ual.records import Sample

_log = logging.getLogger(__name__)

_FORMAT = 3  # of the files; part of the key
_DROPPED = TokenizedSample("", np.empty(0, np.int32), np.empty(0, np.int32))  # ids are not empty
_UNDECIDED = replace(_DROPPED, decision=-2)
_BATCH = 1000  # samples in memory while a file is written
_LARGEST = 8 << 30  # bytes; beyond them the files that were not used for longest are removed


def tokenize(
    samples: Sequence[Sample],
    renderer: Renderer,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, TokenizedSample]:
    """Render all samples, or map the file that an earlier call wrote for the same samples and renderer.

    The file's name is a hash of every sample's id, messages, tools and options, and of
    `renderer.fingerprint`. Smoothings, weights and probabilities do not change tokens, so they are not
    hashed. Processes that need the same file wait until one of them has written it.

    Args:
        samples: with distinct ids.
        renderer: its `counts` are increased by these samples, whether they are rendered or read.
        folder: of the cache; None keeps the tokens in memory. A damaged file is written again. If the folder
            cannot be written, a warning is logged, and the tokens are kept in memory.
        advance: called with the number of samples done.

    Returns:
        The samples that are not dropped, by id, in order. Tokens of a file are read-only views of it.

    Raises:
        UserError: as `Renderer.render`.
    """
    before = renderer.counts.copy()
    try:
        if folder is not None:
            return _cached(samples, renderer, folder, advance)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _log.warning("tokenized samples are not cached: %s", error)
        renderer.counts = before
    return _by_id(_render(samples, renderer, advance))


def _by_id(rendered: Iterable[TokenizedSample]) -> dict[str, TokenizedSample]:
    return {of.id: of for of in rendered if of.id}


def _cached(
    samples: Sequence[Sample], renderer: Renderer, folder: Path, advance: Callable[[int], None]
) -> dict[str, TokenizedSample]:
    from filelock import FileLock

    path = folder / f"{_key(samples, renderer)}.arrow"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            read = _read(path, len(samples))
            path.touch()
        except Exception as error:  # Arrow has several classes for a damaged file
            if path.exists():
                _log.warning("%s is written again: %s", path, error)
            for left in folder.glob(f".{path.name}.*.partial"):  # of processes that were killed
                left.unlink()
            _write(path, _render(samples, renderer, advance))
            found = _by_id(_read(path, len(samples)))
        else:
            found = _by_id(read)
            _log.info("%d tokenized samples from %s", len(found), path)
            truncated = sum(rendered.truncated for rendered in found.values())
            undecided = sum(row.decision == _UNDECIDED.decision for row in read)
            dropped = len(samples) - len(found) - undecided
            renderer.counts.update(rendered=len(found) - truncated, truncated=truncated)
            renderer.counts.update(dropped=dropped, undecided=undecided)
            advance(len(samples))
    with suppress(FileNotFoundError):  # another process may remove it at the same time
        files = sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_mtime)
        while len(files) > 1 and sum(file.stat().st_size for file in files) > _LARGEST:
            files.pop(0).unlink()
    return found


def _render(
    samples: Sequence[Sample], renderer: Renderer, advance: Callable[[int], None]
) -> Iterator[TokenizedSample]:
    for sample in samples:
        before = renderer.counts["undecided"]
        rendered = renderer.render(sample)
        yield rendered or (_DROPPED if renderer.counts["undecided"] == before else _UNDECIDED)
        advance(1)


def _write(path: Path, rendered: Iterator[TokenizedSample]) -> None:
    """Write an Arrow stream, a few samples at a time; `datasets.Dataset.from_file` opens it."""
    import pyarrow as pa  # type: ignore[import-untyped]

    tokens = pa.list_(pa.int32())
    types = {"id": pa.string(), "input_ids": tokens, "labels": tokens, "truncated": pa.bool_()}
    types |= {"decision": pa.int32(), "option_ids": tokens, "checksum": pa.uint32()}
    with (
        aside(path) as scratch,
        pa.OSFile(str(scratch), "wb") as file,
        pa.ipc.new_stream(file, schema := pa.schema(types)) as out,
    ):
        while rows := [asdict(t) | {"checksum": _checksum(t)} for t in islice(rendered, _BATCH)]:
            out.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _read(path: Path, count: int) -> list[TokenizedSample]:
    """Map a file of `count` samples, and return views of its tokens."""
    import pyarrow as pa

    found: list[TokenizedSample] = []
    checksums: list[int] = []
    for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
        ids, input_ids, labels, truncated, decision, option_ids, checksum = batch.columns
        tokens = [np.split(c.values.to_numpy(), c.offsets.to_numpy()[1:-1]) for c in (input_ids, labels)]
        decisions = decision.to_pylist(), map(tuple, option_ids.to_pylist())
        found += map(TokenizedSample, ids.to_pylist(), *tokens, truncated.to_pylist(), *decisions)
        checksums += checksum.to_pylist()
    if len(found) != count or list(map(_checksum, found)) != checksums:
        raise ValueError("it is damaged")
    return found


def _checksum(rendered: TokenizedSample) -> int:
    of_options = zlib.crc32(np.array([rendered.decision, *rendered.option_ids]).data)
    return zlib.crc32(rendered.labels.data, zlib.crc32(rendered.input_ids.data, of_options))


def _key(samples: Sequence[Sample], renderer: Renderer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {renderer.fingerprint}".encode())
    for sample in samples:
        chat = [message.as_dict() for message in sample.messages]
        written = [sample.id, chat, sample.tools, list(sample.options)]
        digest.update(json.dumps(written).encode() + b"\n")
    return digest.hexdigest()
