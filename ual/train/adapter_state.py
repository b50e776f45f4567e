"""An adapter's optimizer under ZeRO, saved whole: any stage on any number of processes goes on from it.

DeepSpeed's own checkpoints are pickles of each process's partition, which fit one world size. An adapter is
small, so its float32 weights and moments are gathered into one safetensors file instead.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "adapter_state.safetensors"


def save(path: Path | None, model: nn.Module, zero: Any) -> None:
    """Gather float32 weights and moments of the trained parameters; every process takes part.

    Args:
        path: the file to write, None in processes that do not write.
        model: as DeepSpeed was given it.
        zero: DeepSpeed's ZeRO optimizer, after at least one step.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    first = next(iter(zero.optimizer.state.values()))
    whole = {"step": torch.as_tensor(float(first["step"])).reshape(1)}
    for name, p in _trained(model):
        for key in ("weight", *_moments(first)):
            value = safe_get_full_fp32_param(p) if key == "weight" else safe_get_full_optimizer_state(p, key)
            if path is not None:
                whole[f"{key}/{name}"] = value.detach().float().cpu().contiguous().clone()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Give the model its trained weights before DeepSpeed casts and shares them out."""
    whole = load_file(path)
    with torch.no_grad():
        for name, p in _trained(model):
            p.copy_(whole[f"weight/{name}"])


def load_moments(path: Path, model: nn.Module, zero: Any) -> None:
    """Give a new ZeRO optimizer, which has not stepped yet, this process's part of weights and moments."""
    whole = load_file(path)
    keys = sorted({name.partition("/")[0] for name in whole} - {"step", "weight"})
    for flat in _partitions(zero):
        zero.optimizer.state[flat] = {"step": whole["step"][0].clone()} | {
            key: torch.zeros_like(flat) for key in keys
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 link them at the first step
        zero._lazy_init_hp_params_optimizer_state()
    for name, p in _trained(model):
        for key in ("weight", *keys):
            _set(zero, p, whole[f"{key}/{name}"], None if key == "weight" else key)


def _set(zero: Any, p: nn.Parameter, value: Tensor, key: str | None) -> None:
    if not hasattr(p, "ds_id"):  # stages 1 and 2
        if p._hp_mapping is not None:  # type: ignore[attr-defined]
            p.set_full_hp_param(value.to(p.device), key)  # type: ignore[attr-defined]
        return
    # DeepSpeed's own setter does not know of the padding of a last partition
    part, _ = zero._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=key)
    start = part.numel() * torch.distributed.get_rank()
    mine = value.flatten()[start : start + part.numel()]
    part.data[: mine.numel()].copy_(mine)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _partitions(zero: Any) -> list[Tensor]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _moments(state: dict[str, Any]) -> list[str]:
    """The optimizer's tensors that are shaped like the weights, such as exp_avg and exp_avg_sq."""
    size = max(v.numel() for v in state.values() if isinstance(v, Tensor))
    return sorted(k for k, v in state.items() if isinstance(v, Tensor) and v.numel() == size and k != "step")
