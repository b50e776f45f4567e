"""Providers that are incorrect, slow, broken, too large, or not installed."""

import time

from torch import Tensor

from benchmarks import providers
from benchmarks.problems import Case
from benchmarks.providers import Loss, MissingError, Provider, Solves, naive


def ignores_smoothing(c: Case) -> Tensor:
    return naive(c._replace(smoothing=0.0))


def drops_a_token(c: Case) -> Tensor:
    return naive(c._replace(hidden=c.hidden * (c.target != c.target[-1])[:, None]))


def sleeps(c: Case) -> Tensor:
    time.sleep(0.05)
    return naive(c)


def raises(c: Case) -> Tensor:
    raise ZeroDivisionError("by design")


def too_large(c: Case) -> Tensor:
    raise MemoryError("by design")


def missing() -> Loss:
    raise MissingError("stranger is not installed: pip install stranger")


providers.PROVIDERS += (
    Provider("sleeps", Solves.PER_TOKEN, lambda: sleeps),
    Provider("ignores smoothing", Solves.PER_TOKEN, lambda: ignores_smoothing),
    Provider("drops a token", Solves.PER_TOKEN, lambda: drops_a_token),
    Provider("raises", Solves.PER_TOKEN, lambda: raises),
    Provider("too large", Solves.PER_TOKEN, lambda: too_large),
    Provider("missing", Solves.PER_TOKEN, missing),
)
