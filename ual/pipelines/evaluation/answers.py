"""Answers of models, stored as they are computed: to tasks, to those of the harness, and to instructions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ual.config.evaluate import EvaluateConfig
from ual.errors import UserError
from ual.evaluate import lm_eval
from ual.files import read_jsonl, write_json
from ual.pipelines.evaluation import harness
from ual.pipelines.evaluation.items import Asked, Choices, Instructions, Items, Record, Records, Texts
from ual.pipelines.evaluation.models import Model
from ual.pipelines.learner import Learner
from ual.pipelines.stages import Ledger, Step, appending, intact, read_object
from ual.runs.environment import digest
from ual.runs.progress import Progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model's answers to the items of a task that are measured, as they are and at the temperature."""

    plain: Any
    temperature: float | None = None
    tempered: Any = None


@dataclass(slots=True)
class Answers:
    """The answers in an evaluation's folder. What is missing is computed, with one model in memory."""

    config: EvaluateConfig
    ledger: Ledger
    console: Console | None
    _loaded: tuple[str, Learner] | None = field(default=None)

    def of_task(self, model: Model, task: Items) -> Outcome:
        """Return the answers of a model to a task."""
        inputs = {"model": model.identity, "items": task.content}
        step = self._step(model, f"{task.name}/answers.jsonl", inputs)
        records = self._records(step, model, task, task.answers)
        plain: Any = task.evidence(records)
        if isinstance(task, Choices):
            temperature = task.temperature(records)
            return Outcome(plain, temperature, None if temperature is None else plain.at(temperature))
        if isinstance(task, Texts):
            temperature = self._fitted(model, task, inputs | {"fit": sorted(task.fit)})
            if temperature is not None:
                at = float(temperature)
                step = self._step(model, f"{task.name}/tempered.jsonl", inputs | {"temperature": at})
                if self.ledger.stale(step):  # another share of the samples has fitted it
                    step.output.unlink()
                tempered = self._records(step, model, task, lambda asked: task.answers(asked, at))
                return Outcome(plain, at, task.evidence(tempered))
        return Outcome(plain)

    def of_harness(self, model: Model) -> dict[str, Any]:
        """Return the results of the lm-evaluation-harness, as JSON data."""
        asked = self.config.lm_eval
        assert asked is not None
        files = [name for name in asked.tasks if name.endswith((".yaml", ".yml"))]
        inputs = {
            "model": model.identity,
            "settings": asked.model_dump(),
            "task files": [digest(path) for path in (asked.include_path, *files) if path],
            "lm_eval": lm_eval.version(),
        }
        step = self._step(model, "lm_eval.json", inputs)
        if self.ledger.begin(step):
            learner = self._learner(model)
            found = lm_eval.evaluate(
                learner.model,
                learner.renderer.tokenizer,
                asked.tasks,
                include_path=asked.include_path,
                limit=asked.limit,
                num_fewshot=asked.num_fewshot,
                batch_size=self.config.batch_size,
                apply_chat_template=asked.apply_chat_template,
            )
            write_json(step.output, harness.as_json(found))
            self.ledger.finish(step)
        return read_object(step.output)

    def to_instructions(self, model: Model, asked: Instructions) -> list[Record]:
        """Return the records of a model's answers, in the order of the instructions."""
        inputs = {"model": model.identity, "items": asked.content}
        step = self._step(model, "judge/answers.jsonl", inputs)
        records = self._records(step, model, asked, asked.answers)
        return [dict(records[id]) for id in asked.ids]

    def _step(self, model: Model, file: str, inputs: dict[str, Any]) -> Step:
        path = Path(self.config.output_dir) / "answers" / model.name / file
        return Step(f"{model.name}, {file}", path, inputs)

    def _records(
        self,
        step: Step,
        model: Model,
        task: Items | Instructions,
        answers: Callable[[Asked], Iterator[list[Record]]],
    ) -> Records:
        """Return the records of a file, after those that are missing were computed and appended."""
        if self.ledger.begin(step):
            known = {record["key"] for record in intact(step.output)}
            with Progress(self.console) as progress, appending(step.output) as file:
                advance = progress.task(f"{model.name}, {task.name}", len(task.ids))
                for batch in answers(Asked(self._learner(model), self.config.batch_size, known, advance)):
                    file.add(record for record in batch if record["key"] not in known)
            self.ledger.finish(step)
        return {record["key"]: record for _, record in read_jsonl(step.output)}

    def _fitted(self, model: Model, task: Texts, inputs: dict[str, Any]) -> float | None:
        """Return the temperature of samples, which takes some passes over those of `fit`."""
        step = self._step(model, f"{task.name}/fitted.json", inputs)
        if self.ledger.begin(step, replace=True):
            with Progress(self.console) as progress:
                advance = progress.task(f"{model.name}, {task.name}: temperature", None)
                found = task.temperature(Asked(self._learner(model), self.config.batch_size, (), advance))
            write_json(step.output, {"temperature": found})
            self.ledger.finish(step)
        temperature: float | None = read_object(step.output)["temperature"]
        return temperature

    def release(self) -> None:
        """Free the model that is in memory."""
        self._loaded = None

    def _learner(self, model: Model) -> Learner:
        if self._loaded is None or self._loaded[0] != model.name:
            self.release()  # before the next one is loaded
            self._loaded = model.name, _checked(model.load(), model)
        return self._loaded[1]


@torch.no_grad()
def _checked(learner: Learner, model: Model) -> Learner:
    """Refuse a model whose logits are not finite, before it answers anything."""
    tokenizer: Any = learner.renderer.tokenizer
    ids = torch.tensor([[tokenizer.eos_token_id]], device=learner.model.device)
    if not learner.model(input_ids=ids).logits.isfinite().all():
        raise UserError(
            f"the logits of {model.name} are not finite",
            place=model.source,
            remedy="its training diverged, or its dtype overflows: set its dtype to float32",
        )
    return learner
