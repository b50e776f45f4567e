"""What asking has cost, and the budget that it never exceeds."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


class BudgetReachedError(Exception):
    """The next request might exceed the budget; none is under way that could leave room."""


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


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens, in any one currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, spent: Spent) -> float:
        return (self.prompt * spent.prompt_tokens + self.completion * spent.completion_tokens) / 1e6


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps; None is no cap."""

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None

    def allows(self, spent: Spent, prices: Prices) -> bool:
        caps = (
            (self.requests, spent.requests),
            (self.tokens, spent.tokens),
            (self.money, prices.cost(spent)),
        )
        return all(cap is None or used <= cap for cap, used in caps)


class Meter:
    """Counts what is spent and holds back what would exceed the budget.

    A request reserves the most that it may cost before it is sent. While others are under way that may cost
    less than they reserved, it waits; when none is, the budget is reached.

    Args:
        budget: caps on the sum of everything spent, `before` included.
        prices: of the model.
        before: what earlier processes of this run spent.
        note: called with every expense, to keep it.
    """

    def __init__(
        self,
        budget: Budget = Budget(),
        prices: Prices = Prices(),
        before: Spent = Spent(),
        note: Callable[[Spent], None] = lambda _: None,
    ) -> None:
        self.budget, self.prices, self.before, self.spent = budget, prices, before, Spent()
        self._note = note
        self._held, self._under_way = Spent(), 0
        self._settled = asyncio.Condition()

    @property
    def cost(self) -> float:
        """What this process spent, in money."""
        return self.prices.cost(self.spent)

    async def reserve(self, most: Spent) -> None:
        """Wait until `most` fits into the budget.

        Raises:
            BudgetReachedError: it does not, and nothing is under way.
        """
        async with self._settled:
            while not self.budget.allows(self.before + self.spent + self._held + most, self.prices):
                if not self._under_way:
                    raise BudgetReachedError
                await self._settled.wait()
            self._held, self._under_way = self._held + most, self._under_way + 1

    async def settle(self, most: Spent, used: Spent) -> None:
        """Replace what was reserved by what was used."""
        async with self._settled:
            self._held, self._under_way = self._held - most, self._under_way - 1
            self.spent += used
            self._note(used)
            self._settled.notify_all()
