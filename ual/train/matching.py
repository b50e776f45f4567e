"""What a resumed run must have in common with its record: configuration, data and base model."""

import dataclasses
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ual.config import run as configuration
from ual.config.run import RunConfig
from ual.errors import UserError
from ual.runs.environment import digest, files, fingerprint
from ual.runs.folder import File, RunFolder
from ual.train.arguments import DEFAULTS

_FREE = (
    "name",
    "output_dir",
    "evaluation",
    "statistics",
    "deepspeed",
    "loss.backend",
    "uncertainty.batch_size",
)
"""Keys and sections that do not change what is trained. `check_fit` compares the ZeRO stage."""
_FREE_TRAINING = (
    # how long, and the samples of a step, which are compared with the checkpoint's instead
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    # what is measured, logged, saved and uploaded
    "eval_*", "per_device_eval_batch_size", "do_*", "batch_eval_metrics", "prediction_loss_only",
    "include_for_metrics", "*_full_eval", "logging_*", "log_*", "report_to", "run_name", "project",
    "trackio_*", "include_num_input_tokens_seen", "skip_memory_metrics", "debug", "save_*", "push_to_hub",
    "hub_*", "load_best_model_at_end", "enable_jit_checkpoint",
    # how it is computed: workers, communication, memory, compilation
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "ddp_*", "gradient_checkpointing*", "torch_empty_cache_steps",
    "torch_compile*",
)  # fmt: skip
_ASKED = ("model", "data", "uncertainty")
"""Sections that the base model's uncertainties and evaluation depend on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What a run reads: the SHA-256 of each file by its path, and the base model's fingerprint if known."""

    data: Mapping[str, str]
    model: str | None

    @classmethod
    def of(cls, config: RunConfig) -> "Contents":
        data = {path: found for path in files(config).values() if (found := digest(path)) is not None}
        return cls(data, fingerprint(config.model.path))

    @classmethod
    def recorded(cls, folder: RunFolder) -> "Contents":
        environment = folder.read_json(File.ENVIRONMENT)
        return cls(environment.get("data_sha256") or {}, (environment.get("model") or {}).get("fingerprint"))


def check_configuration(folder: RunFolder, config: RunConfig) -> None:
    """Check that a configuration trains what the folder's run trains.

    Paths of data and model are compared by what is there (`check_contents`), so they may be moved.

    Raises:
        UserError: keys differ; they are named with both values.
    """
    path = folder.path / File.CONFIG
    if not path.exists():
        raise UserError(f"{path} is missing, so the run cannot be resumed", remedy="restore the file")
    recorded = configuration.load(path)
    moved = set(_moved(folder, recorded, config))
    differ = [
        f"{key} is {_shown(before)} in the run, and {_shown(now)} here"
        for key, before, now in _differences(recorded, config)
        if key not in moved
    ]
    if differ:
        more = f"\nand {len(differ) - 8} more" if len(differ) > 8 else ""
        raise UserError(
            "the run differs from this configuration:\n" + "\n".join(differ[:8]) + more,
            place=str(path),
            remedy="resume with the configuration of the run, or choose another output_dir",
        )


def check_contents(folder: RunFolder, config: RunConfig, now: Contents, *, accept_changed_data: bool) -> None:
    """Check that data and base model have the recorded hashes.

    Raises:
        UserError: a file has changed; it is named. Or the hashes are missing.
    """
    if not ((folder.path / File.ENVIRONMENT).exists() or accept_changed_data):
        raise UserError(
            "the file is missing, so the data cannot be compared with those of the run",
            place=str(folder.path / File.ENVIRONMENT),
            remedy="restore the file; --accept-changed-data resumes without the comparison",
        )
    recorded = Contents.recorded(folder)
    if recorded.model and now.model and recorded.model != now.model:
        raise UserError(
            "the base model is not that of the run: config.json or weights differ",
            place=config.model.path,
            remedy="name the model that the run began with, or choose another output_dir",
        )
    changed = list(_changed(folder, config, recorded, now))
    if changed and not accept_changed_data:
        key, path, before, after = changed[0]
        if before and after:
            problem = (
                f"the file has changed since the run began: its SHA-256 is {after[:12]}..., and "
                f"{before[:12]}... is recorded"
            )
        else:
            problem = f"the run began {'with' if before else 'without'} this file"
        raise UserError(
            problem,
            place=f"{path} ({key})",
            remedy="restore the data, or choose another output_dir; --accept-changed-data resumes with them",
        )


def can_reuse(folder: RunFolder, config: RunConfig, now: Contents) -> bool:
    """Return whether recorded uncertainties and the base model's evaluation are those of this run."""
    path = folder.path / File.CONFIG
    recorded = Contents.recorded(folder)
    if not path.exists():
        return False
    earlier = configuration.load(path)
    moved = set(_moved(folder, earlier, config))
    differ = {key.partition(".")[0] for key, *_ in _differences(earlier, config) if key not in moved}
    same_model = recorded.model == now.model
    return same_model and not differ & set(_ASKED) and not list(_changed(folder, config, recorded, now))


def _moved(folder: RunFolder, recorded: RunConfig, config: RunConfig) -> Iterator[str]:
    """Yield the keys whose paths may differ: what is there is compared."""
    known = Contents.recorded(folder)
    before, after = files(recorded), files(config)
    for section in {_section(key) for key in before}:
        keys = [key for key in before if _section(key) == section]
        if keys == [key for key in after if _section(key) == section] and all(
            before[key] in known.data and Path(after[key]).expanduser().exists() for key in keys
        ):
            yield section
    if known.model and Path(config.model.path).expanduser().is_dir():
        yield "model.path"


def _changed(
    folder: RunFolder, config: RunConfig, recorded: Contents, now: Contents
) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Yield key, path, recorded hash and present hash of every file that differs; None for no file."""
    before = files(configuration.load(folder.path / File.CONFIG))
    known = {_section(key) for key, path in before.items() if path in recorded.data}
    for key, path in files(config).items():
        old, new = recorded.data.get(before.get(key, "")), now.data.get(path)
        is_known = old is not None or ("[" in key and _section(key) in known)  # a pattern may match another
        if is_known and new is not None and old != new:
            yield key, path, old, new
    for path in sorted(recorded.data.keys() - set(before.values())):
        yield "data", path, recorded.data[path], None


def _section(key: str) -> str:
    """Return the configuration's key of one of its files: data.train of data.train[1]."""
    return key.partition("[")[0]


def _differences(recorded: RunConfig, config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys that must match and do not, with both values. A default equals its absence."""
    before, after = (dict(_flat(c.model_dump(exclude={"training"}))) for c in (recorded, config))
    for key in sorted(before.keys() | after.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
        if not free and not _equal(before.get(key), after.get(key)):
            yield key, before.get(key), after.get(key)
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)} | DEFAULTS
    for key in sorted(recorded.training.keys() | config.training.keys()):
        old, new = (c.training.get(key, defaults.get(key)) for c in (recorded, config))
        if not any(fnmatchcase(key, pattern) for pattern in _FREE_TRAINING) and not _equal(old, new):
            yield f"training.{key}", old, new


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _equal(a: Any, b: Any) -> bool:
    if a == b:
        return True
    try:  # 1e-4 is a text in YAML
        return not isinstance(a, bool) and not isinstance(b, bool) and float(a) == float(b)
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
