"""Fused models in DDP, FSDP, tensor and sequence parallelism give the loss and gradients of one process.

Two processes are spawned once, with fused models as arguments, and run every case of
tests/invariants/wrapped.py.
"""

import time
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.invariants.wrapped import CASES, RANKS, SECONDS, llama, lora, losses, process
from tests.ual.runs import free_port
from ual.models import fuse

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given() -> list[Any]:
    return [fuse(llama()), fuse(lora())]


@pytest.fixture(scope="module")
def results(given: list[Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wrapped")
    context: Any = multiprocessing.spawn(process, args=(folder, given, free_port()), nprocs=RANKS, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline
    except Exception as error:  # each case's own failure is in its file
        print(error)
    finally:
        for child in context.processes:
            child.kill()
            child.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


HEAD, LOSS, PROBE = (f"ual/models/{name}.py" for name in ("head", "loss", "probe"))


@pytest.mark.kills(
    HEAD, 'if "fused_loss" in kwargs and is_tensor_parallel(self):', "if False:", only="tp-torch"
)
@pytest.mark.kills(HEAD, "if not (alone and _is_vocab_parallel(module)):", "if False:", only="tp-torch")
@pytest.mark.kills(HEAD, "if isinstance(module, FullyShardedDataParallel):", "if False:", only="fsdp1-after")
@pytest.mark.kills(LOSS, "process_group=group)", "process_group=None)", only="tp-transformers")
@pytest.mark.kills(
    LOSS, "losses.others(smoothing, len(weight))",
    'losses.others(smoothing, len(getattr(weight, "_local_tensor", weight)))', only="tp-torch",
)  # fmt: skip
@pytest.mark.kills(
    PROBE, "return not heads.is_tensor_parallel(embedding)", "return True", only="tp-transformers"
)
@pytest.mark.kills(
    PROBE, "return not heads.is_tensor_parallel(embedding)", "return False", only="fsdp2-llama-root-after"
)
@pytest.mark.kills(
    PROBE, 'return not (hasattr(weight, "ds_id") and embedding._forward_pre_hooks)', "return True",
    only="zero3",
)  # fmt: skip
@pytest.mark.kills(
    PROBE, "shell = object.__new__(type(base))", "import copy; shell = copy.copy(base)",
    only="fsdp2-llama-own-after",
)  # fmt: skip
@pytest.mark.kills(
    "ual/models/fuse.py", "if isinstance(base, _FusedCausalLM) and (own :=", "if (own := None) and (own :=",
    only="accelerate",
)  # fmt: skip
@pytest.mark.kills(
    "ual/models/attach.py", "if bases == cls.__bases__:", "if True:", only="fsdp2-llama-root-before"
)
@pytest.mark.kills(PROBE, ".type, enabled=False)", ".type, enabled=True)", only="accelerate")
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(results: list[dict[str, Any]], case: str) -> None:
    for rank, found in enumerate(results):
        assert found.get(case, "did not run") == "", f"rank {rank}: {found.get(case)}"


@pytest.mark.kills(
    "ual/models/attach.py", "return _new, (cls._plain, cls.__bases__[0], cls._constants), *reduced[2:]",
    "return reduced",
)  # fmt: skip
def test_spawned_processes_receive_fused_models(given: list[Any], results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["given"] == losses(given)
