"""Elicitation by batch files: export what is not answered, import what was."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ual.config.elicit import ElicitConfig, EndpointConfig
from ual.errors import UserError
from ual.pipelines.elicit import count, rows
from ual.uncertainty.backends.batch_files import Export, import_answers
from ual.uncertainty.backends.endpoint import Endpoint
from ual.uncertainty.budget import Meter
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators.registry import build
from ual.uncertainty.session import Session, elicit

_WINDOW = 64


@dataclass(frozen=True, slots=True)
class Exported:
    """The files written, the requests in them, and those that the cache answers already."""

    files: list[Path]
    requests: int
    cached: int


def export(config: ElicitConfig, folder: Path, *, limit: int | None = None) -> Exported:
    """Write every request that the cache does not answer into batch files under `folder`, a new one.

    Raises:
        UserError: the backend is not an endpoint, an estimator needs another, or the folder is not empty.
    """
    if not isinstance(config.backend, EndpointConfig):
        raise UserError(
            "batch files are for an endpoint", place="configuration, backend", remedy='set kind to "endpoint"'
        )
    estimators = build(config.estimators)
    for estimator in estimators:
        if estimator.needs - {"generate"}:
            raise UserError(
                f"{estimator.label} asks what a batch file cannot hold", place="configuration, estimators"
            )
    count(config, Path(config.output_dir), limit)
    endpoint = Endpoint(config.backend, None, Meter())
    cache = Cache(config.cache_path)

    async def walk() -> Exported:
        exporter = Export(endpoint, folder)
        session = Session([exporter], cache, patience=2**62)
        try:
            async with aclosing(
                elicit(islice(rows(config), limit), estimators, session, window=_WINDOW)
            ) as all_:
                async for _ in all_:
                    pass
        finally:
            await session.close()
        return Exported(exporter.files, exporter.count, session.counts.cached)

    try:
        return asyncio.run(walk())
    finally:
        cache.close()


def import_files(config: ElicitConfig, paths: Sequence[Path]) -> Counter[str]:
    """Put the answers of batch output files into the cache; return how many lines came to what."""
    cache = Cache(config.cache_path)
    try:
        return sum((import_answers(path, cache) for path in paths), Counter[str]())
    finally:
        cache.close()
