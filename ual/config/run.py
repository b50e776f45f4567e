"""The configuration of a training run: what every key of `ual train config.yaml` means."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, create_model, field_validator, model_validator

from ual.config.base import (
    CommandConfig,
    Fraction,
    Section,
    UserPath,
    from_name,
    load_as,
    nearest,
    parse_as,
)
from ual.config.objectives import LOSS_KINDS, LossKind


class ModelConfig(Section):
    """The base model: a folder in transformers' format, or a name on the Hugging Face hub."""

    path: UserPath
    revision: str | None = None
    tokenizer: UserPath | None = Field(None, description="defaults to `path`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="the frozen base in bitsandbytes' types (QLoRA); needs a CUDA GPU"
    )


CONVERSATION = (
    "messages", "conversations", "prompt", "completion", "question", "answer",
    "instruction", "input", "output", "history",
)  # fmt: skip
"""Columns of a sample that make its conversation."""
COLUMNS = (
    *CONVERSATION, "system", "id", "source", "uncertainty", "label_smoothing", "sample_weight", "tools",
    "options", "label_distribution",
)  # fmt: skip
"""Columns of a sample that are read."""
Files = UserPath | Annotated[list[UserPath], Field(min_length=1)]


def named(files: Files) -> str:
    """Return the names of files as an error names its place."""
    return files if isinstance(files, str) else ", ".join(files)


class Reading(Section):
    """How files become samples."""

    format: Literal["auto", "messages", "prompt_completion", "alpaca"] = "auto"
    columns: dict[str, str | None] = Field(
        {}, description="a sample's column -> a column of the file, or a template: {prompt: '{{context}}'}"
    )
    invalid: Literal["refuse", "drop"] = Field("refuse", description="what happens to wrong samples")

    @field_validator("columns")
    @classmethod
    def _readable(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name in value:
            if name not in COLUMNS:
                raise ValueError(f"samples have no column {name!r}; {nearest(name, COLUMNS)}")
        return value


class DataConfig(Reading):
    """Which samples are read, and how they are tokenized."""

    train: Files = Field(
        description="JSONL, JSON, CSV, TSV or parquet files, patterns such as data/*.jsonl, or hub data sets"
    )
    eval: Files | None = Field(None, description="held-out samples; or `eval_fraction`, a share of `train`")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    train_split: str = "train"
    eval_split: str = "test"
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="tokens; None: min(context, 2048)"
    )
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    chat_template: UserPath | None = Field(
        None, description="'chatml', 'plain', or a Jinja file; None: the model's"
    )
    system_prompt: str | None = Field(None, description="for conversations without a system turn")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="more variables of the template, such as enable_thinking"
    )
    date: datetime.date | None = Field(
        None, description="the day that templates read; None: that on which the run began"
    )
    train_on: Literal["all", "last", "each"] = Field(
        "all", description="assistant turns that are trained; each: as a sample of its own"
    )
    packing: bool = Field(
        False, description="several samples in one sequence of max_length, none of them cut"
    )
    streaming: bool = Field(
        False, description="samples are read during training; needs training.max_steps and `overlong`"
    )
    shuffle_buffer: Annotated[int, Field(ge=1)] = Field(
        1024, description="streamed samples that are shuffled, and packed, together"
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = ("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt")
        if reserved := sorted(set(taken) & value.keys()):
            raise ValueError(f"{reserved[0]!r} is set by the renderer")
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"{error}; write a date in quotes") from error
        return value

    @model_validator(mode="after")
    def _held_out_once(self) -> Self:
        if self.eval is not None and self.eval_fraction:
            raise ValueError(
                "eval and eval_fraction both name held-out samples: remove one of them, "
                f"got eval={self.eval!r} and eval_fraction={self.eval_fraction:g}"
            )
        return self

    @model_validator(mode="after")
    def _streamable(self) -> Self:
        if self.streaming and self.overlong == "refuse":
            raise ValueError(
                'streaming cannot refuse a long sample in time: set overlong to "truncate" or "drop"'
            )
        if self.streaming and self.eval_fraction:
            raise ValueError(
                "streaming cannot hold out a share of its samples: name held-out samples in data.eval"
            )
        return self


class UncertaintyConfig(Section):
    """How each sample's uncertainty is found."""

    estimator: Literal["column", "white_box"] = "column"
    missing: Literal["median", "drop", "refuse"] = "median"
    assignment: Literal["own", "shuffled", "random"] = Field(
        "own",
        description="own; or a control: shuffled, which is that of another sample, or a random number",
    )
    batch_size: Annotated[int, Field(ge=1)] = 8


CONSTANT_INVERTED = 'invert does not change map "constant", which is one smoothing: remove one of them'


class SmoothingConfig(Section):
    """Uncertainty to label smoothing: a scale to u in [0, 1], then a map to s (`ual.methods.smoothing`)."""

    scale: Literal["rank", "min_max", "absolute"] = "rank"
    map: Literal["linear", "power", "step", "constant"] = "linear"
    min: Fraction = 0.0
    max: Fraction = 0.2
    power: Annotated[float, Field(gt=0)] = 2.0
    threshold: Fraction = Field(0.5, description="of u, for map: step")
    invert: bool = Field(False, description="the most certain sample gets max, the least certain min")
    match_mean: Fraction | None = None
    over: Literal["all", "others", "options"] = Field(
        "all", description="classes over which s is spread; options: the sample's own, where they differ"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must not exceed max, got min={self.min} and max={self.max}")
        if self.invert and self.map == "constant":
            raise ValueError(CONSTANT_INVERTED)
        return self

    @property
    def sentence(self) -> str:
        """How smoothing depends on uncertainty, for reports."""
        kind = f"{'inverted ' * self.invert}{self.map}"
        return f"{self.scale.replace('_', '-')} scale, {kind} map to [{self.min:g}, {self.max:g}]"


class LoraConfig(Section):
    """The adapter, in PEFT's terms."""

    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = Field([])

    @field_validator("target_modules")
    @classmethod
    def _named(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError('name at least one module, or "all-linear"')
        return value


class _LossConfig(Section):
    """What is minimized: a kind of `ual.config.objectives`, with its options.

    "uniform" smooths by `smoothing.match_mean`; if that is null, by (min + max) / 2, the mean of the linear
    map of ranks.
    """

    kind: str = "ual"
    average: Literal["weights", "tokens", "samples"] = "weights"
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in LOSS_KINDS:
            raise ValueError(f"unknown loss; {nearest(value, list(LOSS_KINDS))}")
        return value

    @property
    def about(self) -> LossKind:
        return LOSS_KINDS[self.kind]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the kind's preset."""
        return {name: getattr(self, name) for name in self.about.options}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.about.makes_weights and self.average == "samples":
            raise ValueError(
                f"{self.kind} makes its own weights, so average must be 'weights' or 'tokens', not 'samples'"
            )
        every = {name: default for kind in LOSS_KINDS.values() for name, (_, default) in kind.options.items()}
        changed = {name for name, default in every.items() if getattr(self, name) != default}
        if stray := sorted(changed - set(self.about.options)):
            raise ValueError(f"loss {self.kind} has no parameter {stray[0]!r}")
        return self


if TYPE_CHECKING:
    LossConfig = _LossConfig
else:  # with the options of every kind as keys
    LossConfig = create_model(
        "LossConfig",
        __base__=_LossConfig,
        **{name: option for kind in LOSS_KINDS.values() for name, option in kind.options.items()},
    )


class EvaluationConfig(Section):
    """What is measured on the held-out samples, before and after training."""

    before: bool = True
    bins: Annotated[int, Field(ge=2)] = 15
    batch_size: Annotated[int, Field(ge=1)] = 8


class RunConfig(CommandConfig):
    """One training run."""

    command = "train"
    example = "model: PATH / data: FILE.jsonl"

    model: Annotated[ModelConfig, from_name("path")]
    data: Annotated[DataConfig, from_name("train")]
    name: str | None = Field(None, description="label in reports; defaults to the folder's name")
    loss: Annotated[LossConfig, from_name("kind")] = LossConfig()
    uncertainty: Annotated[UncertaintyConfig, from_name("estimator")] = UncertaintyConfig()
    smoothing: SmoothingConfig = SmoothingConfig()
    lora: LoraConfig | None = Field(LoraConfig(), description="null trains all weights, without an adapter")
    evaluation: EvaluationConfig = EvaluationConfig()
    statistics: Literal["every", "logged", "never"] = Field(
        "logged", description="steps whose tokens' entropy, margin, p and loss by source are recorded"
    )
    deepspeed: UserPath | None = Field(
        None, description="zero1, zero2, zero3, zero2-offload, zero3-offload, or the path of a JSON file"
    )
    training: dict[str, Any] = Field({}, description="transformers.TrainingArguments, by their own names")

    @field_validator("training")
    @classmethod
    def _paths(cls, values: dict[str, Any]) -> dict[str, Any]:
        expand = TypeAdapter(UserPath).validate_python
        return {key: expand(value) if isinstance(value, str) else value for key, value in values.items()}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.model.quantization and self.lora is None:
            raise ValueError("model.quantization freezes the base model: it needs the `lora` section")
        if self.data.streaming:
            if self.training.get("max_steps", -1) <= 0:
                raise ValueError(
                    "data.streaming does not know the length of an epoch: set training.max_steps"
                )
            if self.training.get("dataloader_num_workers", 0):
                raise ValueError(
                    "data.streaming reads in one process: remove training.dataloader_num_workers"
                )
            if self.loss.about.needs_uncertainty and self.uncertainty.estimator != "column":
                raise ValueError(
                    "data.streaming keeps no samples to ask a model about: add a column of uncertainties, "
                    'and set uncertainty to "column"'
                )
        return self

    def on(self, date: datetime.date) -> "RunConfig":
        """Return the configuration with the date that templates read, unless it has one."""
        data = self.data.model_copy(update={"date": self.data.date or date})
        return self.model_copy(update={"data": data})

    @property
    def smoothing_over(self) -> Literal["all", "others", "options"]:
        """The classes over which the loss spreads smoothing; a loss without smoothing spreads none."""
        return "all" if self.loss.about.smoothing == "none" else self.smoothing.over

    @property
    def over_options(self) -> bool:
        return self.smoothing_over == "options"

    @property
    def decided_by(self) -> Literal["options", "label_distribution"] | None:
        """The column of a sample's options that training samples must have."""
        if self.loss.about.distribution:
            return "label_distribution"
        return "options" if self.over_options else None

    @property
    def label(self) -> str:
        return self.name or Path(self.output_dir).name


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, validate.

    Args:
        path: the file; `output_dir` defaults to ``runs/<its stem>``.
        overrides: dotted keys with YAML values, applied in order.

    Raises:
        UserError: the file is missing or is not a mapping, a key is unknown (the nearest valid one is
            named), or a value does not fit.
    """
    return load_as(RunConfig, path, overrides)


def parse(raw: Mapping[str, Any], *, place: str = "configuration") -> RunConfig:
    """Validate a mapping; see `load` for the errors."""
    return parse_as(RunConfig, raw, place=place)
