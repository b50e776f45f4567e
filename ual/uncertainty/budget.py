"""What requests have cost, and the caps that a run never exceeds."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ual.config.elicit import BudgetConfig, PricesConfig

_NO_CAPS, _FREE = BudgetConfig(), PricesConfig()


class BudgetReachedError(Exception):
    """The next request might exceed the budget, and no request is in flight that could leave room."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Requests sent, retries included, and tokens used."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def __sub__(self, other: "Spent") -> "Spent":
        return self + Spent(-other.requests, -other.prompt_tokens, -other.completion_tokens)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Budget:
    """Counts what is spent, and delays or refuses a request that might exceed the caps.

    A request reserves the most that it may cost before it is sent. It waits while other requests are in
    flight, which may cost less than they reserved. When none is in flight, the budget is reached.

    Args:
        caps: on the sum of everything spent, `before` included.
        prices: of the model.
        before: what earlier processes of this run spent.
        note: called with every expense, to record it.
    """

    def __init__(
        self,
        caps: BudgetConfig = _NO_CAPS,
        prices: PricesConfig = _FREE,
        before: Spent = Spent(),
        note: Callable[[Spent], None] = lambda _: None,
    ) -> None:
        self._caps, self._prices, self._before, self._note = caps, prices, before, note
        self.spent = Spent()
        """What this process has spent."""
        self._reserved, self._in_flight = Spent(), 0
        self._settled = asyncio.Condition()

    @property
    def total(self) -> Spent:
        """What all processes of this run have spent."""
        return self._before + self.spent

    def cost(self, spent: Spent) -> float:
        """Return the cost in the currency of the prices."""
        prompt, completion = self._prices.prompt, self._prices.completion
        return (prompt * spent.prompt_tokens + completion * spent.completion_tokens) / 1e6

    async def reserve(self, most: Spent) -> None:
        """Wait until `most` fits into the budget.

        Raises:
            BudgetReachedError: it does not fit, and no request is in flight.
        """
        async with self._settled:
            while not self._allows(self.total + self._reserved + most):
                if not self._in_flight:
                    raise BudgetReachedError
                await self._settled.wait()
            self._reserved, self._in_flight = self._reserved + most, self._in_flight + 1

    async def settle(self, most: Spent, used: Spent) -> None:
        """Replace what was reserved by what was used."""
        async with self._settled:
            self._reserved, self._in_flight = self._reserved - most, self._in_flight - 1
            self.spent += used
            self._note(used)
            self._settled.notify_all()

    def _allows(self, spent: Spent) -> bool:
        caps = self._caps
        used = ((caps.requests, spent.requests), (caps.tokens, spent.tokens), (caps.money, self.cost(spent)))
        return all(cap is None or amount <= cap for cap, amount in used)
