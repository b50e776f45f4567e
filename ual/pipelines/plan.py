"""What a run is going to do: what `ual train --dry-run` shows, known before any weight is loaded."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ual.config.run import RunConfig
from ual.data import pack
from ual.train.deepspeed import stage


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts of a run. `steps` is None where a stream does not say how many rows an epoch has."""

    loss: str
    rows: int
    held_out: int
    tokens: int
    trained_tokens: int
    parameters: int
    trained_parameters: int
    processes: int
    zero_stage: int
    rows_per_step: int
    steps: int | None
    checkpoint_bytes: int
    free_bytes: int
    batch: list[Mapping[str, Any]]
    """The first rows of the file: id, tokens, trained, smoothing (None: not asked yet), weight."""


def make_plan(
    config: RunConfig,
    arguments: TrainingArguments,
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    *,
    held_out: int,
    max_length: int,
    world_size: int,
    smoothing_known: bool,
) -> Plan:
    """Count.

    Args:
        model: with its adapter; its weights need not exist.
        features: the training rows, as a collator takes them; none of a stream.
        held_out: rows that are only measured.
        max_length: tokens of a packed sequence.
        world_size: processes.
        smoothing_known: False where a model has yet to be asked.
    """
    micro = arguments.per_device_train_batch_size * world_size
    rows_per_step = micro * arguments.gradient_accumulation_steps
    lengths = [len(row["input_ids"]) for row in features]
    sequences = len(pack(lengths, max_length)) if config.data.packing else len(features)
    steps: int | None = arguments.max_steps
    if arguments.max_steps <= 0:
        per_epoch = math.ceil(math.ceil(sequences / micro) / arguments.gradient_accumulation_steps)
        steps = math.ceil(arguments.num_train_epochs * per_epoch) if features else None
    trained = [p for p in model.parameters() if p.requires_grad]
    return Plan(
        loss=config.loss.kind,
        rows=len(features),
        held_out=held_out,
        tokens=sum(lengths),
        trained_tokens=sum(_trained(row) for row in features),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        processes=world_size,
        zero_stage=stage(arguments.hf_deepspeed_config.config if arguments.deepspeed else None),
        rows_per_step=rows_per_step,
        steps=steps,
        checkpoint_bytes=sum(p.numel() * (p.element_size() + 12) for p in trained),
        free_bytes=shutil.disk_usage(_existing(Path(config.output_dir))).free,
        batch=[
            {
                "id": row["id"],
                "tokens": len(row["input_ids"]),
                "trained": _trained(row),
                "smoothing": row["label_smoothing"] if smoothing_known else None,
                "weight": row["sample_weight"],
            }
            for row in features[: arguments.per_device_train_batch_size]
        ],
    )


def _trained(row: Mapping[str, Any]) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())
