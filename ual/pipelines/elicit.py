"""One elicitation: rows -> estimators -> cache or backend -> rows with `uncertainty`, evidence, summary.

The run folder holds

    rows.jsonl      for `ual train`: the rows as they came, with the first estimator's `uncertainty` or null
    elicited.jsonl  per row: its id, whether it is right if known, every estimator's value and evidence
    summary.json    counts, tokens, cost; config.yaml  the configuration, resolved
    replies.sqlite  the cache, unless the configuration names another file
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pydantic import SecretStr

from ual.config.base import dump
from ual.config.elicit import ElicitConfig, EndpointConfig
from ual.data import stream
from ual.errors import UserError
from ual.files import aside
from ual.records import Elicited, Sample
from ual.uncertainty.backends.replay import Replay
from ual.uncertainty.budget import Budget, BudgetReachedError, Meter, Prices
from ual.uncertainty.cache import Cache
from ual.uncertainty.estimators.registry import build
from ual.uncertainty.protocol import Backend, Estimator
from ual.uncertainty.session import Session, elicit

log = logging.getLogger(__name__)

_QUIET = ("openai", "httpx2", "httpcore2")  # a line per request is too much


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    done: int
    total: int
    seconds: float
    requests: int
    cached: int
    failed: int
    cost: float

    @property
    def projected_cost(self) -> float:
        """The cost of the whole run at this rate."""
        return self.cost * self.total / self.done if self.done else 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """The run's folder and the figures of summary.json."""

    folder: Path
    summary: dict[str, Any]


def run(
    config: ElicitConfig,
    *,
    environment: Mapping[str, str],
    limit: int | None = None,
    replay: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Elicit as `config` says, into the folder `config.output_dir`.

    Args:
        config: see `ual.config.elicit`.
        environment: where the key of `backend.api_key_env` is looked up.
        limit: only the first rows.
        replay: ask nobody; what the cache does not hold fails.
        trust_remote_code: run model code that comes with a local model's weights.
        progress: called after every row.

    Raises:
        UserError: anything a user can mend. What was answered is in the cache, and the same command goes on.
    """
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    estimators = build(config.estimators)
    folder = Path(config.output_dir)
    total = count(config, folder, limit)
    cache = Cache(config.cache_path)
    try:
        meter = meter_of(config, cache)
        write(folder / "config.yaml", dump(config))
        opened = backends(
            config, estimators, meter, environment, replay=replay, trust_remote_code=trust_remote_code
        )
        summary = asyncio.run(
            _elicit(config, estimators, opened, cache, meter, total, limit, replay, progress)
        )
    finally:
        cache.close()
    return Result(folder, summary)


def count(config: ElicitConfig, folder: Path, limit: int | None) -> int:
    """Check every row before the first request, and return how many there are."""
    source = Path(config.data.path).expanduser()
    for name in ("rows.jsonl", "elicited.jsonl"):
        if (folder / name).exists() and source.exists() and source.samefile(folder / name):
            raise UserError(
                f"the rows are in the run's own {name}, which would be replaced",
                place="configuration, output_dir",
                remedy="choose another output_dir",
            )
    total = 0
    for row, sample in islice(rows(config), limit):
        label(row, sample, config.data.label)
        total += 1
    return total


def rows(config: ElicitConfig) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Stream the rows that a configuration names."""
    return stream(config.data.path, format=config.data.format, split=config.data.split)


def label(row: Mapping[str, Any], sample: Sample, column: str | None) -> bool | None:
    """Return whether a row's response is right, by its label column; None where that is null or not asked."""
    if column is None or row.get(column, False) is None:
        return None
    value = row.get(column)
    if value not in (0, 1):  # False and True are 0 and 1
        raise UserError(
            f"want true, false, 1, 0 or null, got {value!r}"[:200]
            if column in row
            else "the column is missing",
            place=f'{sample.place}, field "{column}"',
            remedy="correct the row, or remove data.label",
        )
    return bool(value)


def meter_of(config: ElicitConfig, cache: Cache) -> Meter:
    """Return a meter that knows what earlier processes of this run spent."""
    run_id = str(Path(config.output_dir).resolve())
    prices = config.backend.prices if isinstance(config.backend, EndpointConfig) else None
    return Meter(
        Budget(**config.budget.model_dump()),
        Prices(**prices.model_dump()) if prices else Prices(),
        cache.spent(run_id),
        lambda spent: cache.note(run_id, spent),
    )


def backends(
    config: ElicitConfig,
    estimators: Sequence[Estimator],
    meter: Meter,
    environment: Mapping[str, str],
    *,
    replay: bool = False,
    trust_remote_code: bool = False,
) -> Callable[[], list[Backend]]:
    """Return what opens the backends that these estimators need, inside an event loop.

    Raises:
        UserError: an estimator needs what the backend cannot do; a key or a model is missing.
    """
    opened: list[Callable[[], Backend]] = []
    if isinstance(config.backend, EndpointConfig):
        endpoint_config = config.backend
        key = None if replay else secret(endpoint_config, environment)

        def endpoint() -> Backend:
            from ual.uncertainty.backends.endpoint import Endpoint

            return Endpoint(endpoint_config, key, meter)

        opened.append(endpoint)
        able = {"generate"}
    else:
        from ual.uncertainty.backends import local

        able = {"generate", "score"}
        if replay:
            stand_in = Replay(local.identity(config.backend), frozenset({"generate", "score"}))
            opened.append(lambda: stand_in)
        else:
            model = local.backend(config.backend, meter, trust_remote_code=trust_remote_code)
            opened.append(lambda: model)
    needed = frozenset[str]().union(*(e.needs for e in estimators))
    if "entail" in needed and config.nli is not None:
        from ual.uncertainty.backends import local

        classifier: Backend
        if replay:
            classifier = Replay(local.nli_identity(config.nli), frozenset({"entail"}))
        else:
            classifier = local.entailment(config.nli, meter)
        opened.append(lambda: classifier)
        able.add("entail")
    for estimator in estimators:
        if missing := estimator.needs - able:
            raise UserError(
                f"{estimator.label} needs a backend that can {sorted(missing)[0]}",
                place="configuration, estimators",
                remedy="name a classifier by nli" if "entail" in missing else 'use a backend of kind "local"',
            )
    if replay:
        return lambda: [Replay.of(make()) for make in opened]
    return lambda: [make() for make in opened]


def secret(config: EndpointConfig, environment: Mapping[str, str]) -> SecretStr | None:
    """Return the key from the environment or the file that the configuration names; None where it names none.

    Raises:
        UserError: both are named, or the one that is named holds no key.
    """
    place = "configuration, backend"
    if config.api_key_env and config.api_key_file:
        raise UserError("api_key_env and api_key_file are both set", place=place, remedy="keep one of them")
    value = None
    if config.api_key_env:
        value = environment.get(config.api_key_env, "").strip()
        where = f"the environment variable {config.api_key_env}"
    elif config.api_key_file:
        where = f"the file {config.api_key_file}"
        try:
            value = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the key: {type(error).__name__}", place=where) from error
    if value is None:
        return None
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise UserError("holds no key of one printable word", place=where)
    return SecretStr(value)


async def _elicit(
    config: ElicitConfig,
    estimators: Sequence[Estimator],
    opened: Callable[[], list[Backend]],
    cache: Cache,
    meter: Meter,
    total: int,
    limit: int | None,
    replay: bool,
    progress: Callable[[Progress], None],
) -> dict[str, Any]:
    session = Session(opened(), cache, patience=2**62 if replay else 20)
    tally = _Tally([e.label for e in estimators])
    started = time.monotonic()
    folder = Path(config.output_dir)
    done = 0
    try:
        with ExitStack() as files:
            with _writing(folder):
                out = _open(files, folder / "rows.jsonl")
                evidence = _open(files, folder / "elicited.jsonl")
            async with aclosing(
                elicit(islice(rows(config), limit), estimators, session, window=_window(config))
            ) as records:
                async for row, sample, elicited in records:
                    right = label(row, sample, config.data.label)
                    with _writing(folder):
                        out.write(_line({**row, "id": sample.id, "uncertainty": elicited[0].value}))
                        evidence.write(_line(_evidence(sample, right, elicited)))
                    tally.add(elicited)
                    done += 1
                    counts = session.counts
                    spent = time.monotonic() - started
                    progress(
                        Progress(
                            done, total, spent, meter.spent.requests, counts.cached, counts.failed, meter.cost
                        )
                    )
            if limit is None and done != total:
                raise UserError(f"the rows changed while they were read: {total}, now {done}")
            summary = {
                "rows": done,
                "estimators": tally.summary(),
                "requests": asdict(session.counts)
                | {"errors": dict(session.counts.errors), "sent": meter.spent.requests},
                "prompt_tokens": meter.spent.prompt_tokens,
                "completion_tokens": meter.spent.completion_tokens,
                "cost": meter.cost,
                "cost_of_all_runs": meter.prices.cost(meter.before + meter.spent),
                "cost_per_row": meter.prices.cost(meter.before + meter.spent) / done,
                "seconds": time.monotonic() - started,
            }
        write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    except BudgetReachedError:
        spent_so_far = meter.before + meter.spent
        raise UserError(
            f"the budget is reached after {done} of {total} rows: {spent_so_far.requests} requests, "
            f"{spent_so_far.tokens} tokens, {meter.prices.cost(spent_so_far):.4f} in money, over all runs",
            place="configuration, budget",
            remedy="raise the budget and run the same command, which goes on from the cache; or finish the "
            f"first rows by --limit {max(done, 1)}",
        ) from None
    finally:
        await session.close()
    return summary


def write(path: Path, text: str) -> None:
    """Write a small file of the run, whole or not at all."""
    with _writing(path.parent), aside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


class _Tally:
    """Counts what each estimator gave."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._valued: Counter[str] = Counter(dict.fromkeys(labels, 0))
        self._sums: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {name: Counter() for name in labels}

    def add(self, records: Sequence[Elicited]) -> None:
        for record in records:
            if record.value is not None:
                self._valued[record.estimator] += 1
                self._sums[record.estimator] += record.value  # type: ignore[assignment]
            else:
                reason = "request failed" if "error" in record.evidence else record.evidence.get("unparsed")
                self._reasons[record.estimator][str(reason)[:80]] += 1

    def summary(self) -> dict[str, Any]:
        return {
            name: {
                "values": n,
                "mean": self._sums[name] / n if n else None,
                "missing": sum(self._reasons[name].values()),
                "missing_because": dict(self._reasons[name].most_common(20)),
            }
            for name, n in self._valued.items()
        }


class _writing:  # noqa: N801  used as a function
    """Turn a full disk or a missing permission into the user's words."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write to the run folder: {error.strerror or error}",
                place=str(error.filename or self._folder),
                remedy="free some space; the same command goes on from the cache",
            ) from error


def _open(files: ExitStack, path: Path) -> IO[str]:
    # A lone surrogate, which JSON may hold but UTF-8 may not, is escaped, and so reads back as it was.
    scratch = files.enter_context(aside(path))
    return files.enter_context(scratch.open("w", encoding="utf-8", errors="backslashreplace"))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def _evidence(sample: Sample, right: bool | None, elicited: Sequence[Elicited]) -> dict[str, Any]:
    estimates = {e.estimator: {"value": e.value, **e.evidence} for e in elicited}
    return {"id": sample.id, "correct": right, "estimates": estimates}


def _window(config: ElicitConfig) -> int:
    """Rows under way at a time: enough that the slowest one rarely holds up the rest."""
    backend = config.backend
    return 4 * (backend.concurrency if isinstance(backend, EndpointConfig) else backend.batch_size)
