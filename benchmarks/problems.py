"""Problem sizes, named after the models they come from; their inputs; and the exact results in float64."""

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ual_kernels import SparseTarget

IGNORED = -100
LORA_RANK, LORA_SCALE = 16, 2.0

Adapter: TypeAlias = tuple[Tensor, Tensor, float]  # A [R, D], B [V, R], scale


class Case(NamedTuple):
    """The arguments of one call of a loss, and the upstream gradient."""

    hidden: Tensor  # [N, D]; without a head, the logits [N, V]
    head: Tensor | None  # [V, D]
    target: Tensor  # [N]; IGNORED if not a loss token
    smoothing: Tensor | float  # [N] float32, or one number for all tokens
    weight: Tensor | None = None  # [N] float32
    reduction: str = "mean"
    upstream: Tensor | None = None  # [N] float32, for reduction="none"
    lora: Adapter | None = None  # added to the head
    soft: SparseTarget | None = None  # [N, K], with `target` as its first class; replaces `target`

    def differentiable(self) -> dict[str, Tensor]:
        """Return the inputs that require a gradient, by the name of the gradient."""
        a, b, _ = self.lora or (None, None, 0)
        named = {"dE" if self.head is not None else "dz": self.hidden, "dC": self.head, "dA": a, "dB": b}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def merged(self) -> "Case":
        """Return the same case with the adapter merged into the head."""
        if self.lora is None or self.head is None:
            return self
        a, b, scale = self.lora
        return self._replace(head=self.head + scale * (b @ a), lora=None)


class Exact(NamedTuple):
    """The loss and its gradients in float64."""

    token_losses: Tensor  # [N], weighted
    loss: Tensor  # their mean
    gradients: dict[str, Tensor]  # of the mean, or of sum(upstream * token_losses)


def exact(case: Case) -> Exact:
    """Return the loss and its gradients by definition, in float64."""
    e = case.hidden.detach().double()
    c = None if case.head is None else case.head.detach().double()
    a, b, scale = (t.detach().double() if isinstance(t, Tensor) else t for t in case.lora or (None, None, 0))
    effective = c if a is None else c + scale * (b @ a)
    s = torch.as_tensor(case.smoothing, device=e.device).double().expand(len(e))
    selected = case.target != IGNORED
    y = torch.where(selected, case.target, 0)[:, None]
    share = selected.double()
    if case.weight is not None:
        share = torch.where(selected, case.weight.double(), 0.0)
    p = torch.ones_like(y, dtype=e.dtype)
    if case.soft is not None:
        y, p = torch.where(selected[:, None], case.soft.indices, 0), case.soft.probabilities.double()
    log_p = torch.log_softmax(e if effective is None else e @ effective.T, -1)
    losses = (-(1 - s) * (p * log_p.gather(1, y)).sum(1) - s * log_p.mean(1)) * share
    upstream = share / share.sum() if case.upstream is None else share * case.upstream.double()
    vocab = log_p.shape[1]
    dz = log_p.exp_().sub_((s / vocab)[:, None])
    dz.scatter_add_(1, y, (s - 1)[:, None] * p).mul_(upstream[:, None])
    loss = losses.sum() / share.sum()
    if effective is None:
        return Exact(losses, loss, {"dz": dz})
    gradients = {"dE": dz @ effective, "dC": dz.T @ e}
    if a is not None:
        gradients |= {"dA": scale * (b.T @ gradients["dC"]), "dB": scale * (gradients["dC"] @ a.T)}
    return Exact(losses, loss, gradients)


@dataclass(frozen=True)
class Setting:
    """What is trained, and what varies between tokens."""

    name: str
    trainable: bool = False
    lora: bool = False  # rank LORA_RANK on a frozen head
    smoothed: bool = True
    weighted: bool = False  # with reduction="none" and an upstream gradient per token
    ignored: float = 0.0  # share of the tokens
    classes: int = 0  # of a SparseTarget; 0 is a class index

    @property
    def products(self) -> int:
        """The number of matrix products that any implementation needs: E C^T, X C, and X^T E."""
        return 3 if self.trainable or self.lora else 2


FROZEN = Setting("frozen")
SOFT = Setting("soft-targets", classes=20)
SETTINGS = (
    FROZEN,
    Setting("none+weights", weighted=True),
    Setting("trainable", trainable=True),
    Setting("lora", lora=True),
    Setting("no-smoothing", smoothed=False),
    Setting("half-ignored", ignored=0.5),
    Setting("most-ignored", ignored=0.8),
    SOFT,
    Setting("soft-targets-trainable", trainable=True, classes=20),
)


@dataclass(frozen=True)
class Problem:
    name: str
    rows: int  # N, tokens
    features: int  # D
    vocab: int  # V

    def case(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
        """Return random hidden states and a head, with logits of standard deviation 3."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale, generator=g)

        n, d = self.rows, self.features
        hidden = normal(n, d, scale=1.0).requires_grad_()
        head = normal(self.vocab, d, scale=3 / math.sqrt(d)).requires_grad_(setting.trainable)
        case = self._labeled(hidden, setting, g)._replace(head=head)
        if setting.lora:
            a = normal(LORA_RANK, d, scale=1 / math.sqrt(d)).requires_grad_()
            b = normal(self.vocab, LORA_RANK, scale=0.1).requires_grad_()
            case = case._replace(lora=(a, b, LORA_SCALE))
        return case

    def logits(self, device: torch.device, dtype: torch.dtype) -> Case:
        """Return random logits, without a head."""
        g = torch.Generator(device).manual_seed(0)
        values = torch.empty((self.rows, self.vocab), device=device, dtype=dtype)
        return self._labeled(values.normal_(std=3, generator=g).requires_grad_(), FROZEN, g)

    def _labeled(self, hidden: Tensor, setting: Setting, g: torch.Generator) -> Case:
        n, device = self.rows, hidden.device
        target = torch.randint(self.vocab, (n,), device=device, generator=g)
        target[: int(n * setting.ignored)] = IGNORED  # prompts come first
        smoothing = torch.rand(n, device=device, generator=g) * 0.2 if setting.smoothed else 0.0
        case = Case(hidden, None, target, smoothing)
        if setting.classes:
            indices = torch.randint(self.vocab, (n, setting.classes), device=device, generator=g)
            indices[:, 0] = target
            logits = torch.empty(indices.shape, device=device).normal_(std=2, generator=g)
            case = case._replace(soft=SparseTarget(indices, logits.softmax(1)))
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
