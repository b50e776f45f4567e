"""The cases of test_wrapped.py, in two processes over gloo: fused models in wrappers that distribute them.

Each case compares loss and gradients with one process that has the complete batch. All models are float64, so
an error is visible above a few roundings.
"""

import copy
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from ual.errors import UserError
from ual.models import FusedOutput, check_logits, fuse, unfuse

RANKS, SAMPLES, LENGTH, VOCAB = 2, 4, 12, 67
SECONDS = 300  # DeepSpeed compiles an operator on its first start
ROUNDINGS = 1024 * torch.finfo(torch.float64).eps
"""Of sums over 48 tokens, 67 classes and a few layers, relative to the largest entry."""
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None, "use_cache": False,
}  # fmt: skip

Build = Callable[[], Any]


# ---- models and batches ----


def filled(model: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()


def llama(**options: Any) -> Any:
    return filled(LlamaForCausalLM(LlamaConfig(**SIZE, **options)))


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def phi() -> Any:
    """A model whose lm_head has a bias."""
    return filled(PhiForCausalLM(PhiConfig(**SIZE)))


def mixtral() -> Any:
    options = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    return filled(MixtralForCausalLM(MixtralConfig(**SIZE, **options, experts_implementation="eager")))


def lora() -> Any:
    """A model with adapters on the body and on the lm_head."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return model.double()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 8:] = -100
    numbers = {"label_smoothing": [0.0, 0.125, 0.25, 0.5], "sample_weight": [1.0, 0.5, 2.0, 3.0]}
    columns = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return {"input_ids": ids, "labels": labels, **columns}


def total() -> Tensor:
    """The sum of the weights of all loss tokens."""
    complete = batch()
    return ((complete["labels"][:, 1:] != -100) * complete["sample_weight"][:, None]).sum()


def share(complete: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's half of the samples."""
    return {name: value.chunk(RANKS)[dist.get_rank()] for name, value in complete.items()}


# ---- comparison ----


def full(tensor: Any) -> Tensor:
    complete: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return complete.detach().clone()


def summed(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


Result = tuple[Tensor, dict[str, Tensor]]


@functools.cache
def alone(build: Build, **options: Any) -> Result:
    """Loss and gradients of one process."""
    return step(fuse(build()), **options)


def step(model: Any, **options: Any) -> Result:
    model.zero_grad()
    loss = model(**batch(), num_items_in_batch=total(), **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


@functools.cache
def alone_in_halves(build: Build) -> Result:
    """As `alone`, from two micro-batches: a router loss is a mean over each process's tokens."""
    model, loss = fuse(build()), torch.zeros(())
    for k in range(RANKS):
        half = {name: value.chunk(RANKS)[k] for name, value in batch().items()}
        part = model(**half, num_items_in_batch=total()).loss
        part.backward()
        loss = loss + part.detach()
    return loss, gradients(model)


def assert_same(got: Result, expected: Result, bound: float = ROUNDINGS) -> None:
    (loss, found), (expected_loss, wanted) = got, expected
    assert abs(loss - expected_loss) <= ROUNDINGS * abs(expected_loss), (loss, expected_loss)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, gradient in wanted.items():
        off = (found[name] - gradient).abs().max()
        assert off <= bound * gradient.abs().max(), (name, off, gradient.abs().max())


def train(model: Any, inside: nn.Module, **options: Any) -> tuple[Any, Result]:
    """Run this process's half through a model that averages gradients over processes."""
    model.zero_grad()
    output = model(**share(batch()), num_items_in_batch=total(), **options)
    (output.loss * RANKS).backward()
    return output, (summed(output.loss), gradients(inside))


def refusal(call: Callable[[], Any], kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


# ---- data parallel ----


def ddp(**how: Any) -> None:
    """Two steps: with static_graph, the first one records the graph."""
    for build, expected in ((llama, alone(llama)), (mixtral, alone_in_halves(mixtral))):
        wrapped = DistributedDataParallel(fuse(build()), **how)
        for _ in range(2):
            output, got = train(wrapped, wrapped.module, return_statistics=True, output_hidden_states=True)
            assert_same(got, expected)
        assert isinstance(output, FusedOutput)
        entropy = output.statistics.entropy
        assert entropy.shape == (SAMPLES // RANKS, LENGTH)
        assert len(output.hidden_states) == 2
        if build is mixtral:
            assert output.aux_loss.requires_grad
            assert len(output.router_logits) == 1


def fused_inside_ddp(folder: Path) -> None:
    wrapped = DistributedDataParallel(llama())
    fuse(wrapped.module)
    assert_same(train(wrapped, wrapped.module)[1], alone(llama))
    refused = refusal(lambda: fuse(DistributedDataParallel(llama())))
    assert "wrapped.module" in refused


def prepared_by_accelerate(folder: Path) -> None:
    """bfloat16 autocast, DDP and a wrapper of `forward`, and all of it removed again."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = fuse(llama().float())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(fuse(llama().float()))
    prepared = accelerator.prepare(model)
    got = train(prepared, prepared.module)[1]
    roundings = 8 * torch.finfo(torch.float32).eps  # of the sum over samples
    assert abs(got[0] - expected[0]) <= roundings * expected[0]
    # a weight's gradient is rounded to bfloat16 once alone and once in each process
    assert_same((expected[0], got[1]), expected, bound=4 * torch.finfo(torch.bfloat16).eps)
    assert "keep_fp32_wrapper=False" in refusal(lambda: unfuse(model))
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    unfuse(model)
    assert not hasattr(model(batch()["input_ids"], labels=batch()["labels"]), "statistics")


# ---- fully sharded ----


def fsdp2(build: Build, head: str, *, before: bool) -> None:
    """`fully_shard` of the layers, of the root and, for "own", of the lm_head; then `unfuse` and `fuse`."""
    from torch.distributed.fsdp import fully_shard

    expected = alone(build)
    model = build()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if before:
        fuse(model)
    for layer in base.model.layers:
        fully_shard(layer)
    if head == "own":
        fully_shard(base.lm_head)
    if head == "parts":  # LoRA's base layer and factors
        for module in (m for m in base.lm_head.modules() if type(m) is nn.Linear):
            fully_shard(module)
    fully_shard(model)
    if not before:
        assert "before FSDP shards" in refusal(lambda: fuse(model))
        fuse(model, verify=False)
    for _ in range(2):
        assert_same(train(model, model)[1], expected)
    assert "state dict" in refusal(lambda: copy.deepcopy(model), AssertionError)  # torch's own

    unfuse(model)
    with torch.no_grad():
        output = model(input_ids=batch()["input_ids"], labels=batch()["labels"])
    assert not isinstance(output, FusedOutput)
    assert (output.logits - build()(batch()["input_ids"]).logits).abs().max() <= ROUNDINGS * 100
    model.reshard()  # the root's weights stay gathered after a forward without backward
    fuse(model, verify=False)
    assert_same(train(model, model)[1], expected)


def fsdp2_of_transformers(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "llama")
    dist.barrier()
    config = DistributedConfig(fsdp_size=RANKS)
    model = LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64, distributed_config=config)
    fuse(model, verify=False)
    assert_same(train(model, model)[1], alone(llama))


def fsdp1(*, before: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    def sharded(model: Any, chosen: Callable[[nn.Module], bool]) -> Any:
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=chosen)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )

    model = fuse(llama()) if before else llama()
    wrapped = sharded(model, lambda m: type(m).__name__ == "LlamaDecoderLayer")
    if not before:
        assert "before FSDP shards" in refusal(lambda: fuse(model))
        fuse(model, verify=False)
    loss = train(wrapped, wrapped)[1][0]
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        found = gradients(model)
    assert_same(
        (loss, {name.replace("_fsdp_wrapped_module.", ""): g for name, g in found.items()}), alone(llama)
    )
    model = fuse(llama()) if before else llama()
    head = model.lm_head
    wrapped = sharded(model, lambda m: m is head)
    call = functools.partial(wrapped, **share(batch())) if before else functools.partial(fuse, model)
    assert "decoder layers only" in refusal(call)


def zero3(folder: Path) -> None:
    """`fuse` before there is an engine, and the check once there is one."""
    import deepspeed

    from ual.train.deepspeed import computing, join

    join()
    stage = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    model = llama()
    form = fuse(model)._settings.form
    unfuse(model)
    deepspeed.zero.Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, **stage})
    assert model.lm_head.weight.numel() == 0
    assert "GatheredParameters" in refusal(lambda: fuse(model))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        unfuse(fuse(model))
    assert fuse(model, verify=False)._settings.form == form
    assert "once there is an engine" in refusal(lambda: check_logits(model))
    with computing(model, stage), torch.no_grad():
        check_logits(model)
        loss = model(**batch(), num_items_in_batch=total()).loss
    assert abs(loss - alone(llama)[0]) <= ROUNDINGS * loss


# ---- tensor parallel ----


def tensor_parallel(model: Any, build: Build) -> None:
    """Every rank has the complete batch, and some rows of the lm_head."""
    with torch.no_grad():
        logits = model(batch()["input_ids"]).logits
    fuse(model)
    for over in ("all", "others"):
        assert_same(step(model, smoothing_over=over), alone(build, smoothing_over=over))
        weight = model.lm_head.weight
        assert weight.grad.placements == weight.placements
        assert weight.to_local().shape[0] < VOCAB
    found, expected = (m(**batch(), return_statistics=True).statistics for m in (model, fuse(build())))
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, equal_nan=True, msg=name)
    with torch.no_grad():
        assert torch.equal(model(batch()["input_ids"]).logits, logits)
    unfuse(model)
    own = model(input_ids=batch()["input_ids"], labels=batch()["labels"])
    assert not isinstance(own, FusedOutput)
    plain = build()(input_ids=batch()["input_ids"], labels=batch()["labels"]).loss
    assert abs(own.loss - plain) <= ROUNDINGS * plain


def transformers_tp_plan(folder: Path) -> None:
    """Every layer of the model's plan; a tied lm_head as well."""
    for build in (llama, tied):
        path = folder / build.__name__
        if dist.get_rank() == 0:
            build().save_pretrained(path)
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float64)
        tensor_parallel(model, build)
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    assert "keep adapters off the lm_head" in refusal(lambda: fuse(get_peft_model(model, config)))


def tensor_parallel_and_fsdp(folder: Path) -> None:
    """`fully_shard` of a model with a tensor-parallel lm_head, on a mesh [1, 2]."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    style = ColwiseParallel(output_layouts=Replicate())
    model = fuse(parallelize_module(phi(), mesh["tensor"], {"lm_head": style}))
    fully_shard(model, mesh=mesh["data"])
    assert_same(step(model), alone(phi))
    unfuse(model)
    assert "before fully_shard(model)" in refusal(lambda: fuse(model))


def torch_parallelize_module(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (RANKS,))
    style = ColwiseParallel(output_layouts=Replicate())
    tensor_parallel(parallelize_module(phi(), mesh, {"lm_head": style}), phi)
    rows = RowwiseParallel(input_layouts=Replicate())
    assert "column-wise" in refusal(lambda: fuse(parallelize_module(phi(), mesh, {"lm_head": rows})))


# ---- sequence parallel ----


def ulysses(folder: Path) -> None:
    """DeepSpeed's attention and loader, and the loss of transformers' Trainer.

    The last case, because it replaces attention in this process.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    from ual.train.deepspeed import join

    join()
    model = fuse(llama(attn_implementation="sdpa"))
    smoothing = batch()["label_smoothing"]
    complete = batch() | {"position_ids": torch.arange(LENGTH).repeat(SAMPLES, 1)}
    weight = complete.pop("sample_weight")
    single = fuse(llama())
    expected = single(**complete).loss
    expected.backward()
    weighted = single(**complete, sample_weight=weight).loss.detach()
    groups.mpu = mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=RANKS, seq_length=LENGTH, micro_batch_size=SAMPLES
    )

    def shards(columns: dict[str, Any]) -> dict[str, Any]:
        loader = UlyssesSPDataLoaderAdapter(
            [dict(columns)], dist.get_rank(), mpu.get_sequence_parallel_group(), RANKS, "cpu"
        )
        return next(iter(loader))

    per_token = smoothing[:, None].repeat(1, LENGTH)
    for column in (per_token, smoothing.tolist()):  # the adapter splits tensors and keeps lists
        model.zero_grad()
        inputs = shards(complete | {"label_smoothing": column})
        assert inputs["shift_labels"].shape == (SAMPLES, LENGTH // RANKS)
        loss = deepspeed_sp_compute_loss(None, model, inputs, False, Sequence())
        loss.backward()
        averaged = {name: summed(g) / RANKS for name, g in gradients(model).items()}
        assert_same((loss.detach(), averaged), (expected.detach(), gradients(single)))
    inputs = shards(complete | {"label_smoothing": per_token, "sample_weight": weight.tolist()})
    part = model(**inputs, num_items_in_batch=total()).loss
    torch.testing.assert_close(summed(part), weighted, rtol=ROUNDINGS, atol=0)


class Sequence:
    """What transformers reads of accelerate's ParallelismConfig."""

    sp_backend, sp_size = "deepspeed", RANKS


# ---- the processes ----

CASES: dict[str, Callable[[Path], None]] = {
    "ddp": lambda folder: ddp(),
    "ddp-unused": lambda folder: ddp(find_unused_parameters=True),
    "ddp-static": lambda folder: ddp(static_graph=True),
    "ddp-inside": fused_inside_ddp,
    "accelerate": prepared_by_accelerate,
    **{
        f"fsdp2-{build.__name__}-{head}-{'before' if before else 'after'}": functools.partial(
            lambda folder, *args, **how: fsdp2(*args, **how), build=build, head=head, before=before
        )
        for build, head in (
            (llama, "root"),
            (llama, "own"),
            (tied, "root"),
            (lora, "root"),
            (lora, "own"),
            (lora, "parts"),
        )
        for before in (True, False)
    },
    "fsdp2-transformers": fsdp2_of_transformers,
    "fsdp1-before": lambda folder: fsdp1(before=True),
    "fsdp1-after": lambda folder: fsdp1(before=False),
    "zero3": zero3,
    "tp-transformers": transformers_tp_plan,
    "tp-fsdp2": tensor_parallel_and_fsdp,
    "tp-torch": torch_parallelize_module,
    "ulysses": ulysses,
}


def losses(models: Iterable[Any]) -> list[float]:
    return [model(**batch(), num_items_in_batch=total()).loss.item() for model in models]


def process(rank: int, folder: Path, models: list[Any], port: int) -> None:
    """Write FOLDER/RANK.pt: the losses of the given models, and what failed in each case ("" for nothing)."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in names.items()} | {"DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS / 2))
    results: dict[str, Any] = {"given": losses(models)}
    for name, case in CASES.items():
        try:
            case(folder)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        torch.save(results, folder / f"{rank}.pt")
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort a process that exits normally
