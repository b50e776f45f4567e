"""A model's probabilities of short answers, for training on them (distillation)."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import Ask, Estimator, Reply, Request, Token

_NO_ANSWER = re.compile(r"|.*\ufffd.*|<[^<>\s]+>", re.DOTALL)  # blank, part of a character, a special token


def _distinct(options: Any) -> Any:
    if options is None:
        return None
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError("expected a list of at least two texts, or null")
    for option in options:
        if not isinstance(option, str):
            raise ValueError(f"expected texts, got {option!r}; YAML needs quotes around yes, no and numbers")
    options = [option.strip() for option in options]
    if not all(options) or len(set(options)) < len(options):
        raise ValueError(f"expected distinct texts that are not blank, got {options}")
    return options


class AnswerDistribution(Estimator):
    """u = the entropy, in nats, of a model's distribution over answers of one token to the sample's prompt.

    The samples get two columns. `label_distribution` is {text: probability}, from the likeliest tokens in the
    place of the answer, renormalized to a sum of 1. `label_mass` is the sum before. The rest belongs to
    tokens outside the top k, and to texts that are no answers. Texts are compared without surrounding
    white space, and the probabilities of equal texts add up.

    A reply of several tokens has no distribution, because the texts are then only beginnings of answers.
    `read` "first_token" uses the first token of any reply, for answers that differ in their first token.
    `options` are in every distribution, with probability 0 if they are not among the likeliest tokens.
    Without them, every text is an answer, except blank ones, parts of a character and texts such as "</s>".
    """

    name: Literal["answer_distribution"] = "answer_distribution"
    options: Annotated[list[str], BeforeValidator(_distinct)] | None = Field(
        None, description="the texts that are answers; null: all"
    )
    instruction: str = Field("", description="is added to the prompt, after an empty line")
    read: Literal["answer", "first_token"] = "answer"
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 20
    max_tokens: Annotated[int, Field(ge=2, description="of a reply, for read: answer")] = 4

    rates: ClassVar[Literal["response", "question"]] = "question"
    columns: ClassVar[tuple[str, ...]] = ("label_distribution", "label_mass")

    @property
    def needs_logprobs(self) -> bool:
        return True

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        first_only = self.read == "first_token"
        reply = await ask(
            Request(
                self._prompt(sample),
                max_tokens=1 if first_only else self.max_tokens,
                top_logprobs=self.top_logprobs,
            )
        )
        if why := parsing.why_no_tokens(reply):
            return self.no_value(sample, why, **reply.evidence)
        token = reply.answer_tokens[0]
        if not first_only and (why := _why_several(reply, token)):
            return self.no_value(sample, why, **reply.evidence)
        found = self._distribution(token)
        mass = math.fsum(found.values())
        evidence: dict[str, Any] = reply.evidence | {"label_mass": min(mass, 1.0)}
        if not mass > 0:
            return self.no_value(sample, "no answer among the likeliest tokens", **evidence)
        shares = {text: p / mass for text, p in found.items()}
        entropy = -math.fsum(p * math.log(p) for p in shares.values() if p > 0)
        return Elicited(sample.id, self.label, max(entropy, 0.0), evidence | {"label_distribution": shares})

    def _prompt(self, sample: Sample) -> tuple[Message, ...]:
        if not self.instruction:
            return sample.prompt
        *before, last = sample.prompt
        if last.role != "user":
            return (*sample.prompt, Message("user", self.instruction))
        return (*before, Message("user", f"{last.content}\n\n{self.instruction}"))

    def _distribution(self, token: Token) -> dict[str, float]:
        """Return the answers' probabilities, the likeliest first; 0 for options beyond the top k."""
        found = dict.fromkeys(self.options or (), 0.0)
        for raw, log_prob in token.alternatives:
            text = raw.strip()
            if text in self.options if self.options else not _NO_ANSWER.fullmatch(text):
                found[text] = found.get(text, 0.0) + math.exp(min(log_prob, 0.0))
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _why_several(reply: Reply, first: Token) -> str | None:
    """Return why a reply is not one token of text; None if it is."""
    if reply.text is None or not (reply.answer or "").strip():
        return parsing.why_no_text(reply)
    return None if reply.complete == first.text.strip() else "several tokens"
