"""Entropy of sampled answers over clusters of equal meaning (arXiv 2302.09664)."""

from typing import Annotated, Literal

from pydantic import Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.estimators.sampling import SamplingEstimator
from ual.uncertainty.protocol import Ask, Request, Task, conversation

_PROMPT = """\
<question>
{question}
</question>

<first_answer>
{first}
</first_answer>

<second_answer>
{second}
</second_answer>

Does the first answer, taken as an answer to the question, imply the second one? Answer yes or no."""


class SemanticEntropy(SamplingEstimator):
    """u = the entropy of M answers in nats; two answers are equal if each entails the other.

    An answer joins the first cluster whose first answer it entails and is entailed by. Equal texts are not
    compared. With `entailment` "nli" a classifier decides (the configuration's `nli`), with "llm" the model
    itself. An unreadable verdict counts as "no"; the evidence holds the number of such verdicts.
    """

    name: Literal["semantic_entropy"] = "semantic_entropy"
    max_tokens: Annotated[int, Field(ge=1)] = 128
    entailment: Literal["nli", "llm"] = "llm"

    @property
    def needs(self) -> frozenset[Task]:  # type: ignore[override]  # depends on an option
        return frozenset({"generate", "entail"} if self.entailment == "nli" else {"generate"})

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        replies = await self.draw(sample.prompt, ask)
        texts = [reply.complete for reply in replies]
        question = conversation(sample.prompt)
        verdicts: list[bool | None] = []
        first_of: dict[str, str] = {}  # the first text of each text's cluster
        for text in texts:
            if text is None or text in first_of:
                continue
            for first in dict.fromkeys(first_of.values()):
                if await self._alike(question, first, text, ask, verdicts):
                    first_of[text] = first
                    break
            else:
                first_of[text] = text
        answers = [text and first_of[text] for text in texts]
        return self.entropy(sample, replies, answers, unread_verdicts=verdicts.count(None))

    async def _alike(self, question: str, a: str, b: str, ask: Ask, verdicts: list[bool | None]) -> bool:
        for first, second in ((a, b), (b, a)):
            verdicts.append(await self._entails(question, first, second, ask))
            if not verdicts[-1]:
                return False
        return True

    async def _entails(self, question: str, first: str, second: str, ask: Ask) -> bool | None:
        if self.entailment == "nli":
            pair = (Message("user", f"{question} {first}"), Message("user", f"{question} {second}"))
            scores = (await ask(Request(pair, task="entail"))).scores or {}
            return max(scores, key=lambda label: scores[label], default="") == "entailment"
        prompt = _PROMPT.format(question=question, first=first, second=second)
        reply = await ask(Request((Message("user", prompt),), max_tokens=8))
        return parsing.yes_or_no(reply.answer)
