"""A model states the probability that a response is right; u = 1 - p (arXiv 2305.14975)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ual.records import Elicited, Message, Sample
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import Ask, Estimator, Request, conversation

_QUESTION = "<question>\n{question}\n</question>"
_STATE = """\
{opening}<proposed_answer>
{response}
</proposed_answer>

How likely is it that the proposed answer is right? Answer with a probability between 0.0 and 1.0 and \
nothing else: no words, no explanation."""


class Verbalised(Estimator):
    """u = 1 - the stated probability that the response is right, in one stage or two.

    One stage shows the question and the response. With two stages the model first answers the question, and
    then rates the response in the same conversation.
    """

    name: Literal["verbalised"] = "verbalised"
    stages: Literal[1, 2] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 16
    max_answer_tokens: Annotated[int, Field(ge=1, description="of the first of two stages")] = 512

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        evidence: dict[str, Any] = {}
        messages: tuple[Message, ...]
        if self.stages == 1:
            question = _QUESTION.format(question=conversation(sample.prompt)) + "\n\n"
            messages = (Message("user", _STATE.format(opening=question, response=sample.response)),)
        else:
            own = await ask(Request(sample.prompt, max_tokens=self.max_answer_tokens))
            evidence["own_answer"] = own.shown
            if not own.answer:
                return self.no_value(sample, parsing.why_no_text(own), **evidence)
            final = Message("user", _STATE.format(opening="", response=sample.response))
            messages = (*sample.prompt, Message("assistant", own.answer), final)
        reply = await ask(Request(messages, max_tokens=self.max_tokens))
        parsed = parsing.probability(reply.answer, truncated=reply.truncated)
        evidence |= reply.evidence | {"confidence": parsed.value}
        if parsed.value is None:
            return self.no_value(sample, parsed.reason, **evidence)
        return Elicited(sample.id, self.label, 1 - parsed.value, evidence)
