"""What an elicitation would ask and cost: prompts, tokens, money; nothing is sent."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ual.config.elicit import ElicitConfig, EndpointConfig
from ual.pipelines.elicit import count, rows
from ual.uncertainty import protocol
from ual.uncertainty.budget import Meter, Prices, Spent
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators.registry import build
from ual.uncertainty.protocol import Estimator, Reply, Request

_BYTES_PER_TOKEN = 4
_NO_SCORES = dict.fromkeys(("nll", "mean_entropy", "max_entropy", "mean_margin"), 0.0)


@dataclass(slots=True)
class Estimate:
    """What one estimator would ask: its first prompts, and the most that it may use."""

    label: str
    prompts: list[str] = field(default_factory=list)
    requests: int = 0
    cached: int = 0
    most: Spent = field(default_factory=Spent)


@dataclass(frozen=True, slots=True)
class DryRun:
    """The estimates, their cost at most, and whether prompt tokens were counted or estimated from bytes."""

    rows: int
    estimates: list[Estimate]
    cost: float
    counted: bool


def dry_run(config: ElicitConfig, *, limit: int | None = None, prompts: int = 1) -> DryRun:
    """Go through the rows as the run would.

    A stage that depends on answers gets made-up ones that all differ: so its requests are the most that there
    may be, and its prompts the shortest. Completions are counted in full length.

    Args:
        config: see `ual.config.elicit`.
        limit: only the first rows.
        prompts: how many of each estimator to keep, for printing.
    """
    estimators = build(config.estimators)
    total = count(config, Path(config.output_dir), limit)
    identity, tokens = _backend(config)
    cache = Cache(config.cache_path) if config.cache_path.is_file() else None
    try:
        estimates = [
            asyncio.run(_walk(config, estimator, limit, prompts, identity, tokens, cache))
            for estimator in estimators
        ]
    finally:
        if cache is not None:
            cache.close()
    most = sum((e.most for e in estimates), Spent())
    prices = Prices()
    if isinstance(config.backend, EndpointConfig):
        prices = Prices(**config.backend.prices.model_dump())
    return DryRun(total, estimates, prices.cost(most), not isinstance(config.backend, EndpointConfig))


def _backend(config: ElicitConfig) -> tuple[Mapping[str, Any], Callable[[Request], int]]:
    if isinstance(config.backend, EndpointConfig):
        from ual.uncertainty.backends.endpoint import Endpoint

        return Endpoint(config.backend, None, Meter()).identity, lambda r: -(-r.size // _BYTES_PER_TOKEN)
    from ual.uncertainty.backends import local

    return local.identity(config.backend), local.token_counter(config.backend)


async def _walk(
    config: ElicitConfig,
    estimator: Estimator,
    limit: int | None,
    prompts: int,
    identity: Mapping[str, Any],
    tokens: Callable[[Request], int],
    cache: Cache | None,
) -> Estimate:
    estimate = Estimate(estimator.label)

    async def ask(request: Request) -> Reply:
        if cache is not None and (reply := cache.get(protocol.key(identity, request))) is not None:
            estimate.cached += 1
            return reply
        estimate.requests += 1
        completion = request.max_tokens if request.task == "generate" else 0
        estimate.most += Spent(1, tokens(request), completion)
        if len(estimate.prompts) < prompts:
            estimate.prompts.append("\n".join(f"[{m.role}] {m.content}" for m in request.messages))
        return Reply(f"(reply {estimate.requests})", scores=_NO_SCORES)

    for _, sample in islice(rows(config), limit):
        await estimator.estimate(sample, ask)
    return estimate
