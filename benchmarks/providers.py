"""The implementations that are compared. Each `Provider` makes a function that computes the loss of a `Case`.

`solves` states which problem a provider solves. An implementation with one smoothing for all tokens, or
with none, is measured on that easier problem, and every table says so. A provider that cannot be imported
is reported as skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interpreted import INTERPRETED, repair
from benchmarks.machine import version
from benchmarks.problems import IGNORED, Case
from ual_kernels import (
    CrossEntropyOptions,
    LinearCrossEntropyOptions,
    cross_entropy,
    linear_cross_entropy,
)

Loss: TypeAlias = Callable[[Case], Tensor]

ONE_SMOOTHING = 0.1


class Solves(Enum):
    PER_TOKEN = "s per token"
    ONE = f"one s = {ONE_SMOOTHING}"
    NONE = "s = 0"

    def smoothing(self, wanted: Tensor | float) -> Tensor | float:
        """Return the supported smoothing that is closest to the wanted one."""
        if self is Solves.PER_TOKEN:
            return wanted
        return ONE_SMOOTHING if self is Solves.ONE and isinstance(wanted, Tensor) else 0.0


class MissingError(Exception):
    """A provider cannot be used here; the message says why and how to install it."""


@dataclass(frozen=True)
class Provider:
    name: str
    solves: Solves
    build: Callable[[], Loss]  # imports what it needs
    package: str = "torch"
    weights: bool = False  # supports a weight per token
    per_token: bool = True  # supports reduction="none"
    adapters: bool = False  # supports a LoRA head; for other providers the adapter is merged in each step
    soft: bool = False  # supports targets of several classes
    ours: str = ""  # the precision, "high" or "fast", of a loss of this project
    needs_gpu: bool = False
    overwrites: bool = False  # overwrites its input
    compiles: bool = False  # compiles for each shape, which takes long

    def load(self) -> Loss:
        """Import the implementation and return its loss.

        Raises:
            MissingError: it is not installed, or does not run on this machine.
        """
        if self.needs_gpu and not torch.cuda.is_available():
            raise MissingError("needs a GPU")
        try:
            if self.how:  # other providers must also run without Triton
                repair()
            loss = self.build()
        except ImportError as error:
            if version(self.package) is None:
                raise MissingError(
                    f"{self.package} is not installed: pip install --no-deps {self.package}"
                ) from error
            raise MissingError(f"{self.package} {version(self.package)} does not import: {error}") from error
        return loss if self.adapters else lambda case: loss(case.merged())

    @property
    def how(self) -> str:
        """Return "interpreted" if its kernels run in Triton's interpreter, else ""."""
        in_triton = self.package in ("triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "unsloth")
        return "interpreted" if INTERPRETED and in_triton else ""

    def adapt(self, case: Case) -> Case:
        """Return the case that this provider supports and that is closest to `case`.

        Raises:
            MissingError: it lacks reduction="none", or targets of several classes.
        """
        if case.soft is not None and not self.soft:
            raise MissingError("no support for targets of several classes")
        if case.reduction == "none" and not self.per_token:
            raise MissingError('no support for reduction="none"')
        weight = case.weight if self.weights else None
        return case._replace(smoothing=self.solves.smoothing(case.smoothing), weight=weight)


# ---- losses of given logits; with a head, the complete logits are computed first ----


def reduced(losses: Tensor, c: Case) -> Tensor:
    """Weight and reduce token losses, [N], as `c` specifies."""
    selected = c.target != IGNORED
    losses = torch.where(selected, losses if c.weight is None else losses * c.weight, 0.0)
    if c.reduction == "none":
        return losses
    return losses.sum() / (selected if c.weight is None else torch.where(selected, c.weight, 0.0)).sum()


def naive(c: Case) -> Tensor:
    """Smoothing per token without fusion: logits in the model's dtype, log_softmax in float32, autograd.

    A target of several classes is made dense.
    """
    log_p = torch.log_softmax(_logits(c).float(), -1)
    if c.soft is not None:
        indices = torch.where(c.target[:, None] != IGNORED, c.soft.indices, 0)
        nll = -(torch.zeros_like(log_p).scatter_add_(1, indices, c.soft.probabilities) * log_p).sum(1)
    else:
        nll = -log_p.gather(1, torch.where(c.target != IGNORED, c.target, 0)[:, None]).squeeze(1)
    return reduced((1 - c.smoothing) * nll - c.smoothing * log_p.mean(1), c)


def _logits(c: Case) -> Tensor:
    return c.hidden if c.head is None else F.linear(c.hidden, c.head)


def _naive_compiled() -> Loss:
    return torch.compile(naive, dynamic=False)


def _torch_logits(c: Case) -> Tensor:
    return F.cross_entropy(_logits(c), c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _label_smoother() -> Loss:
    from transformers.trainer_pt_utils import LabelSmoother

    return lambda c: LabelSmoother(c.smoothing)({"logits": _logits(c)}, c.target)


def _liger_logits() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy as liger

    return lambda c: liger(_logits(c), c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _quack_logits() -> Loss:
    from quack import cross_entropy as quack

    return lambda c: quack(_logits(c), c.target, reduction=c.reduction)


def _flash_logits() -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as flash

    def loss(c: Case) -> Tensor:
        losses = flash(_logits(c), c.target, label_smoothing=c.smoothing, inplace_backward=True)[0]
        return reduced(losses, c)

    return loss


def _unsloth_logits() -> Loss:
    from unsloth.kernels import fast_cross_entropy_loss as unsloth

    return lambda c: unsloth(_logits(c)[None], c.target[None])


def _ours_logits(inplace: bool) -> Callable[[], Loss]:
    def loss(c: Case) -> Tensor:
        return cross_entropy(
            c.hidden, c.soft or c.target, label_smoothing=c.smoothing, sample_weight=c.weight,
            reduction=c.reduction, options=CrossEntropyOptions(inplace_backward=inplace),
            backend="triton" if torch.cuda.is_available() else "torch",
        )  # fmt: skip

    return lambda: loss


# ---- losses of hidden states and a head ----


def _ours(precision: str, variant: str = "") -> Callable[[], Loss]:
    def build() -> Loss:
        if variant:
            from ual_kernels._triton import linear_cross_entropy as kernels

        def loss(c: Case) -> Tensor:
            if variant:
                kernels.VARIANT = variant  # not reset: backward may call the kernels again
            return linear_cross_entropy(
                c.hidden, c.head, c.soft or c.target, linear_lora=c.lora, label_smoothing=c.smoothing,
                sample_weight=c.weight, reduction=c.reduction,
                options=LinearCrossEntropyOptions(precision=precision),
                backend="triton" if variant else "torch",
            )  # fmt: skip

        return loss

    return build


def _torch_chunked() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"F.linear_cross_entropy needs PyTorch 2.13 or newer, got {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()  # its defaults for chunks and accumulation
    return lambda c: F.linear_cross_entropy(
        c.hidden, c.head, c.target, reduction=c.reduction, options=options
    )


def _liger_fused() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda c: liger(c.hidden, c.head, c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _cut(filter_eps: str | None) -> Callable[[], Loss]:
    def build() -> Loss:
        from cut_cross_entropy import linear_cross_entropy as cut

        return lambda c: cut(c.hidden, c.head, c.target, reduction=c.reduction, filter_eps=filter_eps)

    return build


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda c: quack(c.hidden, c.head, c.target, reduction=c.reduction)


def _trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction as Trl

    def loss(c: Case) -> Tensor:
        target = torch.where(c.target != IGNORED, c.target, 0)
        # without extra outputs, as its trainer calls it without logging; 8192 columns per tile is its default
        log_p = Trl.apply(c.hidden, c.head, None, target, 1.0, 8_192, None, 1.0, ())[0]
        return reduced(-log_p, c)

    return loss


def composed(build: Callable[[], Loss]) -> Callable[[], Loss]:
    """Add smoothing per token to a plain loss, as s (z_y - mean z): two dot products per token."""

    def wrapped() -> Loss:
        plain = build()

        def loss(c: Case) -> Tensor:
            assert c.head is not None
            y = torch.where(c.target != IGNORED, c.target, 0)
            z_y = (c.hidden * c.head[y]).sum(1, dtype=torch.float32)
            # float32, because a 16-bit mean of the head loses the smoothing term
            mean_z = c.hidden.float() @ c.head.mean(0, dtype=torch.float32)
            rest = c._replace(smoothing=0.0, weight=None)
            if c.weight is None:
                return plain(rest) + reduced(c.smoothing * (z_y - mean_z), c)
            losses = plain(rest._replace(reduction="none"))
            return reduced(losses + c.smoothing * (z_y - mean_z), c)

        return loss

    return wrapped


HIGH, FAST = "high", "fast"
PROVIDERS = (
    Provider(
        "ours",
        Solves.PER_TOKEN,
        _ours(HIGH),
        "ual-kernels",
        weights=True,
        adapters=True,
        soft=True,
        ours=HIGH,
    ),
    Provider(
        "ours, fast",
        Solves.PER_TOKEN,
        _ours(FAST),
        "ual-kernels",
        weights=True,
        adapters=True,
        soft=True,
        ours=FAST,
    ),
    Provider(
        "ours, triton fused",
        Solves.PER_TOKEN,
        _ours(HIGH, "auto"),
        "triton",
        weights=True,
        adapters=True,
        soft=True,
        ours=HIGH,
    ),
    Provider(
        "ours, triton cublas",
        Solves.PER_TOKEN,
        _ours(HIGH, "cublas"),
        "triton",
        weights=True,
        adapters=True,
        soft=True,
        ours=HIGH,
    ),
    Provider("naive", Solves.PER_TOKEN, lambda: naive, weights=True, soft=True),
    Provider(
        "naive, torch.compile", Solves.PER_TOKEN, _naive_compiled, weights=True, soft=True, compiles=True
    ),
    Provider("torch chunked + rank one", Solves.PER_TOKEN, composed(_torch_chunked), weights=True),
    Provider("liger + rank one", Solves.PER_TOKEN, composed(_liger_fused), "liger-kernel", weights=True),
    Provider(
        "cut-cross-entropy + rank one",
        Solves.PER_TOKEN,
        composed(_cut("high")),
        "cut-cross-entropy",
        weights=True,
    ),
    Provider("F.cross_entropy of 16-bit logits", Solves.ONE, lambda: _torch_logits),
    Provider("transformers LabelSmoother", Solves.ONE, _label_smoother, "transformers", per_token=False),
    Provider("liger fused linear", Solves.ONE, _liger_fused, "liger-kernel"),
    Provider("liger of 16-bit logits", Solves.ONE, _liger_logits, "liger-kernel"),
    Provider("torch chunked", Solves.NONE, _torch_chunked),
    Provider("trl chunked", Solves.NONE, _trl, "trl", weights=True),
    Provider("cut-cross-entropy", Solves.NONE, _cut("high"), "cut-cross-entropy"),  # "high" is its default
    Provider("cut-cross-entropy, no filter", Solves.NONE, _cut(None), "cut-cross-entropy"),
    Provider("quack", Solves.NONE, _quack, "quack-kernels", per_token=False, needs_gpu=True),
)
LOGITS_PROVIDERS = (
    Provider("ours", Solves.PER_TOKEN, _ours_logits(False), "ual-kernels", weights=True, ours=HIGH),
    Provider(
        "ours, in place",
        Solves.PER_TOKEN,
        _ours_logits(True),
        "ual-kernels",
        weights=True,
        ours=HIGH,
        overwrites=True,
    ),
    Provider("naive", Solves.PER_TOKEN, lambda: naive, weights=True),
    Provider("naive, torch.compile", Solves.PER_TOKEN, _naive_compiled, weights=True, compiles=True),
    Provider("F.cross_entropy", Solves.ONE, lambda: _torch_logits),
    Provider("transformers LabelSmoother", Solves.ONE, _label_smoother, "transformers", per_token=False),
    Provider("liger, in place", Solves.ONE, _liger_logits, "liger-kernel", overwrites=True),
    Provider(
        "flash-attn, in place", Solves.ONE, _flash_logits, "flash-attn", needs_gpu=True, overwrites=True
    ),
    Provider("quack", Solves.NONE, _quack_logits, "quack-kernels", needs_gpu=True),
    Provider(
        "unsloth, in place",
        Solves.NONE,
        _unsloth_logits,
        "unsloth",
        per_token=False,
        needs_gpu=True,
        overwrites=True,
    ),
)


def chosen(providers: tuple[Provider, ...], patterns: list[str]) -> list[Provider]:
    """Return the providers that match any pattern, in their order; all of them without patterns.

    A pattern is a name, or a prefix that ends in *.

    Raises:
        ValueError: a pattern matches no provider.
    """

    def matches(provider: Provider, pattern: str) -> bool:
        start = pattern.removesuffix("*")
        return provider.name.startswith(start) if start != pattern else provider.name == pattern

    for pattern in patterns:
        if not any(matches(p, pattern) for p in providers):
            known = "; ".join(p.name for p in providers)
            raise ValueError(
                f"--provider: unknown provider {pattern!r}; give a name or a prefix ending in *. "
                f"Available: {known}"
            )
    return [p for p in providers if not patterns or any(matches(p, x) for x in patterns)]
