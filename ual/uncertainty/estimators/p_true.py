"""P(True): the probability that a model gives to "this answer is right" (arXiv 2207.05221)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import Ask, Estimator, Request, conversation

_PROMPT = """\
Question: {question}

Proposed answer: {response}

Is the proposed answer:
A. True
B. False

Answer with A or B and nothing else."""


class PTrue(Estimator):
    """u = 1 - p(A) / (p(A) + p(B)) at the first token of the reply.

    The reply's text is not read. Without log-probabilities, or if neither letter is among the likeliest
    tokens, there is no value.
    """

    name: Literal["p_true"] = "p_true"
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 20

    @property
    def needs_logprobs(self) -> bool:
        return True

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        prompt = _PROMPT.format(question=conversation(sample.prompt), response=sample.response)
        reply = await ask(Request((Message("user", prompt),), max_tokens=1, top_logprobs=self.top_logprobs))
        mass = {"A": 0.0, "B": 0.0}
        tokens = reply.answer_tokens
        for text, log_prob in tokens[0].alternatives if tokens else ():
            if text.strip() in mass:
                mass[text.strip()] += math.exp(min(log_prob, 0.0))
        evidence: dict[str, Any] = reply.evidence | {"mass": sum(mass.values())}
        if not sum(mass.values()) > 0:
            why = parsing.why_no_tokens(reply) or "neither A nor B among the likeliest tokens"
            return self.no_value(sample, why, **evidence)
        p_true = mass["A"] / sum(mass.values())
        return Elicited(sample.id, self.label, 1 - p_true, evidence | {"p_true": p_true})
