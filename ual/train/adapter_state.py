"""An adapter's unpartitioned optimizer state: every ZeRO stage, on any number of processes, resumes from it.

DeepSpeed's own checkpoints are pickles of each process's partition and fit one world size. An adapter is
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
    """Gather and save float32 weights and moments of the trained parameters. Every process must call this.

    Args:
        path: the file to write; None in processes that do not write.
        model: the model that DeepSpeed was given.
        zero: DeepSpeed's ZeRO optimizer, after at least one step.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    first = next(iter(zero.optimizer.state.values()))
    gathered = {"step": torch.as_tensor(float(first["step"])).reshape(1)}
    for name, p in _trained(model):
        for key in ("weight", *_moments(first)):
            value = safe_get_full_fp32_param(p) if key == "weight" else safe_get_full_optimizer_state(p, key)
            if path is not None:
                gathered[f"{key}/{name}"] = value.detach().float().cpu().contiguous().clone()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(gathered, path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the trained weights, before DeepSpeed casts and partitions them."""
    gathered = load_file(path)
    with torch.no_grad():
        for name, p in _trained(model):
            p.copy_(gathered[f"weight/{name}"])


def restore_weights(path: Path, model: nn.Module) -> None:
    """Load the trained weights into a model that DeepSpeed has trained. Every process must call this."""
    import deepspeed

    gathered = load_file(path)
    for name, p in _trained(model):
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
            p.copy_(gathered[f"weight/{name}"])


def load_moments(path: Path, model: nn.Module, zero: Any) -> None:
    """Load this process's partition of weights and moments into a ZeRO optimizer before its first step."""
    gathered = load_file(path)
    keys = sorted({name.partition("/")[0] for name in gathered} - {"step", "weight"})
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        partitions = zero.fp32_partitioned_groups_flat
    else:
        partitions = zero.single_partition_of_fp32_groups
    for flat in partitions:
        moments = {key: torch.zeros_like(flat) for key in keys}
        step = gathered["step"][0].clone()
        if zero.optimizer.param_groups[0].get("fused"):  # torch's fused kernels read the step on the GPU
            step = step.to(flat.device)
        zero.optimizer.state[flat] = {"step": step} | moments
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 link them at the first step
        zero._lazy_init_hp_params_optimizer_state()
    for name, p in _trained(model):
        for key in ("weight", *keys):
            _set(zero, p, gathered[f"{key}/{name}"], None if key == "weight" else key)


def _set(zero: Any, p: nn.Parameter, value: Tensor, key: str | None) -> None:
    if not hasattr(p, "ds_id"):  # stages 1 and 2
        if p._hp_mapping is not None:  # type: ignore[attr-defined]
            p.set_full_hp_param(value.to(p.device), key)  # type: ignore[attr-defined]
        return
    # DeepSpeed's own setter ignores the padding of the last partition
    partition, _ = zero._get_fp32_opt_state_partition(p, release_swap_buffers=False, optim_state_key=key)
    start = partition.numel() * torch.distributed.get_rank()
    values = value.flatten()[start : start + partition.numel()]
    partition.data[: values.numel()].copy_(values)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _moments(state: dict[str, Any]) -> list[str]:
    """Return the names of the optimizer's tensors with the weights' shape, such as exp_avg and exp_avg_sq."""
    sizes = {k: v.numel() for k, v in state.items() if isinstance(v, Tensor)}
    return sorted(k for k, size in sizes.items() if size == max(sizes.values()) and k != "step")
