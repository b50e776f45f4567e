"""Results of the lm-evaluation-harness as a file, and as answers that are measured like all others."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.config.evaluate import EvaluateConfig
from ual.evaluate import options
from ual.evaluate.lm_eval import LmEvaluation, TaskEvaluation
from ual.pipelines.evaluation.items import FEWEST_TO_FIT, fits_temperature


def as_json(found: LmEvaluation) -> dict[str, Any]:
    """Return what the harness found as JSON data."""
    return {
        "lm_eval": found.lm_eval,
        "limit": found.limit,
        "num_fewshot": found.num_fewshot,
        "chat_template": found.chat_template,
        "notices": dict(found.notices),
        "groups": {name: [asdict(of) for of in metrics] for name, metrics in found.groups.items()},
        "tasks": {name: _task(task) for name, task in found.tasks.items()},
    }


def _task(task: TaskEvaluation) -> dict[str, Any]:
    predictions = None
    if task.predictions is not None:
        logs = [[value for value in of.tolist() if value > -np.inf] for of in task.predictions.log_probs]
        predictions = {"log_probs": logs, "gold": task.predictions.gold.tolist()}
    return {
        "version": task.version,
        "kind": task.kind,
        "shots": task.shots,
        "items": task.items,
        "available": task.available,
        "metrics": [asdict(metric) for metric in task.metrics],
        "ids": list(task.ids),
        "scores": {name: scores.tolist() for name, scores in task.scores.items()},
        "predictions": predictions,
        "why": task.why,
    }


def evidence(task: Mapping[str, Any], config: EvaluateConfig) -> tuple[Any, float | None, Any, int]:
    """Return the answers that are measured, the temperature, the answers at it, and how many items fit it.

    A task with one right option is measured by its probabilities. Any other is measured by the harness's
    scores of each item, without a temperature, if their mean is the harness's figure. The mean of other
    scores, such as the log-probabilities of a perplexity, would be another quantity of the same name.
    """
    if task["predictions"] is None:
        return _scores(task), None, None, 0
    ragged = task["predictions"]["log_probs"]
    if len(ragged) < 2:  # no interval, so the harness's own figure is all
        return {}, None, None, 0
    logs = np.full((len(ragged), max(map(len, ragged))), -np.inf)
    for i, of in enumerate(ragged):
        logs[i, : len(of)] = of
    found = options.Predictions(logs, np.array(task["predictions"]["gold"], dtype=np.intp))
    contents = [id.partition("-")[2] for id in task["ids"]]
    fit = np.array([fits_temperature(content, config) for content in contents])
    if fit.sum() < FEWEST_TO_FIT or (~fit).sum() < 2:
        return found, None, None, 0
    temperature = options.temperature(found.take(fit))
    rest = found.take(~fit)
    return rest, temperature, rest.at(temperature), int(fit.sum())


def _scores(task: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    figures = {f"{metric['name']},{metric['filter']}": metric["value"] for metric in task["metrics"]}
    found = {name: np.array(of, dtype=np.float64) for name, of in task["scores"].items()}
    return {
        name: of
        for name, of in found.items()
        if of.size > 1 and name in figures and np.isclose(of.mean(), figures[name], rtol=1e-6, atol=1e-9)
    }
