"""What a weak-to-strong study would take, before weights are loaded: questions, training steps, memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ual.config.run import RunConfig
from ual.config.weak_to_strong import WeakToStrongConfig
from ual.data import Renderer
from ual.errors import UserError
from ual.pipelines import samples
from ual.pipelines.estimate import estimate
from ual.pipelines.learner import renderer
from ual.pipelines.weak_to_strong.questions import divide, sources
from ual.pipelines.weak_to_strong.run import WHO, checked, checked_run


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the study. `absent` says why its size is unknown, or is empty."""

    who: str
    path: str
    absent: str
    parameters: int | None = None
    trained_parameters: int | None = None
    gpu_bytes: int | None = None
    """Of a training step on one GPU, as `ual estimate` counts it."""


@dataclass(frozen=True, slots=True)
class Training:
    """Runs of equal length; `steps` is None if epochs decide."""

    who: str
    runs: int
    steps: int | None
    samples_per_step: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a study.

    `paraphrases` are requests to the backend. `answered` counts the forward passes, or generations, of
    supervisors, and `tested` those of the evaluation.
    """

    task: str
    supervised: int
    unsupervised: int
    test: int
    dropped: dict[str, int]
    models: tuple[Model, ...]
    training: tuple[Training, ...]
    paraphrases: int
    answered: int
    tested: int


def plan(config: WeakToStrongConfig, *, trust_remote_code: bool = False) -> Plan:
    """Check a study, and count what it would take. Nothing is written.

    A model of the hub that is not on this machine has no size, and questions that are too long for it are
    not known.

    Raises:
        UserError: as `ual.pipelines.weak_to_strong.run`, before the first stage.
    """
    task = checked(config)
    sources(config)  # a missing file is found before a model is looked for
    (weak, of_weak), (strong, of_strong) = (
        _look(who, checked_run(config, who), trust_remote_code=trust_remote_code) for who in WHO
    )
    split = divide(config, task, of_weak, of_strong)
    ask, seeds = config.ask, len(config.seeds)
    passes = 1 if ask.by == "sample" and task.kind != "number" else ask.times
    supervisors, asked = len(config.supervisors), len(split.unsupervised)
    untrained = 0 if task.kind == "number" else asked
    return Plan(
        task=config.task,
        supervised=len(split.supervised),
        unsupervised=asked,
        test=len(split.test),
        dropped=dict(split.dropped),
        models=(weak, strong),
        training=(
            *(
                Training(who, seeds, *config.training("weak" if who == "weak" else "strong"))
                for who in config.supervisors
            ),
            Training("arms", seeds * len(config.arms), *config.training("strong")),
        ),
        paraphrases=asked * (ask.times - 1) if ask.by == "paraphrase" else 0,
        answered=asked * passes * supervisors * seeds,
        tested=len(split.test) * (supervisors + len(config.arms)) * seeds + untrained,
    )


def _look(who: str, config: RunConfig, *, trust_remote_code: bool) -> tuple[Model, Renderer | None]:
    path = config.model.path
    try:
        model: Any = samples.check_model(config, trust_remote_code=trust_remote_code)
        memory = estimate(config, trust_remote_code=trust_remote_code)
        reader = renderer(config, fitting=True, trust_remote_code=trust_remote_code)
    except UserError as error:
        if Path(path).exists() or path.startswith((".", "/", "~")):
            raise
        return Model(who, path, f"not on this machine: {error.problem}"), None
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, is_trained in counts if is_trained)
    return Model(who, path, "", sum(n for n, _ in counts), trained, memory.fused), reader
