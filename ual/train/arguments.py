"""The `training:` section: transformers' TrainingArguments by their own names, with our defaults."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from ual.config.base import nearest
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.train.deepspeed import deepspeed_config, join

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "ddp_find_unused_parameters": False,
    "log_level_replica": "error",
}
# arguments that ual sets itself, and what to do instead
_OWNED = {
    "output_dir": "set output_dir at the top of the configuration",
    "label_smoothing_factor": "set the `smoothing` section, which gives every sample its own",
    "remove_unused_columns": "the per-sample columns must reach the model",
    "logging_nan_inf_filter": "a loss that is not finite stops the run instead of being hidden",
    "label_names": "the labels of a batch are `labels`",
    "disable_tqdm": "ual draws its own progress",
    "use_liger_kernel": "the loss is already fused",
    "use_cpu": "ual uses a GPU if there is one; hide it with CUDA_VISIBLE_DEVICES",
    "deepspeed": "set `deepspeed` at the top of the configuration: a profile's name or a path",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN: configurations are kept with the run",
    "resume_from_checkpoint": "pass --resume",
}
_POSITIVE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "eval_accumulation_steps",
    "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout", "dataloader_prefetch_factor",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed",
    "dataloader_num_workers",
    "max_grad_norm",
    "warmup_steps",
    "weight_decay",
    "eval_delay",
)


def checked(config: RunConfig) -> dict[str, Any]:
    """Return the `training` section with its values in the types of transformers' fields.

    Raises:
        UserError: an unknown name (the nearest valid one is given), a name that `ual` owns, or a value of the
            wrong type.
    """
    place = "configuration, training"
    valid = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for name in config.training:
        if name in _OWNED:
            raise UserError(f'"{name}" cannot be set', place=place, remedy=_OWNED[name])
        if name not in valid:
            raise UserError(
                f'unknown key "{name}"; {_suggest(name, valid)}',
                place=place,
                remedy="the names are those of transformers.TrainingArguments",
            )
    return {name: _checked(name, value, place) for name, value in config.training.items()}


def training_arguments(config: RunConfig, checkpoints: Path) -> TrainingArguments:
    """Build the TrainingArguments of a run.

    Args:
        config: its `training` section has transformers' names; other arguments have ual's defaults or theirs.
        checkpoints: the folder for `checkpoint-N`.

    Raises:
        UserError: see `checked`; or a value that transformers refuses, or a combination that cannot run here.
    """
    place = "configuration, training"
    given = checked(config)
    cuda = torch.cuda.is_available()
    given.pop("push_to_hub", None)  # `ual.report.publish` does, at the end: what is uploaded is then whole
    if config.data.streaming:  # every process reads for itself: what rank 0 sent would be tensors only
        given["accelerator_config"] = {**(given.get("accelerator_config") or {}), "dispatch_batches": False}
    if given.get("fsdp") and not cuda:
        raise UserError(
            "accelerate has no FSDP on a CPU: it would train without sharding and not say so",
            place=f"{place}, fsdp",
            remedy="set deepspeed: zero3, or train on GPUs",
        )
    if given.get("fsdp") and config.deepspeed:
        raise UserError("fsdp and deepspeed exclude each other", place=place, remedy="remove one")
    values = DEFAULTS | {"bf16": cuda and torch.cuda.is_bf16_supported()} | given
    if config.deepspeed:
        values["deepspeed"] = deepspeed_config(config.deepspeed)
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            use_cpu=not cuda,
            label_names=["labels"],
            **values,
        )
    except Exception as error:  # transformers checks values by what they do, as by opening a file
        raise UserError(" ".join(str(error).split()), place=place) from error
    if config.deepspeed:
        join()
    if arguments.n_gpu > 1:
        raise UserError(
            f"one process would use {arguments.n_gpu} GPUs (DataParallel), which cannot weigh samples",
            remedy="start one process per GPU: torchrun --nproc_per_node N -m ual train config.yaml, or make "
            "one visible with CUDA_VISIBLE_DEVICES=0",
        )
    return arguments


def _checked(name: str, value: Any, place: str) -> Any:
    """Hold a value to the annotation and the range of the field, which transformers does not check itself."""
    try:
        checked = TypeAdapter(get_type_hints(TrainingArguments)[name]).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name}: {error.errors()[0]['msg']}, got {value!r}", place=place) from error
    if name in _POSITIVE and checked is not None and not checked > 0:
        raise UserError(f"{name} must be above 0, got {value!r}", place=place)
    if name in _NOT_NEGATIVE and checked is not None and not checked >= 0:
        raise UserError(f"{name} must not be negative, got {value!r}", place=place)
    if name == "max_steps" and checked == 0:
        raise UserError("max_steps must be above 0, got 0", place=place, remedy="-1 trains num_train_epochs")
    return checked


def _suggest(name: str, valid: list[str]) -> str:
    suggestion = nearest(name, valid)
    return suggestion if suggestion.startswith("did you mean") else "nothing there is called like it"
