"""Which of two models answers better: a judge compares their answers, in both orders, through any backend.

Answers are files in AlpacaEval's format (`ual.pipelines.outputs`). The folder of the results holds

    annotations.json  AlpacaEval's annotations: an object for each instruction. `output_1` is the reference's
                      answer, `output_2` the model's. `preference` is 1 + the model's share, null without one
    judgments.jsonl   for each instruction and order: the verdict, how it was read, and the reply
    summary.json      win rate, position bias, lengths, requests, cost
    replies.sqlite    the cache, unless another file is named
"""

import asyncio
import math
import re
import unicodedata
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ual.config.elicit import EndpointConfig, LocalConfig, PricesConfig
from ual.config.judge import JudgeConfig
from ual.errors import FailedRequestsError, UserError
from ual.evaluate.preferences import Preferences
from ual.files import write_json, write_jsonl, writing
from ual.pipelines.elicit import backend, quiet
from ual.pipelines.outputs import Pair, pairs
from ual.records import Elicited, Message, Sample
from ual.runs.lock import holding
from ual.uncertainty.budget import Budget, BudgetReachedError
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators import parsing
from ual.uncertainty.protocol import Ask, Estimator, NotRecordedError, Reply, Request, RequestError
from ual.uncertainty.session import Counts, Session, elicit

PROMPT_VERSION = 1
"""Of the prompt below; it is part of the annotator's name, because win rates by other prompts differ."""

_PROMPT = """\
Below are an instruction and two answers to it. Decide which answer is better: more correct, more helpful, \
and closer to what the instruction asks for. Neither the length of an answer nor its place is a merit.

<instruction>
{instruction}
</instruction>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Reply with one letter and nothing else: A if answer A is better, B if answer B is better, C if they are \
equally good."""
_SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}
_FIRST = 20  # replies without any verdict after which a run stops
_LONGEST_DRAIN = 3600.0  # seconds; each request has its own deadline
_LONGEST = 20_000  # characters read; the length of a reply is the server's choice

_BEFORE = r"(?:the|my|final|better|best|answer|option|response|verdict|winner|choice|one|is)\W+"
_AFTER = r"(?:\W+is(?:\W+the)?\W+better(?:\W+(?:answer|one|option|response))?)?"
_STATED = re.compile(rf"\W*(?i:{_BEFORE})*([ABC])(?i:{_AFTER})\W*")
_SMALL = re.compile(r"\W*([abc])\W*")
_TIE = re.compile(
    r"\W*(?:it(?: is|'s) )?(?:a )?(?:tie|draw)\W*|\W*(?:both |they )?(?:answers )?(?:are )?equally good\W*",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"\[\[\s*([ABC])\s*\]\]")

Progress = Callable[[int, int, Counts], None]
"""Takes the number of comparisons done, the number of all comparisons, and the counts of requests."""


# ---- a verdict ----


def verdict(text: str, *, truncated: bool = False) -> str | None:
    r"""Return "A", "B" or, for a tie, "C"; None if a reply states none of them, or several.

    A letter counts if a line of the reply, the first or the last one, states nothing else, or if it stands in
    double brackets. A letter within a sentence does not count: "A longer answer is not better".

    Args:
        text: the reply without reasoning.
        truncated: the reply was cut off, so its last line is not read.

    >>> [verdict(t) for t in ("B", "**Answer: A**", "The better answer is B.", "It is a tie", "A longer one")]
    ['B', 'A', 'B', 'C', None]
    >>> verdict("[[A]]\nIt is more helpful."), verdict("A\n\nFinal answer: B")
    ('A', None)
    """
    text = unicodedata.normalize("NFKC", text[:_LONGEST])
    if truncated:
        text = text[: text.rfind("\n") + 1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = set(_BRACKETED.findall(text))
    for line in {*lines[:1], *lines[-1:]}:
        if stated := _STATED.fullmatch(line) or (_SMALL.fullmatch(line) if len(lines) == 1 else None):
            found.add(stated[1].upper())
        elif _TIE.fullmatch(line):
            found.add("C")
    return found.pop() if len(found) == 1 else None


class _Compares(Estimator):
    """The value is the probability that the answer shown first is better; a tie is 1/2.

    Where the reply's first token is its verdict, the value is an expectation over the likeliest tokens there.
    With `read` "first_token" it always is, and the text is ignored.
    """

    name: Literal["compares"] = "compares"
    max_tokens: int
    top_logprobs: int
    read: Literal["text", "first_token"]

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        request = Request(sample.prompt, max_tokens=self.max_tokens, top_logprobs=self.top_logprobs)
        reply = await ask(request)
        stated = verdict(reply.answer or "", truncated=reply.truncated)
        by_token = _expected(reply, stated, whatever=self.read == "first_token")
        evidence: dict[str, Any] = {"verdict": stated} | reply.evidence
        if by_token is not None:
            value, evidence["mass"] = by_token
            return Elicited(sample.id, self.label, value, evidence | {"read": "probability"})
        if self.read == "first_token":
            why = parsing.why_no_tokens(reply) or "no verdict among the likeliest first tokens"
        elif stated is not None:
            return Elicited(sample.id, self.label, _SHARES[stated], evidence | {"read": "text"})
        else:
            why = parsing.why_no_text(reply) if reply.complete is None else "no verdict, or several"
        return self.no_value(sample, why, **evidence)


def _expected(reply: Reply, stated: str | None, *, whatever: bool) -> tuple[float, float] | None:
    """Return the expected share of the first answer, and the probability mass on the three letters.

    Args:
        reply: with or without log-probabilities.
        stated: the verdict of its text.
        whatever: also where the first token is not the verdict.

    Returns:
        None if the first token does not count, or no letter is among the likeliest tokens in its place.
    """
    tokens = reply.answer_tokens
    if not tokens or not (whatever or tokens[0].text.strip() == stated):
        return None
    mass = dict.fromkeys(_SHARES, 0.0)
    for text, log_prob in tokens[0].alternatives:
        if text.strip() in mass:
            mass[text.strip()] += math.exp(min(log_prob, 0.0))
    total = sum(mass.values())
    if not total > 0:
        return None
    return sum(_SHARES[letter] * p for letter, p in mass.items()) / total, min(total, 1.0)


# ---- all comparisons ----


@dataclass(slots=True)
class _Found:
    """The model's share when it is shown first, and second, NaN without a verdict; what was replied."""

    shares: dict[str, list[float]]
    judgments: list[dict[str, Any]] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)

    def add(self, i: int, order: str, record: Elicited) -> None:
        if record.value is None:
            self.missing[str(record.evidence.get("unparsed"))] += 1
        else:
            self.shares[order][i] = record.value if order == "first" else 1 - record.value
            self.read[str(record.evidence["read"])] += 1
        self.judgments.append({"i": i, "model_shown": order, "first_better": record.value, **record.evidence})


def judge(
    model: Path,
    reference: Path,
    config: JudgeConfig,
    folder: Path,
    *,
    environment: Mapping[str, str],
    limit: int | None = None,
    replay: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
    notice: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare two files of answers, write the results into `folder`, and return the content of summary.json.

    Replies are in the cache before they are used, so the same command resumes after a kill and pays for no
    reply twice.

    Args:
        model: the file of the model's answers.
        reference: the file of the answers that it is compared with.
        config: the judge.
        folder: of the results.
        environment: holds the key that `backend.api_key_env` names.
        limit: only the first instructions of the model's file; recorded in the summary.
        replay: send nothing; a comparison that the cache does not hold has no verdict.
        trust_remote_code: run code from a local model's repository.
        progress: called after every comparison.
        notice: called with what the user is told once.

    Raises:
        FailedRequestsError: many consecutive requests failed, the first replies have no verdict, or too many
            verdicts are missing because requests failed. In the last case, the files are written.
        UserError: the files do not match, the budget is reached, or another process uses the folder.
    """
    quiet()
    if config.read == "first_token" and (_omits_logprobs(config.backend) or not config.top_logprobs):
        raise UserError(
            "read: first_token needs log-probabilities, and top_logprobs is 0 or in backend.omit",
            place="configuration, judge",
            remedy='set read to "text", or top_logprobs to 20',
        )
    names, compared = pairs(model, reference, limit)
    asked, run_id = config.backend, str(folder.resolve())
    with holding(folder, "a comparison", notice), closing(Cache(config.cache_path(folder))) as cache:
        prices = asked.prices if isinstance(asked, EndpointConfig) else PricesConfig()
        budget = Budget(config.budget, prices, cache.spent(run_id), lambda spent: cache.note(run_id, spent))
        session = Session(
            [backend(asked, budget, environment, replay=replay, trust_remote_code=trust_remote_code)],
            cache,
            patience=2**62 if replay else 20,
            reasoning_tokens=asked.reasoning_tokens,
            logprobs=False,  # a verdict needs none
            notice=notice,
        )
        found = asyncio.run(_compare(compared, config, session, budget, progress))
        about = {
            "model": names[0],
            "reference": names[1],
            "annotator": f"ual_pairwise_v{PROMPT_VERSION}/{_name(asked)}",
            "limit": limit,
        }
        summary = _write(folder, compared, found, about, _spent(found, session, budget))
    _check(summary, config.max_failed)
    return summary


def _write(
    folder: Path, compared: Sequence[Pair], found: _Found, about: Mapping[str, Any], spent: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files of the results, and return the summary."""
    preferences = Preferences.of(
        found.shares["first"],
        found.shares["second"],
        [len(pair.model) for pair in compared],
        [len(pair.reference) for pair in compared],
    )
    summary = {**about, **asdict(preferences.summary()), **spent}
    names = about["model"], about["reference"], about["annotator"]
    with writing("the comparison", folder, "free some space, then run the same command again"):
        write_json(folder / "annotations.json", annotations(compared, preferences, *names))
        write_jsonl(folder / "judgments.jsonl", found.judgments)
        write_json(folder / "summary.json", summary)
    return summary


def _spent(found: _Found, session: Session, budget: Budget) -> dict[str, Any]:
    """Return the part of the summary that concerns replies and requests."""
    counts = session.counts
    return {
        "missing_because": dict(found.missing.most_common()),
        "read": dict(found.read),
        "requests": asdict(counts) | {"errors": dict(counts.errors), "sent": budget.spent.requests},
        "prompt_tokens": budget.spent.prompt_tokens,
        "completion_tokens": budget.spent.completion_tokens,
        "cost": budget.cost(budget.spent),
        "cost_of_all_runs": budget.cost(budget.total),
    }


def annotations(
    compared: Sequence[Pair], preferences: Preferences, model: str, reference: str, annotator: str
) -> list[dict[str, Any]]:
    """Return AlpacaEval's annotations: the reference has output 1, the model output 2."""
    return [
        {
            "instruction": pair.instruction,
            "output_1": pair.reference,
            "generator_1": reference,
            "dataset": pair.dataset,
            "output_2": pair.model,
            "generator_2": model,
            "annotator": annotator,
            "preference": None if math.isnan(share) else 1 + share,
        }
        for pair, share in zip(compared, preferences.shares().tolist(), strict=True)
    ]


async def _compare(
    compared: Sequence[Pair], config: JudgeConfig, session: Session, budget: Budget, progress: Progress
) -> _Found:
    asked, total = config.backend, 2 * len(compared)
    slots = asked.concurrency if isinstance(asked, EndpointConfig) else asked.batch_size
    top_logprobs = 0 if _omits_logprobs(asked) else config.top_logprobs
    compares = _Compares(max_tokens=config.max_tokens, top_logprobs=top_logprobs, read=config.read)
    found = _Found({order: [math.nan] * len(compared) for order in ("first", "second")})
    records: AsyncGenerator[tuple[tuple[int, str], Sample, list[Elicited]], None]
    records = elicit(_questions(compared), [compares], session, window=4 * slots)
    async with aclosing(session), aclosing(records):
        try:
            async for (i, order), _, [record] in records:
                found.add(i, order, record)
                done = len(found.judgments)
                _check_first(found, record, done, total)
                progress(done, total, session.counts)
        except BudgetReachedError:
            spent = budget.total
            raise UserError(
                f"the budget is reached after {len(found.judgments)} of {total} comparisons: "
                f"{spent.requests} requests, {spent.tokens} tokens, {budget.cost(spent):.4f} in money, over "
                "all runs",
                place="budget",
                remedy="raise the budget and run the same command, which resumes from the cache; or compare "
                "fewer instructions with limit",
            ) from None
        except UserError:
            await session.drain(_LONGEST_DRAIN)
            raise
    return found


def _questions(compared: Sequence[Pair]) -> Iterator[tuple[tuple[int, str], Sample]]:
    """Yield each pair in both orders, as what the judge is asked."""
    for i, pair in enumerate(compared):
        for order, answers in (
            ("first", (pair.model, pair.reference)),
            ("second", (pair.reference, pair.model)),
        ):
            text = _PROMPT.format(instruction=pair.instruction, first=answers[0], second=answers[1])
            yield (i, order), Sample(f"{i}-{order}", (Message("user", text), Message("assistant", "")))


def _check_first(found: _Found, record: Elicited, done: int, total: int) -> None:
    """Raise an error if none of the first replies has a verdict."""
    if done != _FIRST or done == total or found.read or "reply" not in record.evidence:
        return
    raise FailedRequestsError(
        f"none of the first {_FIRST} replies has a verdict: {found.missing.most_common(1)[0][0]}. "
        f"The last reply: {str(record.evidence['reply'])[:200]!r}",
        remedy="use a judge that replies with A, B or C, or raise max_tokens. The run has stopped; its "
        "replies are in the cache",
    )


def _check(summary: Mapping[str, Any], max_failed: float) -> None:
    """Check that enough verdicts were found.

    Raises:
        FailedRequestsError: too many requests failed, or no instruction is decided.
    """
    because, total = summary["missing_because"], 2 * summary["instructions"]
    failed = sum(because.get(reason, 0) for reason in (RequestError.reason, NotRecordedError.reason))
    if failed > max_failed * total:
        said = max(summary["requests"]["errors"].items(), key=lambda item: item[1], default=("unknown", 0))[0]
        raise FailedRequestsError(
            f"{failed} of {total} verdicts are missing because requests failed; max_failed allows "
            f"{max_failed:.0%}. The commonest reason: {said}",
            remedy="run the same command again: it sends only these requests. The files are written; missing "
            "preferences are null",
        )
    if not summary["decided"]:
        reason = max(because, key=because.__getitem__)
        raise FailedRequestsError(
            f"no instruction has a verdict in both orders; the commonest reason: {reason}",
            remedy="read the replies in judgments.jsonl, and change the judge or max_tokens",
        )


def _omits_logprobs(config: EndpointConfig | LocalConfig) -> bool:
    omit = config.omit if isinstance(config, EndpointConfig) else []
    return bool({"logprobs", "top_logprobs"} & {*omit})


def _name(config: EndpointConfig | LocalConfig) -> str:
    if isinstance(config, EndpointConfig):
        return config.model
    path = Path(config.model.path)
    return path.name if path.is_dir() else config.model.path
