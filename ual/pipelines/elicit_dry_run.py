"""What an elicitation would send and cost: prompts, tokens, money. Nothing is sent."""

import asyncio
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

from ual.config.elicit import ElicitConfig, LocalConfig
from ual.pipelines.elicit import Job, backends, prepare
from ual.uncertainty.budget import Budget, Spent
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Estimator, Reply, Request
from ual.uncertainty.session import recall

_BYTES_PER_TOKEN = 4
_NO_SCORES = dict.fromkeys(("nll", "mean_entropy", "max_entropy", "mean_margin"), 0.0)


@dataclass(slots=True)
class Estimate:
    """What one estimator would send: its first prompt, and the most that it may use."""

    label: str
    prompt: str = ""
    requests: int = 0
    cached: int = 0
    most: Spent = field(default_factory=Spent)


@dataclass(frozen=True, slots=True)
class DryRun:
    """The estimates, their maximum cost, and whether a tokenizer counted the prompts' tokens."""

    rows: int
    estimates: list[Estimate]
    cost: float
    counted: bool


def dry_run(config: ElicitConfig, *, limit: int | None = None) -> DryRun:
    """Process the samples as the run would, with made-up replies where the cache has none.

    All made-up replies differ. A stage that depends on replies therefore sends as many requests as it can,
    with the shortest prompts. Completions are counted at their full length.
    """
    job = prepare(config, limit)
    reasoning_tokens = config.backend.reasoning_tokens
    stand_ins = backends(job, Budget(), {}, replay=True)
    tokens: Callable[[Request], int] = _estimated_tokens
    if counted := isinstance(config.backend, LocalConfig):
        from ual.uncertainty.backends import local

        tokens = local.token_counter(config.backend)
    path = config.cache_path
    with closing(Cache(path)) if path.is_file() else nullcontext() as cache:

        def cached(request: Request) -> Reply | None:
            identity = next(backend.identity for backend in stand_ins if request.task in backend.tasks)
            return None if cache is None else recall(cache, identity, request, reasoning_tokens)[1]

        estimates = [asyncio.run(_walk(job, e, cached, tokens)) for e in job.estimators]
    cost = Budget(prices=config.prices).cost(sum((e.most for e in estimates), Spent()))
    return DryRun(job.total, estimates, cost, counted)


def _estimated_tokens(request: Request) -> int:
    return -(-request.size // _BYTES_PER_TOKEN)


async def _walk(
    job: Job,
    estimator: Estimator,
    cached: Callable[[Request], Reply | None],
    tokens: Callable[[Request], int],
) -> Estimate:
    estimate = Estimate(estimator.label)

    async def ask(request: Request) -> Reply:
        if (reply := cached(request)) is not None:
            estimate.cached += 1
            return reply
        estimate.requests += 1
        completion = (
            request.max_tokens + job.config.backend.reasoning_tokens if request.task == "generate" else 0
        )
        estimate.most += Spent(1, tokens(request), completion)
        if not estimate.prompt:
            estimate.prompt = "\n".join(f"[{m.role}] {m.content}" for m in request.messages)
        return Reply(f"(reply {estimate.requests})", scores=_NO_SCORES)

    for _, sample in job.samples():
        await estimator.estimate(sample, ask)
    return estimate
