"""A more capable model rates how uncertain a response is, on an integer scale."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import Ask, Estimator, Reply, Request, Token, conversation

_PROMPT = """\
Below are a question and a response to it. Rate how uncertain the response is: how likely another expert \
would be to give a substantially different response, or to find this one wrong or questionable.

0 means certain: there is one right response, and this is it. {high} means entirely uncertain.

<question>
{question}
</question>

<response>
{response}
</response>

{form}"""
_BARE = "Answer with one integer from 0 to {high} and nothing else."
_JSON = 'Answer with JSON and nothing else: {{"score": <an integer from 0 to {high}>}}'


class Judge(Estimator):
    """u = score / highest score, in [0, 1].

    If the server returns log-probabilities, the score is its expected value over the scale (G-Eval, arXiv
    2303.16634), which avoids ties. The default scale ends at 9, so every score is one token. `read`
    "first_token" takes the expected value over the reply's first token and ignores the text, for models that
    do not follow the format. The evidence holds the probability mass on the scale.
    """

    name: Literal["judge"] = "judge"
    high: Annotated[int, Field(ge=1, le=100, description="the scale is 0 to high")] = 9
    structured: bool = Field(True, description="request JSON with one integer, by a schema")
    top_logprobs: Annotated[int, Field(ge=0, le=20, description="0: use the written score")] = 20
    max_tokens: Annotated[int, Field(ge=1)] = 32
    read: Literal["text", "first_token"] = "text"

    @property
    def needs_logprobs(self) -> bool:
        return self.read == "first_token"

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        reply = await ask(self._request(sample))
        evidence: dict[str, Any] = reply.evidence
        if self.read == "first_token":
            tokens = reply.answer_tokens
            expected = self._over(tokens[0]) if tokens else None
            if expected is None:
                why = parsing.why_no_tokens(reply) or "no score among the likeliest first tokens"
                return self.no_value(sample, why, **evidence)
        else:
            parsed = parsing.integer(reply.answer, low=0, high=self.high, truncated=reply.truncated)
            evidence["score"] = parsed.value
            if parsed.value is None:
                return self.no_value(sample, parsed.reason, **evidence)
            expected = self._expected(reply, int(parsed.value))
        evidence |= expected or {}
        score = evidence["expected" if expected else "score"]
        return Elicited(sample.id, self.label, score / self.high, evidence)

    def _request(self, sample: Sample) -> Request:
        form = (_JSON if self.structured else _BARE).format(high=self.high)
        prompt = _PROMPT.format(
            high=self.high, question=conversation(sample.prompt), response=sample.response, form=form
        )
        schema = {
            "type": "object",
            "properties": {"score": {"type": "integer", "enum": list(range(self.high + 1))}},
            "required": ["score"],
            "additionalProperties": False,
        }
        return Request(
            (Message("user", prompt),),
            max_tokens=self.max_tokens,
            top_logprobs=self.top_logprobs,
            json_schema=schema if self.structured else None,
        )

    def _expected(self, reply: Reply, score: int) -> dict[str, float] | None:
        """Return the expected score over the token that states it, and the probability mass on the scale.

        None if no single token is the score: without log-probabilities, or if the number has two tokens.
        """
        stating = [token for token in reply.answer_tokens if _scale_value(token.text) == score]
        return self._over(stating[0]) if len(stating) == 1 else None

    def _over(self, token: Token) -> dict[str, float] | None:
        mass = [0.0] * (self.high + 1)
        for text, log_prob in token.alternatives:
            value = _scale_value(text)
            if value is not None and 0 <= value <= self.high:
                mass[value] += math.exp(min(log_prob, 0.0))
        total = sum(mass)
        if not total > 0:
            return None
        return {"expected": sum(i * m for i, m in enumerate(mass)) / total, "mass": min(total, 1.0)}


def _scale_value(token: str) -> int | None:
    return int(token) if re.fullmatch(r"\s*[0-9]{1,3}\s*", token, re.ASCII) else None
