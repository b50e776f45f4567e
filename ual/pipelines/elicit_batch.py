"""Elicitation by batch files: export the requests that the cache does not answer, import the answers."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import NamedTuple

from ual.config.elicit import ElicitConfig, EndpointConfig
from ual.errors import UserError
from ual.pipelines.elicit import Job, prepare
from ual.uncertainty.backends.batch_files import BatchExport, import_answers
from ual.uncertainty.backends.endpoint import Endpoint
from ual.uncertainty.budget import Budget
from ual.uncertainty.cache import Cache
from ual.uncertainty.session import Session


class Exported(NamedTuple):
    """The files written, the number of requests in them, and the number that the cache answers."""

    files: list[Path]
    requests: int
    cached: int


def export(config: ElicitConfig, folder: Path, *, limit: int | None = None) -> Exported:
    """Write every request that the cache does not answer into batch files in `folder`, a new one.

    Raises:
        UserError: the backend is not an endpoint, an estimator needs more than generation, or the folder is
            not empty.
    """
    if not isinstance(config.backend, EndpointConfig):
        raise UserError(
            "batch files are for an endpoint", place="configuration, backend", remedy='set kind to "endpoint"'
        )
    job = prepare(config, limit)
    for estimator in job.estimators:
        if estimator.needs - {"generate"}:
            raise UserError(
                f"{estimator.label} sends requests that a batch file cannot hold",
                place="configuration, estimators",
            )
    exporter = BatchExport(Endpoint(config.backend, None, Budget()), folder)
    with closing(Cache(config.cache_path)) as cache:
        session = Session([exporter], cache, patience=2**62, reasoning_tokens=config.backend.reasoning_tokens)
        asyncio.run(_export(job, session))
    return Exported(exporter.files, exporter.count, session.counts.cached)


async def _export(job: Job, session: Session) -> None:
    async with aclosing(session), aclosing(job.elicit(session)) as records:
        async for _ in records:
            pass


def import_files(config: ElicitConfig, paths: Sequence[Path]) -> Counter[str]:
    """Put the answers of batch output files into the cache; return the number of lines by outcome."""
    with closing(Cache(config.cache_path)) as cache:
        return sum((import_answers(path, cache) for path in paths), Counter[str]())
