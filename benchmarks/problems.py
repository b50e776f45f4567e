"""Sizes worth measuring, named after the models they come from; inputs for them; and the exact answer."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Case(NamedTuple):
    """One call of a loss, and what its gradient is multiplied by."""

    hidden: Tensor  # [N, D]
    head: Tensor  # [V, D]
    target: Tensor  # [N], IGNORED where a row does not count
    smoothing: Tensor | float  # [N] float32, or one number for all rows
    weight: Tensor | None = None  # [N] float32
    reduction: str = "mean"
    upstream: Tensor | None = None  # [N] float32, for reduction="none"


class Exact(NamedTuple):
    """Float64."""

    rows: Tensor  # [N], times their weight
    loss: Tensor  # their mean
    hidden: Tensor  # [N, D], gradient of the mean, or of sum(upstream * rows)
    head: Tensor  # [V, D], likewise


def exact(case: Case) -> Exact:
    """By definition, in float64."""
    e, c = case.hidden.detach().double(), case.head.detach().double()
    s = torch.as_tensor(case.smoothing, device=e.device).double().expand(len(e))
    live = case.target != IGNORED
    y = torch.where(live, case.target, 0)[:, None]
    scale = live.double()
    if case.weight is not None:
        scale = torch.where(live, case.weight.double(), 0.0)
    log_p = torch.log_softmax(e @ c.T, -1)
    rows = (-(1 - s) * log_p.gather(1, y).squeeze(1) - s * log_p.mean(1)) * scale
    a = scale / scale.sum() if case.upstream is None else scale * case.upstream.double()
    dz = log_p.exp_().sub_((s / len(c))[:, None])
    dz.scatter_add_(1, y, (s - 1)[:, None]).mul_(a[:, None])
    return Exact(rows, rows.sum() / scale.sum(), dz @ c, dz.T @ e)


@dataclass(frozen=True)
class Setting:
    """One way to train: what is frozen, what differs between rows, how many of them count."""

    name: str
    trainable: bool = False
    smoothed: bool = True
    weighted: bool = False  # with reduction="none" and an upstream gradient of its own for every row
    ignored: float = 0.0


FROZEN = Setting("frozen")
SETTINGS = (
    FROZEN,
    Setting("trainable", trainable=True),
    Setting("none+weights", weighted=True),
    Setting("half-ignored", ignored=0.5),
    Setting("no-smoothing", smoothed=False),
)


@dataclass(frozen=True)
class Problem:
    name: str
    rows: int
    features: int
    vocab: int

    def case(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
        """Random hidden states and a head whose logits have a standard deviation of about 3."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale, generator=g)

        n = self.rows
        hidden = normal(n, self.features, scale=1.0).requires_grad_()
        head = normal(self.vocab, self.features, scale=3 / math.sqrt(self.features))
        target = torch.randint(self.vocab, (n,), device=device, generator=g)
        smoothing = torch.rand(n, device=device, generator=g) * 0.2 if setting.smoothed else 0.0
        target[: int(n * setting.ignored)] = IGNORED  # prompts come first
        case = Case(hidden, head.requires_grad_(setting.trainable), target, smoothing)
        if not setting.weighted:
            return case
        weight = torch.rand(n, device=device, generator=g) + 0.5
        return case._replace(weight=weight, reduction="none", upstream=weight.flip(0) / n)


CPU_PROBLEMS = (
    Problem("smollm2", 1_024, 576, 49_152),
    Problem("gemma3", 512, 640, 262_144),
)
GPU_PROBLEMS = (
    Problem("llama3", 8_192, 4_096, 128_256),
    Problem("llama2", 8_192, 4_096, 32_000),
    Problem("qwen2.5", 8_192, 3_584, 151_936),
    Problem("gemma2", 8_192, 2_304, 256_000),
)
TINY = Problem("tiny", 16, 64, 320)
PROBLEMS = {p.name: p for p in (*CPU_PROBLEMS, *GPU_PROBLEMS, TINY)}
