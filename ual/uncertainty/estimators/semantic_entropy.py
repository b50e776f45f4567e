"""Entropy of sampled answers over clusters of one meaning (arXiv 2302.09664)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ual.methods import reliability
from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.estimators.sampling import SamplingEstimator, entropy_record, first_unparsed
from ual.uncertainty.protocol import Ask, Reply, Request, Task, conversation

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
    """u = the entropy of M answers in nats, two being alike where each entails the other.

    An answer joins the first cluster whose first answer it entails and is entailed by. Equal texts are not
    compared. `entailment` "nli" asks a classifier (the configuration's `nli`), "llm" the model itself; an
    unreadable verdict counts as "no" and is counted.
    """

    name: Literal["semantic_entropy"] = "semantic_entropy"
    max_tokens: Annotated[int, Field(ge=1)] = 128
    entailment: Literal["nli", "llm"] = "llm"
    unparsed: reliability.Unparsed = Field("class", description="what empty and cut-off answers are")

    @property
    def needs(self) -> frozenset[Task]:
        return frozenset({"generate", "entail"} if self.entailment == "nli" else {"generate"})

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        replies = await self.draw(sample.prompt, ask)
        texts = [_usable(reply) for reply in replies]
        question = conversation(sample.prompt)
        unread = [0]
        clusters: list[list[str]] = []
        for text in dict.fromkeys(text for text in texts if text is not None):
            for cluster in clusters:
                if await self._alike(question, cluster[0], text, ask, unread):
                    cluster.append(text)
                    break
            else:
                clusters.append([text])
        named = {text: cluster[0] for cluster in clusters for text in cluster}
        answers = [None if text is None else named[text] for text in texts]
        evidence: dict[str, Any] = first_unparsed(replies, answers) | {"unread_verdicts": unread[0]}
        return entropy_record(sample.id, self.label, answers, self.unparsed, evidence)

    async def _alike(self, question: str, a: str, b: str, ask: Ask, unread: list[int]) -> bool:
        for first, second in ((a, b), (b, a)):
            if not await self._entails(question, first, second, ask, unread):
                return False
        return True

    async def _entails(self, question: str, first: str, second: str, ask: Ask, unread: list[int]) -> bool:
        if self.entailment == "nli":
            pair = (Message("user", f"{question} {first}"), Message("user", f"{question} {second}"))
            scores = (await ask(Request(pair, task="entail"))).scores or {}
            return max(scores, key=lambda label: scores[label], default="") == "entailment"
        prompt = _PROMPT.format(question=question, first=first, second=second)
        reply = await ask(Request((Message("user", prompt),), max_tokens=8))
        verdict = parsing.yes_or_no(reply.text)
        unread[0] += verdict is None
        return bool(verdict)


def _usable(reply: Reply) -> str | None:
    return None if not (reply.text or "").strip() or reply.truncated else (reply.text or "").strip()
