"""The configuration of `ual elicit`: samples, estimators, the backend that answers, the budget."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from ual.config.base import CommandConfig, Fraction, Section, UserPath, from_name
from ual.config.run import Files, ModelConfig, Reading

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Price = Annotated[float, Field(ge=0)]
ReasoningTokens = Annotated[
    int, Field(ge=0, le=2**20, description="added to the token limit of each reply, for a model that reasons")
]


def _sendable(body: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected values that JSON has, without NaN, infinity and dates: {error}"
        ) from error
    return body


class RowsConfig(Reading):
    """The source of the samples. A JSON array is read into memory; all else is streamed."""

    path: Files = Field(description="as `data.train` of `ual train`")
    split: str = "train"
    label: str | None = Field(None, description="a column that says whether the response is right, if any")


class PricesConfig(Section):
    """Money per million tokens, in any currency."""

    prompt: Price = 0.0
    completion: Price = 0.0


class EndpointConfig(Section):
    """A server that speaks the OpenAI chat-completions protocol."""

    kind: Literal["endpoint"] = "endpoint"
    model: str
    base_url: Annotated[str, AfterValidator(lambda url: url.rstrip("/"))] = "https://api.openai.com/v1"
    api_key_env: str | None = Field(None, description="the environment variable that holds the key")
    api_key_file: UserPath | None = Field(None, description="the file that holds the key")
    concurrency: Annotated[int, Field(ge=1, le=2048)] = 16
    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    timeout: PositiveFloat = Field(60.0, description="seconds for a complete reply")
    max_retries: Annotated[int, Field(ge=0, le=20)] = 6
    max_response_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed: int | None = Field(0, description="sent with each request, plus the draw's number; null: not sent")
    omit: list[str] = Field([], description="fields that this server refuses, such as temperature")
    reasoning_effort: str | None = Field(None, description="sent with each request; null: not sent")
    reasoning_tokens: ReasoningTokens = 0
    extra_body: Annotated[dict[str, Any], AfterValidator(_sendable)] = Field(
        {}, description="additional fields of each request"
    )
    prices: PricesConfig = PricesConfig()
    allow_plain_http: bool = False


class LocalConfig(Section):
    """A Transformers model on this machine."""

    kind: Literal["local"]
    model: Annotated[ModelConfig, from_name("path")]
    batch_size: Positive = 8
    max_length: Positive = Field(2048, description="tokens of a prompt and its reply; a longer request fails")
    reasoning_tokens: ReasoningTokens = 0
    chat_template: UserPath | None = Field(
        None, description="'chatml', 'plain', or a Jinja file; null: the model's"
    )
    seed: int = 0
    device: str | None = Field(None, description="such as cpu or cuda:0; null: the GPU if there is one")


class BudgetConfig(Section):
    """Caps on what a run may spend, over all its restarts; null is no cap."""

    requests: Positive | None = None
    tokens: Positive | None = None
    money: PositiveFloat | None = None


class ElicitConfig(CommandConfig):
    """One elicitation. Every estimator sees every sample; the first one's value becomes `uncertainty`."""

    command = "elicit"
    example = "data: FILE.jsonl / backend: {kind: endpoint, model: NAME}"
    short: ClassVar[Mapping[str, str]] = {"data": "path", "model": "path", "nli": "path"}

    data: Annotated[RowsConfig, from_name("path")]
    backend: Annotated[EndpointConfig | LocalConfig, Field(discriminator="kind")]
    estimators: list[str | dict[str, Any]] = Field(["judge"], min_length=1)
    nli: Annotated[ModelConfig, from_name("path")] | None = Field(
        None, description="a sequence classifier of entailment, for semantic_entropy"
    )
    budget: BudgetConfig = BudgetConfig()
    max_failed: Fraction = Field(
        0.1, description="the share of an estimator's values that may be missing because requests failed"
    )
    cache: UserPath | None = Field(
        None, description="the file of replies; null: replies.sqlite in output_dir"
    )

    @property
    def prices(self) -> PricesConfig:
        return self.backend.prices if isinstance(self.backend, EndpointConfig) else PricesConfig()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache or Path(self.output_dir) / "replies.sqlite")
