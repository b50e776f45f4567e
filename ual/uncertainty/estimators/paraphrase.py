"""Entropy of the answers to several wordings, or option orders, of one question (arXiv 2406.19032)."""

import asyncio
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ual.methods import reliability
from ual.methods.answers import normalize
from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.estimators.sampling import Extract, entropy_record, extract, first_unparsed
from ual.uncertainty.protocol import Ask, Estimator, Reply, Request

_PARAPHRASE = """\
Reword the following question. Keep its meaning, every number and every name. Write the reworded question \
and nothing else.

{question}"""
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(.+)$", re.MULTILINE)


class Paraphrase(Estimator):
    """u = the entropy of the answers in nats: a property of the question.

    "paraphrase" lets the model reword the last user turn; "permute_options" reorders the lines "A. ..." of a
    multiple-choice question and maps each answer back to the option's text. The first wording is the sample's
    own. A question without options, or with a wording that was refused, has no value under its way.
    """

    name: Literal["rewording"] = "rewording"
    by: Literal["paraphrase", "permute_options"] = "paraphrase"
    wordings: Annotated[int, Field(ge=2, le=50)] = 5
    temperature: Annotated[float, Field(ge=0, le=2, description="of the answers")] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 512
    answer: Extract = Field("last_line", description="what is compared, unless options are")
    unparsed: reliability.Unparsed = "class"

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        if self.by == "permute_options":
            return await self._permuted(sample, ask)
        question = sample.prompt[-1].content
        paraphrases = await asyncio.gather(*(ask(self._reword(question, i)) for i in range(1, self.wordings)))
        if unusable := [p for p in paraphrases if not (p.text or "").strip() or p.truncated]:
            evidence = {"unparsed": "a wording was refused, empty or cut off", "reply": unusable[0].shown}
            return Elicited(sample.id, self.label, None, evidence)
        texts = [question, *((p.text or "").strip() for p in paraphrases)]
        replies = await self._answers([_with_question(sample, text) for text in texts], ask)
        answers = [extract(reply, self.answer) for reply in replies]
        return entropy_record(
            sample.id,
            self.label,
            answers,
            self.unparsed,
            first_unparsed(replies, answers) | {"wordings": texts},
        )

    async def _permuted(self, sample: Sample, ask: Ask) -> Elicited:
        question = sample.prompt[-1].content
        options = _OPTION.findall(question)
        letters = "".join(letter for letter, _ in options)
        if len(options) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]:
            return Elicited(sample.id, self.label, None, {"unparsed": "no options A, B, ... in the question"})
        orders = _orders(len(options), self.wordings, seed=sample.id)
        texts = [[options[i][1].strip() for i in order] for order in orders]
        prompts = [_with_question(sample, _reordered(question, text)) for text in texts]
        replies = await self._answers(prompts, ask)
        answers = [_option_text(reply, letters, text) for reply, text in zip(replies, texts, strict=True)]
        evidence: dict[str, Any] = first_unparsed(replies, answers) | {"orders": orders}
        return entropy_record(sample.id, self.label, answers, self.unparsed, evidence)

    def _reword(self, question: str, draw: int) -> Request:
        prompt = Message("user", _PARAPHRASE.format(question=question))
        return Request((prompt,), max_tokens=self.max_tokens, temperature=1.0, draw=draw)

    async def _answers(self, prompts: Sequence[tuple[Message, ...]], ask: Ask) -> list[Reply]:
        requests = [
            Request(prompt, max_tokens=self.max_tokens, temperature=self.temperature) for prompt in prompts
        ]
        return list(await asyncio.gather(*map(ask, requests)))


def _with_question(sample: Sample, question: str) -> tuple[Message, ...]:
    return (*sample.prompt[:-1], replace(sample.prompt[-1], content=question))


def _orders(n: int, wanted: int, seed: str) -> list[list[int]]:
    """Return the given order and then random others, all different, as many as there are."""
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
    if not reply.text or reply.truncated:
        return None
    letter = parsing.option(reply.text, letters)
    if letter is not None:
        return normalize(texts[letters.index(letter)])
    written = normalize(reply.text)
    return written if written in {normalize(text) for text in texts} else None
