"""DeepSpeed ZeRO: shipped profiles, checks of a configuration, and settings for a CPU."""

import gc
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from pydantic import ValidationError

from ual.config.base import nearest
from ual.errors import UserError

log = logging.getLogger(__name__)

PROFILES = {path.stem: path for path in sorted((Path(__file__).parent / "profiles").glob("*.json"))}
_PLACE = "configuration, deepspeed"
_OLDEST = "0.19"  # the first version whose ZeRO-3 hooks were tested with the fused loss
_KEYS = (
    "zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "data_types", "activation_checkpointing", "aio",
    "checkpoint", "steps_per_print", "wall_clock_breakdown", "comms_logger", "flops_profiler",
    "prescale_gradients", "gradient_predivide_factor", "torch_autocast", "zero_optimization_stage",
)  # fmt: skip


def deepspeed_config(name: str) -> dict[str, Any]:
    """Return a shipped profile or a DeepSpeed JSON file, after checks that DeepSpeed makes late or never.

    Args:
        name: one of `PROFILES`, or a path. transformers fills "auto" values from `training`.

    Raises:
        UserError: the name is unknown, or the file unreadable; DeepSpeed is missing or too old; a section or
            key is unknown; ZeRO-3 would save no weights; float16 on a CPU.
    """
    values = _read(name)
    _require_deepspeed()
    _check(values, f"{_PLACE}: {name}")
    if not torch.cuda.is_available():
        _settle_for_cpu(values)
    return values


def join() -> None:
    """Let DeepSpeed use the process group of transformers; call it before loading a partitioned model."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


def stage(values: Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage of a configuration; 0 without one."""
    return int((values or {}).get("zero_optimization", {}).get("stage", 0))


def can_compute(model: torch.nn.Module) -> bool:
    """Return whether the model has an engine that gathers partitioned weights."""
    return any("pre_bwd_fn" in module.__dict__ for module in model.modules())


@contextmanager
def computing(model: torch.nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Give a model in ZeRO-3 partitions a temporary engine, so that it computes before training."""
    import deepspeed

    zero = {k: v for k, v in values["zero_optimization"].items() if v != "auto"}
    dtype = next(model.parameters()).dtype
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero | {"offload_optimizer": None},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    try:
        yield
    finally:
        engine.destroy()
        for module in model.modules():  # DeepSpeed's next engine would use the closures of this engine
            vars(module).pop("pre_bwd_fn", None)
            vars(module).pop("post_bwd_fn", None)
        del engine
        gc.collect()


def _read(name: str) -> dict[str, Any]:
    path = PROFILES.get(name, Path(name).expanduser())
    if name not in PROFILES and not path.is_file():
        raise UserError(
            f"{name!r} is neither a shipped profile nor a file ({path.absolute()}); "
            f"{nearest(name, list(PROFILES))}",
            place=_PLACE,
            remedy=f"give one of {', '.join(PROFILES)}, or the path of a DeepSpeed JSON file",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the file as JSON: {error}", place=f"{_PLACE}: {path}") from error
    if not isinstance(values, dict):
        given = type(values).__name__
        raise UserError(f"expected a JSON object {{...}}, got {given}", place=f"{_PLACE}: {path}")
    return values


def _require_deepspeed() -> None:
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "DeepSpeed is not installed", place=_PLACE, remedy="pip install 'ual-kernels[train]'"
        ) from error
    if Version(version) < Version(_OLDEST):
        raise UserError(
            f"DeepSpeed {version} is older than {_OLDEST}, whose ZeRO-3 hooks the fused loss needs",
            place=_PLACE,
            remedy=f"pip install 'deepspeed>={_OLDEST}'",
        )


def _check(values: Mapping[str, Any], place: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in values:
        if key not in _KEYS:
            if (hint := nearest(key, _KEYS)).startswith("did you mean"):
                raise UserError(f'unknown key "{key}"; {hint}', place=place)  # DeepSpeed would ignore it
            log.warning("%s: key %r is passed to DeepSpeed unchecked", place, key)
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero:
        remedy = "start from a shipped profile"
        raise UserError('"zero_optimization" with a "stage" is missing', place=place, remedy=remedy)
    try:
        DeepSpeedZeroConfig(**{k: v for k, v in zero.items() if v != "auto"})
    except (ValueError, TypeError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(["zero_optimization", *map(str, problem["loc"])])
        raise UserError(f"{where}: {problem['msg']}", place=place) from error
    if stage(values) == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "ZeRO-3 would save only partitions, which other programs cannot load",
            place=place,
            remedy='set "stage3_gather_16bit_weights_on_model_save": true in zero_optimization',
        )


def _settle_for_cpu(values: dict[str, Any]) -> None:
    """Refuse or turn off what DeepSpeed cannot do without a GPU, before it fails during training."""
    import deepspeed

    if values.get("fp16", {}).get("enabled") is True:
        remedy = "use bf16 or float32"
        raise UserError("DeepSpeed has no float16 on a CPU", place=f"{_PLACE}, fp16", remedy=remedy)
    # DeepSpeed's all-reduce over shared memory is compiled on first use. That needs a compiler and ninja,
    # and after a killed build a stale lock blocks every later run. gloo needs nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(offload := values["zero_optimization"].get(name), dict):
            offload["pin_memory"] = False
