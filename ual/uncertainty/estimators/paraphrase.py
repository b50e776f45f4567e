"""Entropy of the answers to several wordings, or option orders, of one question (arXiv 2406.19032)."""

import asyncio
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Annotated, Literal

from pydantic import Field

from ual.methods.answers import normalize
from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.estimators.sampling import EntropyEstimator, Extract, extract
from ual.uncertainty.protocol import NO_ANSWER, Ask, Reply, Request

_PARAPHRASE = """\
Reword the following question. Keep its meaning, every number and every name. Write the reworded question \
and nothing else.

{question}"""
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(.+)$", re.MULTILINE)


class Paraphrase(EntropyEstimator):
    """u = the entropy of the answers to several wordings of the question, in nats.

    The value is a property of the question. `by` "paraphrase" lets the model rewrite the last user turn.
    `by` "permute_options" reorders the lines "A. ..." of a multiple-choice question, and maps each answer
    back to the option's text. The first wording is the sample's own. A question without options, or with a
    paraphrase that was refused, has no value.
    """

    name: Literal["rewording"] = "rewording"
    by: Literal["paraphrase", "permute_options"] = "paraphrase"
    wordings: Annotated[int, Field(ge=2, le=50)] = 5
    temperature: Annotated[float, Field(ge=0, le=2, description="of the answers")] = 0.0
    answer: Extract = Field("last_line", description="what is compared, unless options are")

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        question = sample.prompt[-1].content
        if self.by == "permute_options":
            return await self._permuted(sample, question, ask)
        texts = [question]
        for reply in await paraphrases(question, self.wordings - 1, ask, max_tokens=self.max_tokens):
            if reply.complete is None:
                why = "a paraphrase was refused, empty or truncated"
                return self.no_value(sample, NO_ANSWER if reply.unanswered else why, **reply.evidence)
            texts.append(reply.complete)
        replies = await self._answers(sample, texts, ask)
        answers = [extract(reply, self.answer) for reply in replies]
        return self.entropy(sample, replies, answers, wordings=texts)

    async def _permuted(self, sample: Sample, question: str, ask: Ask) -> Elicited:
        options = _OPTION.findall(question)
        letters = "".join(letter for letter, _ in options)
        if len(options) < 2 or letters != ascii_uppercase[: len(options)]:
            return self.no_value(sample, "no options A, B, ... in the question")
        orders = _orders(len(options), self.wordings, seed=sample.id)
        texts = [[options[i][1].strip() for i in order] for order in orders]
        replies = await self._answers(sample, [_reordered(question, text) for text in texts], ask)
        answers = [_option_text(reply, letters, text) for reply, text in zip(replies, texts, strict=True)]
        return self.entropy(sample, replies, answers, orders=orders)

    async def _answers(self, sample: Sample, questions: Sequence[str], ask: Ask) -> list[Reply]:
        *before, last = sample.prompt
        requests = [
            Request(
                (*before, replace(last, content=question)),
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
            for question in questions
        ]
        return await asyncio.gather(*map(ask, requests))


async def paraphrases(question: str, count: int, ask: Ask, *, max_tokens: int) -> list[Reply]:
    """Return replies that reword a question.

    Raises:
        RequestError: a request failed for good.
    """
    prompt = (Message("user", _PARAPHRASE.format(question=question)),)
    requests = [Request(prompt, max_tokens=max_tokens, temperature=1.0, draw=i) for i in range(1, count + 1)]
    return await asyncio.gather(*map(ask, requests))


def _orders(n: int, wanted: int, seed: str) -> list[list[int]]:
    """Return the original order and then random ones, all different: `wanted`, or as many as there are."""
    shuffle = random.Random(seed)  # noqa: S311  not for secrets
    orders = [list(range(n))]
    for _ in range(50 * wanted):
        if len(orders) == wanted:
            break
        order = shuffle.sample(range(n), n)
        if order not in orders:
            orders.append(order)
    return orders


def _reordered(question: str, texts: Sequence[str]) -> str:
    following = iter(texts)
    return _OPTION.sub(lambda match: match[0][: match.start(2) - match.start()] + next(following), question)


def _option_text(reply: Reply, letters: str, texts: Sequence[str]) -> str | None:
    """Return the text of the option that a reply names, by its letter or by writing it out."""
    if reply.complete is None:
        return None
    letter = parsing.option(reply.complete, letters)
    if letter is not None:
        return normalize(texts[letters.index(letter)])
    written = normalize(reply.complete)
    return written if written in {normalize(text) for text in texts} else None
