"""The figures of a weak-to-strong study: accuracies, gaps, reliability, and what a filter drops.

Everything here may read right answers. An interval is the 95 % bootstrap over questions, with seeds averaged
within a question (`ual.methods.statistics`): it does not cover the randomness of training.
"""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ual.config.base import dump
from ual.config.weak_to_strong import ARMS, WeakToStrongConfig
from ual.methods import reliability
from ual.methods.statistics import ROUNDING, Estimate, bootstrap, performance_gap_recovered
from ual.pipelines.weak_to_strong.arms import Asked
from ual.pipelines.weak_to_strong.questions import Split

PUBLISHED = {
    "HellaSwag": [(0.0, 0.95), (0.5, 0.67), (0.67, 0.49), (0.95, 0.43), (1.05, 0.34), (1.33, 0.28)],
    "MMLU": [(0.0, 0.82), (0.5, 0.48), (0.67, 0.33), (0.95, 0.32), (1.05, 0.27), (1.33, 0.27)],
    "GSM8K": [
        (0.0, 0.37), (0.5, 0.18), (0.67, 0.15), (0.95, 0.11), (1.05, 0.10), (1.33, 0.05), (1.61, 0.03),
    ],
    "ETHICS": [(0.0, 0.80), (0.69, 0.71)],
}  # fmt: skip
"""Accuracy of labels by entropy (nats), with Llama-2-7B as the weak supervisor (arXiv 2406.19032)."""
TOLERANCE = 0.05
"""The share by which the loss tokens of an arm may differ from the first arm's."""
_FEWEST_SEEDS, _FEWEST_STEPS, _FEWEST_TESTS = 3, 200, 200
Rights = NDArray[np.float64]  # [seeds, questions], 0 or 1


@dataclass(slots=True)
class Found:
    """What the complete stages of a study have computed.

    Attributes:
        asked: supervisor -> seed -> the unsupervised questions.
        answers: trained model -> seed -> record of each test question, by id.
        metrics: trained model -> seed -> metrics.json of its run.
        untrained: the untrained strong model's records of the unsupervised questions, by id.
        environment: environment.json of one of the runs.
    """

    config: WeakToStrongConfig
    kind: str
    split: Split
    asked: dict[str, dict[int, list[Asked]]] = field(default_factory=dict)
    answers: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    untrained: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def rights(self, name: str, seeds: Sequence[int]) -> Rights:
        """Return whether a model answers each test question right, [seeds, questions]."""
        return np.array(
            [
                [self.answers[name][seed][item.id]["value"] == item.gold for item in self.split.test]
                for seed in seeds
            ],
            dtype=np.float64,
        )

    def seeds(self, *names: str) -> list[int]:
        """Return the seeds for which all of these models are evaluated."""
        return [seed for seed in self.config.seeds if all(seed in self.answers.get(n, {}) for n in names)]

    def summary(self) -> dict[str, Any]:
        """Return report.json."""
        config, split = self.config, self.split
        arms = [self._arm(name) for name in config.arms]
        gap, no_pgr = self._gap()
        finished = all(arm["status"] == "completed" for arm in arms)
        differences = [arm["difference"] for arm in arms[1:] if arm["difference"]]
        steps, samples_per_step = config.training("strong")
        assert steps is not None
        return {
            "name": Path(config.output_dir).name,
            "task": Path(config.task).stem,
            "kind": self.kind,
            "status": "completed" if finished and not self._unfinished() else "unfinished",
            "models": {who: _model(raw) for who, raw in (("weak", config.weak), ("strong", config.strong))},
            "seeds": config.seeds,
            "questions": {
                "supervised": len(split.supervised),
                "unsupervised": len(split.unsupervised),
                "test": len(split.test),
                "dropped": dict(split.dropped),
            },
            "asked": config.ask.model_dump(
                include={"by", "times", *(["temperature"] if config.ask.by == "sample" else [])}
            ),
            "reliability": config.reliability.model_dump(),
            "budget": {
                "by": config.budget,
                "steps": steps,
                "samples": steps * samples_per_step,
            },
            "chance": self._chance(),
            "supervisors": [self._supervisor(who) for who in config.supervisors],
            "arms": arms,
            "gap": gap,
            "no_pgr": no_pgr,
            "levels": self._levels(),
            "published": {name: [list(point) for point in curve] for name, curve in PUBLISHED.items()},
            "filter": self._filter(),
            "detectable": {
                "half_width": fmean((d["high"] - d["low"]) / 2 for d in differences) if differences else None,
                "items": len(split.test),
            },
            "cautions": list(self._cautions(arms)),
            "environment": self._origin(),
            "config": dump(config),
        }

    def _origin(self) -> dict[str, Any]:
        """Return where the figures come from; the time is that of training."""
        found = self.environment
        machine, versions = found.get("machine", {}), found.get("versions", {})
        runs = [metrics for of_seed in self.metrics.values() for metrics in of_seed.values()]
        parts = [
            machine.get("processor"),
            f"{machine['cores']} cores" if machine.get("cores") else None,
            f"{machine['memory_gib']:g} GiB" if machine.get("memory_gib") else None,
            machine.get("gpu") or ("no GPU" if machine else None),
        ]
        return {
            "created": found.get("created"),
            "machine": ", ".join(part for part in parts if part),
            "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "commit": found.get("git_commit"),
            "command": shlex.join(
                found.get("command") or ["ual", "w2s", f"{self.config.output_dir}/config.yaml"]
            ),
            "seconds": math.fsum(run["seconds"] for run in runs),
        }

    # ---- accuracy ----

    def _unfinished(self) -> bool:
        return any(len(self.asked.get(who, {})) < len(self.config.seeds) for who in self.config.supervisors)

    def _chance(self) -> float | None:
        """Return the accuracy of guessing."""
        if self.kind == "number":
            return None
        return fmean(1 / len(item.options) for item in self.split.test)

    def _supervisor(self, who: str) -> dict[str, Any]:
        name = f"supervisor-{who}"
        seeds = self.seeds(name)
        rights = self.rights(name, seeds)
        return {
            "name": who,
            "accuracy": _accuracy(rights),
            "by_seed": self._by_seed(name),
            "labels": self._labels(who),
        }

    def _by_seed(self, name: str) -> list[float | None]:
        """Return a model's accuracy with every seed; None where it is not evaluated."""
        known = self.seeds(name)
        return [float(self.rights(name, [s]).mean()) if s in known else None for s in self.config.seeds]

    def _labels(self, who: str) -> dict[str, float | None]:
        """Return the accuracies of labels, each over the questions that have this label; means over seeds."""
        gold = {id: hidden.answer for id, hidden in self.split.hidden.items()}
        sums: dict[str, list[float | None]] = defaultdict(list)
        for asked in self.asked.get(who, {}).values():
            usable = [q for q in asked if not math.isnan(q.entropy)]
            sums["first"].append(_mean(_right(q, q.first, gold) for q in asked if q.first is not None))
            sums["majority"].append(_mean(_right(q, q.majority, gold) for q in usable))
            sums["selected"].append(_mean(_right(q, q.majority, gold) for q in usable if q.selected))
            sums["weighted"].append(
                _mean(
                    sum(weight * (_right(q, value, gold) or 0.0) for value, weight in weights.items())
                    if gold[q.item.id] is not None
                    else None
                    for q in usable
                    if (weights := q.weights(self.config.reliability.temperature))
                )
            )
            answers = [value for q in asked for value in q.values]
            sums["unparsed"].append(answers.count(None) / len(answers))
        names = ("first", "majority", "selected", "weighted", "unparsed")
        return {name: _mean(sums[name]) for name in names}

    def _arm(self, name: str) -> dict[str, Any]:
        arm, first = ARMS[name], next(iter(self.config.arms))
        supervisor = f"supervisor-{arm.supervisor}"
        seeds, runs = self.seeds(name), self.metrics.get(name, {})
        rights = self.rights(name, seeds)
        shared, both = self.seeds(name, supervisor), self.seeds(name, first)
        records = [self.answers[name][seed][item.id] for seed in seeds for item in self.split.test]
        pair = [self.rights(n, both) for n in (name, first)]
        compared = name != first and both
        return {
            "name": name,
            "arm": name,
            "sentence": arm.sentence,
            "status": "completed" if len(seeds) == len(self.config.seeds) else "missing",
            "samples": [runs[seed]["trained_rows"] for seed in seeds],
            "loss_tokens": [runs[seed]["trained_tokens"] for seed in seeds],
            "steps": [runs[seed]["steps"] for seed in seeds],
            "accuracy": _accuracy(rights),
            "by_seed": self._by_seed(name),
            "mass": fmean(r["mass"] for r in records) if records and self.kind != "number" else None,
            "difference": _difference(*pair) if compared else None,
            "better": int((pair[0].mean(1) > pair[1].mean(1)).sum()) if compared else None,
            "pgr": self._recovered(name),
            "against": arm.supervisor,
            "control": arm.control if arm.control in self.config.arms else "",
            "over_control": self._over_control(name),
            "gain": _difference(self.rights(name, shared), self.rights(supervisor, shared))
            if shared
            else None,
        }

    def _over_control(self, name: str) -> dict[str, float] | None:
        """Return the accuracy of an arm minus that of its control, paired by question."""
        control = ARMS[name].control
        if control not in self.config.arms or not (seeds := self.seeds(name, control)):
            return None
        return _difference(self.rights(name, seeds), self.rights(control, seeds))

    def _recovered(self, name: str) -> dict[str, float] | None:
        if (
            ARMS[name].labels == "gold"
            or ARMS[name].supervisor == "self"
            or "ceiling" not in self.config.arms
        ):
            return None
        names = name, "supervisor-weak", "ceiling"
        if not (seeds := self.seeds(*names)):
            return None
        found = performance_gap_recovered(*(self.rights(n, seeds) for n in names))
        return None if found is None else asdict(found)

    def _gap(self) -> tuple[dict[str, float] | None, str]:
        """Return ceiling minus weak supervisor, and why there is no PGR."""
        if "ceiling" not in self.config.arms:
            return None, "The study has no ceiling arm, so there is no gap to recover."
        if not (seeds := self.seeds("supervisor-weak", "ceiling")):
            return None, "Ceiling and weak supervisor have not been evaluated yet."
        gap = _difference(self.rights("ceiling", seeds), self.rights("supervisor-weak", seeds))
        if gap["low"] > ROUNDING:
            return gap, ""
        return gap, (
            f"The 95 % interval of ceiling minus weak supervisor, {gap['low']:+.3f} to {gap['high']:+.3f}, "
            "contains 0 or lies below it: there is no gap to recover."
        )

    # ---- reliability ----

    def _levels(self) -> list[dict[str, Any]]:
        """Return the accuracy of the weak supervisor's majority by the entropy of its answers."""
        gold = {id: hidden.answer for id, hidden in self.split.hidden.items()}
        pooled = [q for asked in self.asked.get("weak", {}).values() for q in asked]
        usable = [q for q in pooled if not math.isnan(q.entropy)]
        if not usable:
            return []
        by_level: dict[int, list[Asked]] = defaultdict(list)
        for level, question in zip(reliability.levels([q.entropy for q in usable]), usable, strict=True):
            by_level[int(level)].append(question)
        return [
            {
                "low": min(q.entropy for q in members),
                "high": max(q.entropy for q in members),
                "questions": len(members) / len(self.asked["weak"]),
                "share": len(members) / len(usable),
                "label_accuracy": _mean(_right(q, q.majority, gold) for q in members),
            }
            for _, members in sorted(by_level.items())
        ]

    def _filter(self) -> dict[str, Any] | None:
        """Return how the questions that the filter selects differ from those that it drops."""
        pooled = [q for asked in self.asked.get("weak", {}).values() for q in asked]
        if not pooled or not any(ARMS[name].select == "consistent" for name in self.config.arms):
            return None
        pooled = [q for q in pooled if not math.isnan(q.entropy)]
        subjects = Counter((q.item.subject, q.selected) for q in pooled if q.item.subject)
        counts = {name: subjects[name, True] + subjects[name, False] for name, _ in subjects}
        return {
            "selected": self._group([q for q in pooled if q.selected]),
            "dropped": self._group([q for q in pooled if not q.selected]),
            "subjects": [
                [name, subjects[name, True] / count, count / len(self.asked["weak"])]
                for name, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
            ],
        }

    def _group(self, questions: Sequence[Asked]) -> dict[str, float | None]:
        gold = {id: hidden.answer for id, hidden in self.split.hidden.items()}
        records = [(q, self.untrained[q.item.id]["probabilities"]) for q in questions if self.untrained]
        return {
            "questions": len(questions) / len(self.asked["weak"]),
            "prompt_length": _mean(len(q.item.question) for q in questions),
            "strong_entropy": _mean(-sum(x * math.log(x) for x in p.values() if x) for _, p in records),
            "strong_loss": _mean(
                -math.log(max(p[answer], 1e-300))
                for q, p in records
                if (answer := gold[q.item.id]) is not None
            ),
            "label_accuracy": _mean(_right(q, q.majority, gold) for q in questions if q.majority is not None),
        }

    # ---- what limits conclusions ----

    def _cautions(self, arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        if (count := len(self.config.seeds)) < _FEWEST_SEEDS:
            yield f"{'One seed' if count == 1 else f'{count} seeds'} (fewer than {_FEWEST_SEEDS})."
        if (steps := self.config.strong["training"]["max_steps"]) < _FEWEST_STEPS:
            yield f"{steps} training steps (fewer than {_FEWEST_STEPS})."
        if (count := len(self.split.test)) < _FEWEST_TESTS:
            yield f"{count} test questions (fewer than {_FEWEST_TESTS})."
        yield from self._unequal(arms)
        missing = [arm["name"] for arm in arms if arm["status"] != "completed"]
        if missing:
            yield f"Not evaluated with every seed: {', '.join(missing)}."
        names = set(self.config.arms)
        if names & {"filter", "filter_reweight"} and "random" not in names:
            yield (
                "No arm filters at random, so the effect of reliability cannot be told from that of fewer "
                "distinct samples."
            )
        yield from self._unlabeled()
        if self.config.budget == "tokens":
            yield "Steps differ between arms, so that loss tokens do not (budget: tokens)."

    def _unequal(self, arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Name seeds whose arms were trained on different numbers of loss tokens, as counted."""
        for seed in self.config.seeds:
            counts = {
                arm["name"]: runs[seed]["trained_tokens"]
                for arm in arms
                if seed in (runs := self.metrics.get(arm["name"], {}))
            }
            first = next(iter(counts.values()), 0.0)
            if any(abs(count - first) > TOLERANCE * first for count in counts.values()):
                span = f"{min(counts.values()):,.0f} to {max(counts.values()):,.0f}"
                yield f"Loss tokens of seed {seed} differ by more than {TOLERANCE:.0%}: {span}."

    def _unlabeled(self) -> Iterator[str]:
        """Count what the filter cannot judge, and name a filter that selects everything."""
        for who, by_seed in self.asked.items():
            pooled = [q for asked in by_seed.values() for q in asked]
            if unusable := sum(math.isnan(q.entropy) for q in pooled):
                count = f"{unusable / len(by_seed):,.4g} of {len(self.split.unsupervised):,}"
                yield (
                    f"{count} questions have no usable majority of the supervisor {who} (mean over seeds): "
                    "most arms do not train on them."
                )
            filters = any(ARMS[name].select == "consistent" for name in self.config.arms)
            if who == "weak" and filters and unusable + sum(q.selected for q in pooled) == len(pooled):
                yield "The filter drops nothing: no entropy is above its threshold."


def _model(raw: Mapping[str, Any]) -> str:
    model = raw["model"]
    return Path(model if isinstance(model, str) else model["path"]).name


def _right(question: Asked, value: str | None, gold: Mapping[str, str | None]) -> float | None:
    """Return whether a label is right; None if the right answer is unknown."""
    answer = gold[question.item.id]
    return None if answer is None else float(value == answer)


def _accuracy(rights: Rights) -> dict[str, float] | None:
    if not rights.size:
        return None
    return asdict(bootstrap(np.mean, rights.mean(axis=0)))


def _difference(rights: Rights, others: Rights) -> dict[str, float]:
    difference: Estimate = bootstrap(np.mean, rights.mean(axis=0) - others.mean(axis=0), resamples=2000)
    return asdict(difference)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
