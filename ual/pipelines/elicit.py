"""One elicitation: samples -> estimators -> cache or backend -> uncertainties, evidence, summary.

The run folder holds

    rows.jsonl      for `ual train`: the samples as read, with the first estimator's `uncertainty` or null
                    and all estimators' other columns
    elicited.jsonl  per sample: its id, its label if any, every estimator's value and evidence
    summary.json    counts, tokens, cost
    config.yaml     the resolved configuration
    replies.sqlite  the cache, unless the configuration names another file
"""

import asyncio
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ual.config.base import dump
from ual.config.elicit import ElicitConfig, EndpointConfig, LocalConfig
from ual.data import expand, stream
from ual.errors import FailedRequestsError, UserError
from ual.files import aside, json_line, open_jsonl, write_json, write_text, writing
from ual.records import Elicited, Sample
from ual.runs.lock import holding
from ual.uncertainty.backends.replay import Replay
from ual.uncertainty.budget import Budget, BudgetReachedError
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators.registry import build
from ual.uncertainty.protocol import Ask, Backend, Estimator, NotRecordedError, RequestError, Task
from ual.uncertainty.session import Counts, Session, elicit

_OUTPUTS = ("rows.jsonl", "elicited.jsonl")
_FAILED = (RequestError.reason, NotRecordedError.reason)
_FIRST = 20  # samples without any value after which a run stops
_LONGEST_DRAIN = 3600.0  # seconds; each request has its own deadline
_QUIET = ("openai", "httpx2", "httpcore2")  # log a line per request

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, Counts, Budget], None]
"""Takes the number of samples done, the number of all samples, the counts of requests, and what is spent."""


@dataclass(frozen=True, slots=True)
class Job:
    """A configuration, its estimators, and the number of its samples.

    `dropped` counts the wrong samples of the last pass over the data, by the reason.
    """

    config: ElicitConfig
    limit: int | None
    estimators: Sequence[Estimator]
    total: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def samples(self) -> Iterator[tuple[Mapping[str, Any], Sample]]:
        """Stream each sample as read, and the sample."""
        data = self.config.data
        self.dropped.clear()
        how: dict[str, Any] = {"columns": data.columns, "invalid": data.invalid, "dropped": self.dropped}
        how["unanswered"] = all(estimator.rates == "question" for estimator in self.estimators)
        return islice(stream(data.path, format=data.format, split=data.split, **how), self.limit)

    def elicit(self, ask: Ask) -> AsyncGenerator[tuple[Mapping[str, Any], Sample, list[Elicited]], None]:
        """Yield each sample as read, the sample, and one record per estimator."""
        backend = self.config.backend
        slots = backend.concurrency if isinstance(backend, EndpointConfig) else backend.batch_size
        return elicit(self.samples(), self.estimators, ask, window=4 * slots)


def prepare(config: ElicitConfig, limit: int | None = None) -> Job:
    """Build the estimators and check every sample, before the first request.

    Raises:
        UserError: an estimator, an option, a sample or a label is wrong.
    """
    job = Job(config, limit, build(config.estimators))
    folder = Path(config.output_dir)
    sources = [Path(name).expanduser() for name in expand(config.data.path)]
    for source, name in itertools.product(sources, _OUTPUTS):
        if (folder / name).exists() and source.exists() and source.samefile(folder / name):
            raise UserError(
                f"the samples are in the run's own {name}, which would be replaced",
                place="configuration, output_dir",
                remedy="choose another output_dir",
            )
    _check_logprobs(job)
    _check_columns(job)
    total = 0
    for row, sample in job.samples():
        _check_not_replaced(job, row, sample)
        _label(row, sample, config.data.label)
        total += 1
    return replace(job, total=total)


def run(
    config: ElicitConfig,
    *,
    environment: Mapping[str, str],
    limit: int | None = None,
    replay: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
    notice: Callable[[str], None] = _log.warning,
) -> dict[str, Any]:
    """Elicit as `config` says, into the folder `config.output_dir`; return the content of summary.json.

    Args:
        config: see `ual.config.elicit`.
        environment: holds the key that `backend.api_key_env` names.
        limit: only the first samples.
        replay: send nothing; a request that the cache does not answer fails.
        trust_remote_code: run code from a local model's repository.
        progress: called after every sample.
        notice: called with what the user is told once, while the run continues.

    Raises:
        FailedRequestsError: only failures, or many consecutive ones. No file is written.
        UserError: another process uses the folder, or the user can correct the cause. Replies are in the
            cache; the same command resumes.
    """
    quiet()
    job = prepare(config, limit)
    folder = Path(config.output_dir)
    run_id = str(folder.resolve())
    remedy = "free some space, then run the same command again; it resumes from the cache"
    with holding(folder, "an elicitation", notice), closing(Cache(config.cache_path)) as cache:
        budget = Budget(
            config.budget, config.prices, cache.spent(run_id), lambda spent: cache.note(run_id, spent)
        )
        opened = backends(job, budget, environment, replay=replay, trust_remote_code=trust_remote_code)
        session = Session(
            opened,
            cache,
            patience=2**62 if replay else 20,
            reasoning_tokens=config.backend.reasoning_tokens,
            logprobs=not _omitted(config),
            notice=notice,
        )
        with writing("the run folder", folder, remedy):
            write_text(folder / "config.yaml", dump(config))
            summary = asyncio.run(_elicit(job, session, budget, progress))
            write_json(folder / "summary.json", summary)
    return summary


def quiet() -> None:
    """Keep the clients' libraries from logging a line for each request."""
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def check(summary: Mapping[str, Any], config: ElicitConfig) -> None:
    """Check that enough values were found.

    Args:
        summary: as `run` returns it.
        config: of the run; `max_failed` is the share of an estimator's values that failed requests may cost.

    Raises:
        FailedRequestsError: more requests failed, or an estimator has no value at all.
    """
    rows, errors = summary["rows"], summary["requests"]["errors"]
    for label, found in summary["estimators"].items():
        because = found["missing_because"]
        failed = sum(because.get(reason, 0) for reason in _FAILED)
        if failed > config.max_failed * rows:
            said, count = max(errors.items(), key=lambda item: item[1], default=("unknown", failed))
            raise FailedRequestsError(
                f"{failed:,} of {rows:,} values of `{label}` are missing because requests failed; max_failed "
                f"allows {config.max_failed:.0%}. The commonest reason ({count:,} requests): {said}",
                remedy="run the same command again"
                f"{' without --replay' if because.get(NotRecordedError.reason) else ''}: it sends only these "
                "requests. The files are written; the missing values are null",
            )
        if not found["values"] and config.max_failed < 1:
            reason, count = max(because.items(), key=lambda item: item[1])
            raise FailedRequestsError(
                f"`{label}` has no value at all. The commonest reason, {count:,} of {rows:,} samples: "
                f"{reason}",
                remedy=f"read the replies in {Path(config.output_dir) / 'elicited.jsonl'}, and change the "
                "estimator or the model",
            )


def _check_logprobs(job: Job) -> None:
    omitted = _omitted(job.config)
    for estimator in job.estimators:
        if omitted and estimator.needs_logprobs:
            raise UserError(
                f"`{estimator.label}` needs token log-probabilities, and backend.omit contains "
                f"{' and '.join(sorted(omitted))}",
                place="configuration, estimators",
                remedy="remove this estimator; `verbalised`, `self_consistency`, and `judge` with read: text "
                "need none",
            )


def _check_columns(job: Job) -> None:
    """Check that no two estimators write the same column."""
    written = dict[str, str]()
    for estimator in job.estimators:
        for column in estimator.columns:
            if (other := written.setdefault(column, estimator.label)) != estimator.label:
                raise UserError(
                    f"`{other}` and `{estimator.label}` both write the column {column!r}",
                    place="configuration, estimators",
                    remedy="keep one of them, and run the other with another output_dir",
                )


def _check_not_replaced(job: Job, row: Mapping[str, Any], sample: Sample) -> None:
    for estimator in job.estimators:
        if taken := [column for column in estimator.columns if row.get(column) is not None]:
            raise UserError(
                f"`{estimator.label}` would replace the sample's own {taken[0]}",
                place=f'{sample.place}, field "{taken[0]}"',
                remedy=f"remove or rename this column, or remove `{estimator.label}` from estimators",
            )


def _omitted(config: ElicitConfig) -> set[str]:
    """Return the fields for log-probabilities that are not sent."""
    omit = config.backend.omit if isinstance(config.backend, EndpointConfig) else []
    return {"logprobs", "top_logprobs"}.intersection(omit)


def backends(
    job: Job,
    budget: Budget,
    environment: Mapping[str, str],
    *,
    replay: bool = False,
    trust_remote_code: bool = False,
) -> list[Backend]:
    """Open the backends that the estimators need; for a replay, stand-ins with the same identities.

    Raises:
        UserError: no backend can do what an estimator needs; a key or a model is missing.
    """
    config = job.config
    found = [backend(config.backend, budget, environment, replay=replay, trust_remote_code=trust_remote_code)]
    if config.nli is not None and any("entail" in estimator.needs for estimator in job.estimators):
        from ual.uncertainty.backends import local

        found.append(
            Replay(local.nli_identity(config.nli), frozenset({"entail"}))
            if replay
            else local.entailment(config.nli, budget)
        )
    able = frozenset[Task]().union(*(backend.tasks for backend in found))
    for estimator in job.estimators:
        if missing := estimator.needs - able:
            raise UserError(
                f"{estimator.label} needs a backend that can {sorted(missing)[0]}",
                place="configuration, estimators",
                remedy="name a classifier by nli" if "entail" in missing else 'use a backend of kind "local"',
            )
    return found


def backend(
    config: EndpointConfig | LocalConfig,
    budget: Budget,
    environment: Mapping[str, str],
    *,
    replay: bool = False,
    trust_remote_code: bool = False,
) -> Backend:
    """Open a `backend` section; for a replay, a stand-in with the same identity.

    Raises:
        UserError: a key or a model is missing.
    """
    if isinstance(config, EndpointConfig):
        from ual.uncertainty.backends.endpoint import Endpoint

        endpoint = Endpoint(config, None if replay else secret(config, environment), budget)
        return Replay(endpoint.identity, endpoint.tasks) if replay else endpoint
    from ual.uncertainty.backends import local

    if replay:
        return Replay(local.identity(config), frozenset({"generate", "score"}))
    return local.backend(config, budget, trust_remote_code=trust_remote_code)


def secret(config: EndpointConfig, environment: Mapping[str, str]) -> SecretStr | None:
    """Return the key from the environment or the file that the configuration names; None if it names none.

    Raises:
        UserError: both are named, or the named one holds no key.
    """
    if config.api_key_env and config.api_key_file:
        raise UserError(
            "api_key_env and api_key_file are both set",
            place="configuration, backend",
            remedy="keep one of them",
        )
    if config.api_key_env:
        where = f"the environment variable {config.api_key_env}"
        value = environment.get(config.api_key_env, "")
    elif config.api_key_file:
        where = f"the file {config.api_key_file}"
        try:
            value = Path(config.api_key_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the key: {type(error).__name__}", place=where) from error
    else:
        return None
    return SecretStr(_bare_key(value, where))


def _bare_key(text: str, where: str) -> str:
    """Return a key without the quotes, the name and the line end that it has in a file of variables."""
    value = text.strip().strip("\ufeff").strip()
    if assigned := re.fullmatch(r"(?:export\s+)?[A-Za-z_]\w*\s*=\s*(.*[^=\s].*)", value):
        value = assigned[1].strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    problem = ""
    if not value:
        problem = "nothing"
    elif len(value.splitlines()) > 1:
        problem = f"{len(value.splitlines())} lines"
    elif value.lower().startswith("bearer "):
        problem = 'the word "Bearer" before the key'
    elif any(mark in value for mark in "\"'`"):
        problem = "quotes that do not enclose it"
    elif not value.isascii() or not value.isprintable() or " " in value:
        problem = "a blank, or a character that is not printable ASCII"
    if problem:
        raise UserError(
            f"holds no key of one printable word, but {problem}",
            place=where,
            remedy="set it to the key alone, without quotes, name or comment",
        )
    return value


async def _elicit(job: Job, session: Session, budget: Budget, progress: Progress) -> dict[str, Any]:
    started = time.monotonic()
    tallies = {estimator.label: _Tally() for estimator in job.estimators}
    try:
        done = await _write(job, session, budget, tallies, progress)
    except BudgetReachedError:
        done, total = next(iter(tallies.values())).done, budget.total
        raise UserError(
            f"the budget is reached after {done} of {job.total} samples: {total.requests} requests, "
            f"{total.tokens} tokens, {budget.cost(total):.4f} in money, over all runs",
            place="configuration, budget",
            remedy="raise the budget and run the same command, which resumes from the cache; or finish the "
            f"first samples with --limit {max(done, 1)}",
        ) from None
    return {
        "rows": done,
        "dropped": dict(job.dropped.most_common()),
        "estimators": {label: tally.summary() for label, tally in tallies.items()},
        "requests": asdict(session.counts)
        | {"errors": dict(session.counts.errors), "sent": budget.spent.requests},
        "prompt_tokens": budget.spent.prompt_tokens,
        "completion_tokens": budget.spent.completion_tokens,
        "cost": budget.cost(budget.spent),
        "cost_of_all_runs": budget.cost(budget.total),
        "cost_per_row": budget.cost(budget.total) / done,
        "seconds": time.monotonic() - started,
    }


async def _write(
    job: Job, session: Session, budget: Budget, tallies: "Mapping[str, _Tally]", progress: Progress
) -> int:
    """Write samples and evidence; return the number of samples."""
    done = 0
    with ExitStack() as files:
        scratch = [files.enter_context(aside(Path(job.config.output_dir) / name)) for name in _OUTPUTS]
        samples, evidence = (files.enter_context(open_jsonl(path)) for path in scratch)
        async with aclosing(session), aclosing(job.elicit(session)) as records:
            try:
                async for row, sample, elicited in records:
                    right = _label(row, sample, job.config.data.label)
                    found = {"uncertainty": elicited[0].value} | _columns(job, elicited)
                    samples.write(json_line({**row, "id": sample.id, **found}))
                    estimates = {e.estimator: {"value": e.value, **e.evidence} for e in elicited}
                    evidence.write(json_line({"id": sample.id, "correct": right, "estimates": estimates}))
                    for record in elicited:
                        tallies[record.estimator].add(record)
                        if session.counts.answered and job.config.max_failed < 1:
                            tallies[record.estimator].check(record, job.total)
                    done += 1
                    progress(done, job.total, session.counts, budget)
            except UserError:
                await session.drain(_LONGEST_DRAIN)
                raise
        if job.limit is None and done != job.total:
            raise UserError(f"the samples changed while they were read: {job.total}, now {done}")
    return done


def _columns(job: Job, elicited: Sequence[Elicited]) -> dict[str, Any]:
    """Return what the estimators add to a sample beside its uncertainty."""
    records = zip(job.estimators, elicited, strict=True)
    return {name: record.evidence.get(name) for estimator, record in records for name in estimator.columns}


@dataclass(slots=True)
class _Tally:
    """The values of one estimator, and why others are missing."""

    values: int = 0
    total: float = 0.0
    missing: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    """Replies without a value, for one reason, before the first value."""

    @property
    def done(self) -> int:
        return self.values + self.missing.total()

    def add(self, record: Elicited) -> None:
        if record.value is not None:
            self.values += 1
            self.total += record.value
        else:
            self.missing[str(record.evidence.get("unparsed"))[:80]] += 1
            self.unread += "reply" in record.evidence or "first_unparsed" in record.evidence

    def check(self, record: Elicited, total: int) -> None:
        """Raise an error if the first replies all had no value, for the same reason."""
        if self.values or self.unread != _FIRST or len(self.missing) > 1 or self.done == total:
            return
        reply = record.evidence.get("reply") or record.evidence.get("first_unparsed") or ""
        raise FailedRequestsError(
            f"the first {_FIRST} replies gave `{record.estimator}` no value: {next(iter(self.missing))}. "
            f"The last reply: {reply[:200]!r}",
            remedy="change the estimator or the model. The run has stopped; its replies are in the cache. "
            "With max_failed=1 it does not stop",
        )

    def summary(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "mean": self.total / self.values if self.values else None,
            "missing": self.missing.total(),
            "missing_because": dict(self.missing.most_common(20)),
        }


def _label(row: Mapping[str, Any], sample: Sample, column: str | None) -> bool | None:
    """Return whether a response is right, by its label column; None if it is null or no column is named."""
    if column is None or row.get(column, "missing") is None:
        return None
    value = row.get(column)
    if isinstance(value, str):  # of a CSV file
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if value not in (0, 1):  # False and True are 0 and 1
        raise UserError(
            f"expected true, false, 1, 0 or null, got {value!r}"[:200]
            if column in row
            else "the column is missing",
            place=f'{sample.place}, field "{column}"',
            remedy="correct the sample, or remove data.label",
        )
    return bool(value)
