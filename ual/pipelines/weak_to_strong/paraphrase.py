"""Other wordings of questions, written by a model through any elicitation backend."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Literal

from ual.config.elicit import EndpointConfig, LocalConfig
from ual.data.tasks import Item
from ual.errors import UserError
from ual.pipelines.elicit import backend
from ual.records import Elicited, Message, Sample
from ual.uncertainty.budget import Budget
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators.paraphrase import paraphrases
from ual.uncertainty.protocol import Ask, Estimator
from ual.uncertainty.session import Session, elicit

_MANY_MISSING = 0.1  # of the questions; more are an error


def paraphrase(
    items: Sequence[Item],
    count: int,
    config: EndpointConfig | LocalConfig,
    cache: Path,
    *,
    max_tokens: int,
    environment: Mapping[str, str],
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, list[str]]:
    """Return up to `count` paraphrases of every question, by its id.

    Args:
        items: the questions.
        count: of paraphrases; refused, empty and truncated replies are left out.
        config: the model that writes them.
        cache: the file of replies; a reply in it is not requested again.
        max_tokens: of a paraphrase.
        environment: holds the key that `config.api_key_env` names.
        trust_remote_code: run code from a local model's repository.
        notice: called with what the user is told once.
        advance: called with the number of questions done.

    Raises:
        FailedRequestsError: many consecutive requests failed.
        UserError: a key or a model is missing, or more than a tenth of the questions has no paraphrase.
    """

    async def work() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        session = Session(
            [backend(config, Budget(), environment, trust_remote_code=trust_remote_code)],
            replies,
            reasoning_tokens=config.reasoning_tokens,
            notice=notice,
        )
        slots = config.concurrency if isinstance(config, EndpointConfig) else config.batch_size
        questions = (
            (item, Sample(item.id, (Message("user", item.question), Message("assistant", ""))))
            for item in items
        )
        estimators = [_Paraphrases(count=count, max_tokens=max_tokens)]
        records = elicit(questions, estimators, session, window=4 * slots)
        async with aclosing(session), aclosing(records):
            async for item, _, [record] in records:
                found[item.id] = list(record.evidence.get("paraphrases", ()))
                advance(1)
        return found

    with closing(Cache(cache)) as replies:
        found = asyncio.run(work())
    missing = sum(not texts for texts in found.values())
    if missing > _MANY_MISSING * len(found):
        raise UserError(
            f"{missing} of {len(found)} questions have no paraphrase: requests failed, or replies were empty",
            place="configuration, ask.backend",
            remedy="repair the backend and run the same command again; replies are in the cache",
        )
    return found


class _Paraphrases(Estimator):
    """Collects paraphrases of a question as evidence; it has no value."""

    name: Literal["paraphrases"] = "paraphrases"
    count: int
    max_tokens: int

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        replies = await paraphrases(sample.prompt[-1].content, self.count, ask, max_tokens=self.max_tokens)
        texts = [text for reply in replies if (text := reply.complete) is not None]
        return self.no_value(sample, None, paraphrases=texts)
