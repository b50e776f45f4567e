"""Build what training will build, without weights, so that errors appear before weights are loaded."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.training_args import trainer_log_levels

from ual.errors import UserError

_PLACE = "configuration, training"
_STEPS = 10  # of the schedule that is built, unless max_steps is set
_METRICS = ("loss", "eval_loss")
_SAMPLING = ("random", "sequential", "group_by_length", "batch_rebalance")  # others are taken for random


def check(
    arguments: TrainingArguments, model: nn.Module, *, held_out: bool, packing: bool, streaming: bool
) -> None:
    """Refuse arguments with which training could not begin, or would fail later.

    Args:
        arguments: of the run.
        model: on the meta device, with its adapter.
        held_out: whether there are held-out samples.
        packing: whether samples are packed.
        streaming: whether samples are read during training.

    Raises:
        UserError: a package is missing, or an argument does not fit the others.
    """
    check_evaluation(arguments, held_out)
    if arguments.train_sampling_strategy not in _SAMPLING:
        raise UserError(
            f"unknown strategy {arguments.train_sampling_strategy!r}; valid: {', '.join(_SAMPLING)}",
            place=f"{_PLACE}.train_sampling_strategy",
        )
    for name in ("log_level", "log_level_replica"):
        if getattr(arguments, name) not in trainer_log_levels:
            raise UserError(
                f"unknown level {getattr(arguments, name)!r}; valid: {', '.join(trainer_log_levels)}",
                place=f"{_PLACE}.{name}",
            )
    if packing and arguments.train_sampling_strategy in _SAMPLING[2:]:
        raise UserError(
            "packed sequences have nearly equal lengths, so they cannot be grouped by length",
            place=f"{_PLACE}.train_sampling_strategy",
            remedy="remove it, or set data.packing to false",
        )
    if streaming and arguments.train_sampling_strategy != "random":
        raise UserError(
            "the samples of a stream have the order of the file, shuffled within data.shuffle_buffer; got "
            f"train_sampling_strategy {arguments.train_sampling_strategy}",
            place=f"{_PLACE}.train_sampling_strategy",
            remedy="remove it; data.shuffle_buffer: 1 keeps the order of the file",
        )
    with _refused("report_to", "remove it from report_to, or install the package"):
        callbacks: Any = integration_utils.get_reporting_integration_callbacks
        for callback in callbacks(arguments.report_to):
            callback()
    _Builder(arguments, model).build()


def check_evaluation(arguments: TrainingArguments, held_out: bool) -> None:
    """Refuse arguments about evaluation and the best model that exclude each other.

    Raises:
        UserError: nothing can be evaluated, or the metric is unknown or missing.
    """
    evaluates = [name for name in ("eval_strategy", "eval_on_start") if _is_set(getattr(arguments, name))]
    if evaluates and not held_out:
        raise UserError(
            f"{evaluates[0]} is set, and there are no held-out samples",
            place=f"{_PLACE}.{evaluates[0]}",
            remedy=f"set data.eval or data.eval_fraction, or remove {evaluates[0]}",
        )
    if arguments.save_strategy == "best" and (
        arguments.metric_for_best_model is None or not _is_set(arguments.eval_strategy)
    ):
        raise UserError(
            "save_strategy best needs a metric and evaluations",
            place=f"{_PLACE}.save_strategy",
            remedy="set metric_for_best_model: loss and eval_strategy: steps, or epoch",
        )
    metric = arguments.metric_for_best_model
    if metric is not None and metric not in _METRICS:
        raise UserError(
            f"unknown metric {metric!r}; valid: {', '.join(_METRICS)}, the mean NLL of held-out loss tokens",
            place=f"{_PLACE}.metric_for_best_model",
            remedy="remove it; the default is loss",
        )


def _is_set(value: Any) -> bool:
    return bool(value) and value != "no"


class _Builder(Trainer):
    """Builds the optimizer and the schedule of a Trainer, and nothing else."""

    def __init__(self, arguments: TrainingArguments, model: nn.Module) -> None:
        self.args: Any = arguments
        self.model: Any = model
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.optimizer_cls_and_kwargs = None
        self.is_deepspeed_enabled = False

    def build(self) -> None:
        """Build both; on tensors without memory, and with two steps of the schedule.

        Raises:
            UserError: one of them cannot be built.
        """
        given = self.args.hf_deepspeed_config.config if self.args.deepspeed else {}
        if "optimizer" in given:  # DeepSpeed's own
            return
        model = copy.deepcopy(self.model)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            with _refused("optim", "choose another optimizer, or install the package that it needs"):
                self.create_optimizer(model)
            if "scheduler" in given:
                return
            steps = self.args.max_steps if self.args.max_steps > 0 else _STEPS
            with _refused("lr_scheduler_type", "set lr_scheduler_kwargs, or choose another schedule"):
                schedule = self.create_scheduler(steps)
                if isinstance(schedule, LambdaLR):
                    for step in range(2):
                        schedule.lr_lambdas[0](step)


def _make_fake(model: nn.Module) -> None:
    """Replace meta parameters by fake ones of a CPU, which optimizers accept."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)


@contextmanager
def _refused(key: str, remedy: str) -> Iterator[None]:
    """Turn any error within into a `UserError` about a key of `training`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises ValueError, TypeError, ImportError and RuntimeError
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(said, place=f"{_PLACE}.{key}", remedy=remedy) from error
