"""Tasks of the lm-evaluation-harness (Gao et al., EleutherAI), through its Python API.

The harness poses the items, calls the model in memory and computes its own metrics. Its log of every item
becomes what other evaluations of `ual` use as well: the probabilities of options (`Predictions`) and a score
for each item, with ids by which two models are compared on the same items.

The log-likelihood of an option is the sum over its tokens, given the prompt. Probabilities are renormalized
over the options. Variants that divide by an option's length are the harness's own `acc_norm` only.
"""

import copy
import difflib
import importlib.metadata
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ual.errors import UserError
from ual.evaluate.options import Predictions

Array = NDArray[np.float64]

_OLDEST = (0, 4, 13)
_INSTALL = "pip install 'ual-kernels[lm-eval]'"
_SEED = 1234  # the harness's own; Python's generator has the seed 0 there, and so it has here
_KINDS_KEPT = 20  # of warnings
_LONGEST = 400  # characters of a warning
_SMALLEST = float(np.log(np.finfo(np.float64).smallest_subnormal))  # as in `Predictions`
_EXPECTED = re.compile(
    r"`pretrained` model kwarg is not of type|Passed an already-initialized model"  # what is meant
    r"|\[Task: .*\] metric \w+ is defined, but \w+ is not\. using default"  # the usual form of a task file
)


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of the harness.

    Attributes:
        name, filter: such as "exact_match" and "strict-match"; the filter is "none" if there is none.
        value: in the harness's unit.
        stderr: its standard error; None if the harness computes none.
        higher_is_better: None if the harness does not say.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class TaskEvaluation:
    """The results of one task.

    Attributes:
        name, version: of the task; versions of one task are not comparable.
        kind: "multiple_choice", "generate_until", "loglikelihood" or "loglikelihood_rolling".
        shots: solved examples in the prompt.
        items: n, the number of items that were evaluated.
        available: the number of items of the task's split.
        metrics: the harness's own.
        ids: [n], each item's index in the split and the start of its content's hash.
        scores: by "metric,filter", [n], of each metric that is one number for each item.
        predictions: of n questions, if there are options and one of them is right; else None.
        why: the reason why `predictions` is None; else empty.
    """

    name: str
    version: str | float | None
    kind: str
    shots: int
    items: int
    available: int
    metrics: tuple[Metric, ...]
    ids: tuple[str, ...]
    scores: Mapping[str, Array]
    predictions: Predictions | None
    why: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LmEvaluation:
    """What the harness found.

    Attributes:
        tasks: by name; a group or a tag gives its tasks.
        groups: the aggregated metrics of groups that define them.
        limit: items of each task that were asked for; None is all.
        num_fewshot: as asked for. `TaskEvaluation.shots` is what was used.
        chat_template: whether prompts were rendered by one, or its name.
        lm_eval: version of the harness.
        notices: warnings of the harness, such as truncated prompts, and how often each one occurred.
    """

    tasks: Mapping[str, TaskEvaluation]
    groups: Mapping[str, tuple[Metric, ...]]
    limit: int | None
    num_fewshot: int | None
    chat_template: bool | str
    lm_eval: str
    notices: Mapping[str, int]


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool | str = False,
) -> LmEvaluation:
    """Evaluate a model in memory on tasks of the lm-evaluation-harness.

    Seeds are fixed, and the state of the global random generators is restored, as is the mode of the model.
    Log-probabilities are computed in float32 also from 16-bit logits. This process evaluates all items.

    Args:
        model: a causal model of transformers or PEFT, fused by `ual.models.fuse` or not, on its device.
        tokenizer: of the model; it is copied.
        tasks: names of tasks, groups and tags, or paths of YAML files. Task files can contain Python code,
            which is run: use files that you trust.
        include_path: folder of more task files; they replace tasks of the same name.
        limit: only the first items of each task, >= 1; None is all.
        num_fewshot: solved examples in the prompt, >= 0; None is the task's own number. Tasks that fix it at
            0 keep it, and a notice says so.
        batch_size: sequences of a forward pass, >= 1. It changes results within rounding.
        apply_chat_template: render prompts as conversations; a name selects one of several templates.

    Raises:
        UserError: the harness is missing or too old, a name is unknown, a task file is wrong, data cannot be
            fetched, or a task needs images, runs generated code, or does not fit the model.
    """
    installed = version()
    _check_arguments(tokenizer, limit, num_fewshot, batch_size, apply_chat_template)
    with _seeded(), _collected_warnings() as notices:
        loaded = _load(tasks, include_path)
        how = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
        results = _run(model, tokenizer, loaded, batch_size, how)
        found = {name: _evaluation(task, results) for name, task in loaded.tasks.items()}
    for name, task in found.items():
        if num_fewshot not in (None, task.shots):
            said = (
                f"{name} fixes {task.shots} examples in its prompt; num_fewshot={num_fewshot} had no effect"
            )
            notices[said] = 1
    groups = {name: _metrics(name, results) for name in results.get("groups", {})}
    return LmEvaluation(
        found, groups, limit, num_fewshot, apply_chat_template, lm_eval=installed, notices=dict(notices)
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The harness's tasks by name; the tasks and groups that were named; its index."""

    tasks: dict[str, Any]
    named: list[Any]
    manager: Any


def _run(
    model: Any, tokenizer: Any, loaded: _Loaded, batch_size: int, how: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the results as the harness returns them; restore the mode of the model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        with _without_tying(model):
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        for task in loaded.tasks.values():
            _check_task(task, lm)
        results: Mapping[str, Any] = simple_evaluate(
            model=lm,
            tasks=loaded.named,
            batch_size=batch_size,
            log_samples=True,
            task_manager=loaded.manager,
            random_seed=0,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
            **how,
        )
    finally:
        model.train(was_training)
    return results


# ---- before ----


def version() -> str:
    """Return the version of the harness; raise `UserError` if it is missing or too old."""
    return _check_installed()


def _check_installed() -> str:
    """Return the version of the harness.

    Raises:
        UserError: it is missing or too old.
    """
    oldest = ".".join(map(str, _OLDEST))
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the lm-evaluation-harness is not installed", remedy=_INSTALL) from None
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if found < _OLDEST:
        raise UserError(
            f"lm-eval {version} is not supported, expected {oldest} or later",
            remedy=f"pip install 'lm-eval>={oldest}'",
        )
    return version


def _check_arguments(
    tokenizer: Any, limit: Any, num_fewshot: Any, batch_size: Any, apply_chat_template: bool | str
) -> None:
    numbers = {"limit": (limit, 1), "num_fewshot": (num_fewshot, 0), "batch_size": (batch_size, 1)}
    for name, (value, least) in numbers.items():
        if value is None and name != "batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be an integer >= {least}, got {value!r}")
    if apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            "apply_chat_template: the tokenizer has no chat template",
            remedy="set apply_chat_template=False, or give the tokenizer a template",
        )


def _load(names: Sequence[str], include_path: Path | str | None) -> _Loaded:
    from lm_eval.tasks import TaskManager

    if isinstance(names, str) or not names:
        raise UserError(f"tasks: expected a list of one name or more, got {names!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(
            "include_path: there is no such folder",
            place=str(include_path),
            remedy="name a folder of task files",
        )
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(_has(manager, name) for name in names):  # this index takes seconds
        manager = TaskManager(include_path=folder)
    found: dict[str, Any] = {}
    named: list[Any] = []
    for name in names:
        _check_known(name, manager, include_path)
        loaded = _load_one(name, manager)
        group = loaded["groups"].get(name)
        named += [group] if group is not None else loaded["tasks"].values()
        if twice := sorted(found.keys() & loaded["tasks"].keys()):
            raise UserError(f"tasks: {name} has {twice[0]}, which is named before", remedy="name it once")
        found |= loaded["tasks"]
    return _Loaded(found, named, manager)


def _has(manager: Any, name: str) -> bool:
    """Return whether an index has a task, or a group with all its members."""
    if name in manager.all_groups:
        members = manager.task_index[name].cfg["task"]
        return isinstance(members, list) and {*map(str, members)} <= {*manager.all_subtasks}
    return name in manager.all_subtasks


def _check_known(name: str, manager: Any, include_path: Path | str | None) -> None:
    if name in manager.task_index or (name.endswith(".yaml") and Path(name).is_file()):
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.7)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    where = f", and no valid YAML file in {include_path} defines it" if include_path is not None else ""
    raise UserError(
        f"tasks: the harness has no task {name!r}{where}{hint}",
        remedy="`lm-eval ls tasks` lists all names; include_path names a folder of more",
    )


def _load_one(name: str, manager: Any) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except OSError as error:  # `datasets`: a data set or a file that is not there, or no network
        raise UserError(
            f"the data of task {name!r} cannot be fetched: {_first_line(error)}",
            remedy="check the network and HF_HUB_OFFLINE, or the paths in the task file. Data that was "
            "fetched once is used offline",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, NotImplementedError) as error:
        raise UserError(
            f"task {name!r} cannot be loaded: {_first_line(error)}",
            remedy="correct the task file, or the versions that the task needs",
        ) from error
    return loaded


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def _check_task(task: Any, lm: Any) -> None:
    """Check that a task can be evaluated at all, before the first forward pass."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {task.task_name!r} runs code that the model generates, which `ual` does not do",
            remedy="evaluate this task with `lm-eval` itself, in a sandbox",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(
            f"task {task.task_name!r} needs images, and the model reads text", remedy="name another task"
        )
    if task.OUTPUT_TYPE == "generate_until":
        most = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
        if most >= lm.max_length:
            raise UserError(
                f"task {task.task_name!r} generates up to {most} tokens, and the model's context has "
                f"{lm.max_length}",
                remedy="lower generation_kwargs.max_gen_toks in a task file of your own",
            )


# ---- around ----


@contextmanager
def _without_tying(model: Any) -> Iterator[None]:
    """Keep HFLM from tying the weights again, which fails for a tied lm_head with an adapter."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators, which the data of some tasks are drawn with; restore them at the end."""
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(0)
            np.random.seed(_SEED)
            torch.manual_seed(_SEED)
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


@contextmanager
def _collected_warnings() -> Iterator[Counter[str]]:
    """Collect the harness's warnings instead of printing them; those that differ in numbers only are one."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())[:_LONGEST]
            kind = re.sub(r"\d+", "#", text)
            if not _EXPECTED.match(text) and (kind in first or len(first) < _KINDS_KEPT):
                found[first.setdefault(kind, text)] += 1

    log, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    propagated = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


# ---- after ----


def _metrics(name: str, results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a task or a group."""
    figures, better = results["results"][name], results["higher_is_better"].get(name) or {}
    found = []
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}_stderr,{kind}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        found.append(Metric(metric, kind, float(value), stderr, better.get(metric)))
    return tuple(found)


def _evaluation(task: Any, results: Mapping[str, Any]) -> TaskEvaluation:
    name = task.task_name
    by_filter: dict[str, list[Any]] = {}
    for sample in results["samples"][name]:
        by_filter.setdefault(sample["filter"], []).append(sample)
    for samples in by_filter.values():
        samples.sort(key=lambda sample: sample["doc_id"])
    samples = next(iter(by_filter.values()))
    predictions, why = _predictions(task, samples)
    return TaskEvaluation(
        name=name,
        version=results["versions"][name],
        kind=task.OUTPUT_TYPE,
        shots=results["n-shot"][name],
        items=len(samples),
        available=results["n-samples"][name]["original"],
        metrics=_metrics(name, results),
        ids=tuple(f"{sample['doc_id']}-{sample['doc_hash'][:12]}" for sample in samples),
        scores={
            f"{metric},{kind}": np.array([float(sample[metric]) for sample in of])
            for kind, of in by_filter.items()
            for metric in of[0]["metrics"]
            if all(np.ndim(sample.get(metric, ())) == 0 and metric in sample for sample in of)
        },
        predictions=predictions,
        why=why,
    )


def _predictions(task: Any, samples: Sequence[Mapping[str, Any]]) -> tuple[Predictions | None, str]:
    """Return the options' probabilities; or None, and the reason."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, "the task has no options"
    if _scores_itself(task):
        return None, "the task scores options by a function of its own, so more than one may be right"
    log_probs, gold = [], []
    for sample in samples:
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        options = task.doc_to_choice(sample["doc"])
        if isinstance(right, list):
            return None, "a question may have several right options"
        index = options.index(right) if isinstance(right, str) and right in options else right
        if not isinstance(index, int) or not 0 <= index < len(options):
            return None, "a question has no right option"
        # beyond these, a metric of mutual information has the options without their prompt
        log_probs.append([float(reply[0]) for reply in sample["filtered_resps"][: len(options)]])
        gold.append(index)
    found = Predictions(_renormalized(task.task_name, log_probs), np.array(gold, dtype=np.intp))
    return found, ""


def _scores_itself(task: Any) -> bool:
    """Return whether a task scores its options by a function of its own, in its file or its class."""
    from lm_eval.api.task import ConfigurableTask

    of_class = type(task).process_results is not ConfigurableTask.process_results
    return of_class or task.config.process_results is not None


def _renormalized(name: str, log_probs: Sequence[Sequence[float]]) -> Array:
    """Return log-probabilities [n, K] over each question's options, -inf where it has fewer."""
    table = np.full((len(log_probs), max(map(len, log_probs))), -np.inf)
    for i, of in enumerate(log_probs):
        logs = np.array(of)
        if np.isnan(logs).any() or not np.isfinite(logs).any():
            raise UserError(
                f"task {name!r}: the model gives no probability to the options of item {i}, but {of}",
                remedy="check the weights of the model",
            )
        table[i, : len(of)] = np.maximum(logs - np.logaddexp.reduce(logs), _SMALLEST)
    return table
