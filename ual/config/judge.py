"""The configuration of a judge of pairs of answers: the backend that compares them, and the budget."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ual.config.base import Fraction, Section, UserPath
from ual.config.elicit import BudgetConfig, EndpointConfig, LocalConfig, Positive


class JudgeConfig(Section):
    """A model that compares two answers to an instruction, in both orders."""

    backend: Annotated[EndpointConfig | LocalConfig, Field(discriminator="kind")] = Field(
        description="as `backend` of `ual elicit`"
    )
    budget: BudgetConfig = BudgetConfig()
    max_tokens: Positive = Field(16, description="of a reply, without backend.reasoning_tokens")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = Field(
        5, description="likeliest first tokens to ask for; 0: read verdicts from texts only"
    )
    read: Literal["text", "first_token"] = Field(
        "text", description="first_token: ignore the text, for a model that does not reply with one letter"
    )
    max_failed: Fraction = Field(
        0.1, description="the share of comparisons that may be missing because requests failed"
    )
    cache: UserPath | None = Field(
        None, description="the file of replies; null: replies.sqlite in the folder of the results"
    )

    def cache_path(self, folder: Path) -> Path:
        """Return the file of replies, of results in `folder`."""
        return Path(self.cache or folder / "replies.sqlite")
