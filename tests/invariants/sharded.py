"""The program of each of two processes in test_sharded.py: every ZeRO stage and FSDP2, on a tiny model.

    deepspeed --num_gpus 2 --module tests.invariants.sharded FOLDER

One launch runs all cases, because starting processes costs more than training. Rank 0 writes
FOLDER/results.pt: for each case the loss of every step, the trained weights, and how often the head was
gathered.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ual.data import Collator
from ual.models import fuse

RANKS, SAMPLES, STEPS = 2, 2, 3
"""Processes; samples of a micro-batch in each process; optimizer steps."""
VOCAB, WIDTH = 67, 32
RATE, EPSILON = 5e-3, 1e-3
"""Of AdamW. The epsilon makes its update a smooth function of the gradient, so roundings stay small."""


@dataclass(frozen=True)
class Case:
    sharding: str  # "zero1", "zero2", "zero3", "fsdp2"
    head: str
    accumulation: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.sharding}-{self.head}-{self.accumulation}-{str(self.dtype).removeprefix('torch.')}"


HEADS = {
    "zero1": ("frozen", "trainable", "tied"),
    "zero2": ("frozen", "trainable", "tied"),
    "zero3": ("frozen", "trainable", "tied", "lora"),
    "fsdp2": ("frozen", "tied", "lora"),
}
CASES = [
    # float32 with one micro-batch and bfloat16 with four, or the other way round: each accumulation and each
    # dtype with each head and sharding, and each pair of them with each head
    *(
        Case(sharding, head, accumulation, (torch.float32, torch.bfloat16)[(index + (accumulation > 1)) % 2])
        for index, (sharding, heads) in enumerate(HEADS.items())
        for head, accumulation in product(heads, (1, 4))
    ),
    Case("zero2-offload", "frozen", 4, torch.float32),
    Case("zero3-offload", "frozen", 4, torch.bfloat16),
]


def build(head: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Return a fused model of one layer. All weights of a tied model are trained; other models have LoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, tie_word_embeddings=head == "tied", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    if head != "tied":
        targets = ["q_proj", "down_proj"] + (["lm_head"] if head == "lora" else [])
        saved = ["lm_head"] if head == "trainable" else None
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
        )
        torch.manual_seed(1)  # PEFT's draws depend on torch's default dtype
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.2)
    return fuse(model.to(dtype), **options)


def samples(accumulation: int) -> list[dict[str, Any]]:
    """Return samples for all steps, with several lengths, smoothings and weights, and up to 4 options."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(RANKS * SAMPLES * accumulation * STEPS):
        ids = torch.randint(3, VOCAB, (6 + i % 5,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]]
        smoothing, weight = 0.1 * (i % 4), 0.5 + i % 3
        made.append(
            {"id": f"sample {i}", "input_ids": ids, "labels": labels, "label_smoothing": smoothing}
            | {"sample_weight": weight}
        )
        if i % 4:
            options = tuple((ids[3] + j) % VOCAB for j in range(1 + i % 4))
            p = [0.6, *[0.4 / (i % 4)] * (i % 4)]  # 0.6 and 0.4 in bfloat16 add up to 1.002, and NaN
            made[-1] |= {"decision": 3, "option_ids": options, "option_probabilities": p}
    return made


# ---- DeepSpeed, through UALTrainer ----


def zero(case: Case, folder: Path) -> dict[str, Any]:
    from accelerate.state import AcceleratorState
    from deepspeed.utils import safe_get_full_fp32_param
    from transformers import TrainingArguments

    from ual.train import UALTrainer
    from ual.train.deepspeed import deepspeed_config, join

    class InOrder(UALTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    AcceleratorState._reset_state(reset_partial_state=True)
    settings = deepspeed_config(case.sharding)
    if case.sharding == "zero3":  # otherwise so small a model is never released between modules
        settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    arguments = TrainingArguments(
        output_dir=str(folder / str(case)), use_cpu=True, deepspeed=settings,
        bf16=case.dtype == torch.bfloat16, max_steps=STEPS, per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=case.accumulation, learning_rate=RATE, adam_epsilon=EPSILON,
        max_grad_norm=0.0, weight_decay=0.0, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none",
        remove_unused_columns=False, disable_tqdm=True, label_names=["labels"], log_level="error",
        log_level_replica="error", optim="adamw_torch",
    )  # fmt: skip
    join()
    model = build(case.head, torch.float32)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=samples(case.accumulation),
        data_collator=Collator(0),
        callbacks=[],
    )
    with counting_gathers(model) as gathers:
        trainer.train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = {name: safe_get_full_fp32_param(p) for name, p in named}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.deepspeed.destroy()
    return {"losses": losses, "weights": weights, "gathers": gathers}


@contextmanager
def counting_gathers(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count how often ZeRO-3 gathers the weight of the head, in forward and in backward."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    counts = {"forward": 0, "backward": 0}
    fetch = Coordinator.fetch_sub_module
    weights = [p for n, p in model.named_parameters() if "lm_head" in n and "lora_" not in n]

    def counted(self: Any, module: nn.Module, forward: bool) -> None:
        here = [p for p in module.parameters(recurse=False) if any(p is w for w in weights)]
        counts["forward" if forward else "backward"] += sum(p.numel() == 0 for p in here)
        fetch(self, module, forward)

    Coordinator.fetch_sub_module = counted
    try:
        yield counts
    finally:
        Coordinator.fetch_sub_module = fetch


# ---- FSDP2, without a trainer ----


def fsdp2(case: Case, folder: Path) -> dict[str, Any]:
    """Shard and train; save a distributed checkpoint before the last step, load it, and repeat that step."""
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build(case.head, torch.float32)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if case.dtype == torch.bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # smoothing, weights and the number of items are not activations
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0)
    rank = dist.get_rank()

    def step(k: int) -> float:
        def backward(batch: dict[str, Any], total: Tensor) -> Tensor:
            loss = model(**batch, num_items_in_batch=total).loss
            (loss * RANKS).backward()  # FSDP averages over ranks
            return loss.detach()

        loss = sum_of_step(
            case.accumulation, k, backward, lambda micro: micro[rank * SAMPLES : (rank + 1) * SAMPLES]
        )
        dist.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(k) for k in range(STEPS - 1)]
    saved, moments = get_state_dict(model, optimizer)
    dcp.save({"model": saved, "optimizer": moments}, checkpoint_id=folder / f"dcp-{case}")
    losses.append(step(STEPS - 1))
    trained = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    dcp.load(state := {"model": saved, "optimizer": moments}, checkpoint_id=folder / f"dcp-{case}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    again = step(STEPS - 1)
    replayed = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    same = again == losses[-1] and all(torch.equal(trained[n], replayed[n]) for n in trained)
    return {"losses": losses, "weights": trained, "replayed": same}


def sum_of_step(
    accumulation: int,
    k: int,
    backward: Callable[[dict[str, Any], Tensor], Tensor],
    share: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda micro: micro,
) -> Tensor:
    """Run backward on `share` of every micro-batch of step k; return the sum of the losses."""
    collate, size = Collator(0), RANKS * SAMPLES
    chosen = samples(accumulation)[k * size * accumulation : (k + 1) * size * accumulation]
    total = torch.tensor(
        sum(s["sample_weight"] * sum(label != -100 for label in s["labels"][1:]) for s in chosen)
    )
    loss = torch.zeros(())
    for j in range(accumulation):
        loss = loss + backward(collate(share(chosen[j * size : (j + 1) * size])), total)
    return loss


def main() -> None:
    folder = Path(sys.argv[-1])
    gc.freeze()  # after each case, accelerate collects garbage: exclude all imported modules
    results = {}
    for case in CASES:
        torch.manual_seed(5)
        results[str(case)] = (fsdp2 if case.sharding == "fsdp2" else zero)(case, folder)
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort a process that exits normally


if __name__ == "__main__":
    main()
