"""The configuration of a weak-to-strong study (`ual w2s config.yaml`), and its arms as data.

A weak supervisor learns from the right answers to one half of the questions, and answers the other half
several times. A strong model learns from these answers. An arm says which answers of which questions it
learns from, and by which loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ual.config.base import CommandConfig, Section, UserPath, nearest
from ual.config.elicit import EndpointConfig, LocalConfig
from ual.config.experiment import Name
from ual.config.run import Files

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Files of shipped studies, by name: settings of arXiv 2406.19032."""
OWN = ("data.train", "output_dir", "name", "training.seed")
"""Keys of a training run that the study sets."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What a strong model is trained on. A new arm is one record of `ARMS`."""

    sentence: str
    """What it is, for reports."""
    labels: Literal["first", "majority", "distinct", "distribution", "gold"] = "majority"
    """first: the answer to the first wording. majority: the most frequent answer. distinct: a sample of each
    distinct answer, with its weight. distribution: the mean probabilities of the options. gold: the right
    answer."""
    select: Literal["all", "consistent", "random"] = "all"
    """Questions: all; those that the filter selects; or as many as the filter selects, drawn at random."""
    run: Mapping[str, Any] = field(default_factory=lambda: {"loss": "sft"})
    """What it overrides in the strong model's training run."""
    supervisor: Literal["weak", "self"] = "weak"
    """self: the strong model, trained as the weak supervisor is."""
    control: str = ""
    """The arm that differs from it in one respect; the report has their difference."""

    @property
    def needs_options(self) -> bool:
        """Whether options must differ at one token: their probabilities are the target there."""
        return self.labels == "distribution"


ARMS: dict[str, Arm] = {
    "naive": Arm("the answer to the first wording of every question", "first"),
    "majority": Arm("the most frequent answer to every question"),
    "filter": Arm(
        "the most frequent answer to the questions whose answers agree", select="consistent", control="random"
    ),
    "random": Arm(
        "the most frequent answer to as many questions, drawn at random", select="random", control="majority"
    ),
    "reweight": Arm("each distinct answer to every question, weighted by how often it is given", "distinct"),
    "filter_reweight": Arm(
        "each distinct answer to the questions whose answers agree, weighted",
        "distinct",
        "consistent",
        control="reweight",
    ),
    "soft_labels": Arm("the mean probabilities of the options", "distribution", run={"loss": "soft_labels"}),
    "confidence": Arm(
        "the mean probabilities of the options, mixed with the model's own predictions",
        "distribution",
        run={"loss": "confidence"},
        control="soft_labels",
    ),
    "reverse": Arm(
        "the answer to the first wording, by reverse cross entropy",
        "first",
        run={"loss": "reverse"},
        control="naive",
    ),
    "smoothing": Arm(
        "the most frequent answer, with label smoothing by the entropy of the answers",
        run={"loss": "ual", "uncertainty": "column"},
        control="majority",
    ),
    "self": Arm(
        "the answers of a strong model that was trained as the weak supervisor", "first", supervisor="self"
    ),
    "ceiling": Arm("the right answer to every question", "gold"),
}


class QuestionFiles(Section):
    """Questions with known answers. Each file or hub data set is read as the task says."""

    train: Files
    test: Files
    train_split: str = "train"
    test_split: str = "test"


class SplitConfig(Section):
    """How the questions of `data.train` are divided, at random."""

    supervised: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="the share whose right answers the weak supervisor learns; it answers the others"
    )
    limit: Annotated[int, Field(ge=4)] | None = Field(
        None, description="questions of data.train that are used; null: all"
    )
    test_limit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="questions of data.test that are used; null: all"
    )
    seed: int = 0


class AskConfig(Section):
    """How the supervisor is asked several times."""

    by: Literal["order", "paraphrase", "sample"] = Field(
        "order",
        description="order: of the options or answer words. paraphrase: of the question. sample: draws at "
        "`temperature`",
    )
    times: Annotated[int, Field(ge=2, le=100)] = 5
    temperature: Annotated[float, Field(gt=0, description="of by: sample")] = 1.0
    seed: int = 0
    max_tokens: Annotated[int, Field(ge=1, description="of a worked answer, and of a paraphrase")] = 256
    backend: Annotated[EndpointConfig | LocalConfig, Field(discriminator="kind")] | None = Field(
        None, description="the model that writes paraphrases, as in `ual elicit`"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.by == "paraphrase") != (self.backend is not None):
            raise ValueError(
                'by: paraphrase needs "backend", the model that writes paraphrases, and no other way uses one'
            )
        return self


class ReliabilityConfig(Section):
    """Filter and weights (`ual.methods.reliability`); the same options as those of `ual reliability`."""

    rule: Literal["median", "quantile", "absolute"] = "median"
    value: float | None = Field(None, description="the quantile, or the entropy in nats")
    temperature: Annotated[float, Field(gt=0, description="of the weights")] = 0.2
    unparsed: Literal["class", "drop_question"] = "class"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.rule == "median") == (self.value is not None):
            raise ValueError(f'rule "{self.rule}" {"takes no" if self.rule == "median" else "needs a"} value')
        return self


def _by_name(value: Any) -> Any:
    return {name: {} for name in value} if isinstance(value, list) else value


class WeakToStrongConfig(CommandConfig):
    """A weak-to-strong study."""

    command = "w2s"
    example = "task: sciq / data: {train: FILE, test: FILE} / weak: {model: PATH} / strong: {model: PATH}"
    short: ClassVar[Mapping[str, str]] = {}

    task: UserPath = Field(description="a shipped task, or a YAML file (`ual.data.tasks`)")
    data: QuestionFiles
    split: SplitConfig = SplitConfig()
    weak: dict[str, Any] = Field(
        description="the supervisor's training run, as for `ual train`, without data.train, output_dir, name"
    )
    strong: dict[str, Any] = Field(description="the strong model's; training.max_steps is each arm's budget")
    ask: AskConfig = AskConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    arms: Annotated[dict[Name, dict[str, Any]], BeforeValidator(_by_name)] = Field(
        {name: {} for name in ("naive", "filter", "reweight", "random", "ceiling")},
        min_length=1,
        description="names of `ARMS`; as a mapping, with what each overrides in `strong`. The first one is "
        "the baseline",
    )
    seeds: list[int] = Field([1, 2, 3], min_length=1, description="of supervisor and arms")
    budget: Literal["samples", "tokens"] = Field(
        "samples",
        description="samples: every arm draws as many. tokens: the steps of an arm are scaled so that its "
        "loss tokens are those of the first",
    )
    batch_size: Annotated[int, Field(ge=1, description="of questions that are answered at once")] = 16

    @field_validator("arms")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in ARMS:
                raise ValueError(f"unknown arm {name!r}; {nearest(name, list(ARMS))}")
            of = value[name]
            if "model" in of or "train" in (of.get("data") or {}) or isinstance(of.get("data"), str | list):
                raise ValueError(
                    f"arm {name} may not change the model or data.train: arms differ in labels, questions "
                    "and loss"
                )
        return value

    @model_validator(mode="after")
    def _budgeted(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct")
        for who, raw in (("weak", self.weak), ("strong", self.strong)):
            for key in OWN:
                section, _, last = key.rpartition(".")
                within = raw.get(section) if section else raw
                if isinstance(within, dict) and last in within:
                    raise ValueError(f'"{who}.{key}" is set by the study: remove it')
            if isinstance(raw.get("data"), str | list):
                raise ValueError(f'"{who}.data" names files, and the study sets them: remove it')
        steps = (self.strong.get("training") or {}).get("max_steps")
        if not (isinstance(steps, int) and steps > 0):
            raise ValueError(
                f"strong.training.max_steps must be a positive number, got {steps!r}: every arm takes as "
                "many steps, and a smaller set of samples repeats"
            )
        return self

    def training(self, who: Literal["weak", "strong"]) -> tuple[int | None, int]:
        """Return the optimizer steps, None if epochs decide, and the samples of a step in one process."""
        training = (self.weak if who == "weak" else self.strong).get("training") or {}
        batch: int = training.get("per_device_train_batch_size", 8)
        return training.get("max_steps"), batch * training.get("gradient_accumulation_steps", 1)

    @property
    def supervisors(self) -> tuple[Literal["weak", "self"], ...]:
        """Those that the arms need."""
        return ("weak", "self") if any(ARMS[name].supervisor == "self" for name in self.arms) else ("weak",)
