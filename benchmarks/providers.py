"""Who is compared: each provider makes a loss of a `Case`, as data.

`solves` says which question it answers. A peer that knows one smoothing for all rows, or none, is measured on
that easier question, and every table says so. What cannot be imported is named and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interpreted import INTERPRETED, repair
from benchmarks.machine import version
from benchmarks.problems import IGNORED, Case
from ual_kernels import cross_entropy, linear_cross_entropy

Loss: TypeAlias = Callable[[Case], Tensor]
LogitsLoss: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | float], Tensor
]  # logits, target, smoothing -> mean

ONE_SMOOTHING = 0.1


class Solves(Enum):
    PER_ROW = "s per row"
    ONE = f"one s = {ONE_SMOOTHING}"
    NONE = "s = 0"

    def smoothing(self, wanted: Tensor | float) -> Tensor | float:
        """What comes closest: one for all rows in the place of one for each, or none."""
        if self is Solves.PER_ROW:
            return wanted
        return ONE_SMOOTHING if self is Solves.ONE and isinstance(wanted, Tensor) else 0.0


class MissingError(Exception):
    """A provider that is not here, and what would bring it."""


@dataclass(frozen=True)
class Provider:
    name: str
    solves: Solves
    build: Callable[[], Any]  # imports what it needs; returns a Loss, or a LogitsLoss
    package: str = "torch"
    weights: bool = False  # takes a weight for each row
    rows: bool = True  # has reduction="none"
    ours: str = ""  # "high" or "fast" where it is ours
    needs_gpu: bool = False

    def load(self) -> Any:
        """Import it.

        Raises:
            MissingError: with the reason, and the command that would install it.
        """
        if self.needs_gpu and not torch.cuda.is_available():
            raise MissingError("needs a GPU")
        try:
            repair()
            return self.build()
        except ImportError as error:
            if version(self.package) is None:
                raise MissingError(
                    f"{self.package} is not installed: pip install --no-deps {self.package}"
                ) from error
            raise MissingError(f"{self.package} {version(self.package)} does not import: {error}") from error

    @property
    def how(self) -> str:
        """How its kernels run here."""
        in_triton = self.package in ("triton", "liger-kernel", "cut-cross-entropy", "flash-attn")
        return "interpreted" if INTERPRETED and in_triton else ""

    def ask(self, case: Case) -> Case:
        """The question that it can answer.

        Raises:
            MissingError: it has no reduction="none".
        """
        if case.reduction == "none" and not self.rows:
            raise MissingError('has no reduction="none"')
        weight = case.weight if self.weights else None
        return case._replace(smoothing=self.solves.smoothing(case.smoothing), weight=weight)


# ---- hidden states and head in ----


def _ours(precision: str, variant: str = "") -> Callable[[], Loss]:
    def build() -> Loss:
        if variant:
            from ual_kernels._triton import linear_cross_entropy as kernels

        def loss(c: Case) -> Tensor:
            if variant:
                kernels.VARIANT = variant  # stays, for the backward that may call the kernels once more
            return linear_cross_entropy(
                c.hidden, c.head, c.target, label_smoothing=c.smoothing, sample_weight=c.weight,
                reduction=c.reduction, precision=precision, backend="triton" if variant else "torch",
            )  # fmt: skip

        return loss

    return build


def naive(c: Case) -> Tensor:
    """What per-row smoothing takes today: logits in the model's dtype, log_softmax in float32, autograd."""
    live = c.target != IGNORED
    log_p = torch.log_softmax(F.linear(c.hidden, c.head).float(), -1)
    nll = -log_p.gather(1, torch.where(live, c.target, 0)[:, None]).squeeze(1)
    rows = (1 - c.smoothing) * nll - c.smoothing * log_p.mean(1)
    rows = torch.where(live, rows if c.weight is None else rows * c.weight, 0.0)
    if c.reduction == "none":
        return rows
    return rows.sum() / (live if c.weight is None else torch.where(live, c.weight, 0.0)).sum()


def _of_logits(c: Case) -> Tensor:
    logits = F.linear(c.hidden, c.head)
    return F.cross_entropy(logits, c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _torch_chunked() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise MissingError(f"F.linear_cross_entropy needs PyTorch 2.13, here is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()  # its own choice of chunks and of accumulation
    return lambda c: F.linear_cross_entropy(
        c.hidden, c.head, c.target, reduction=c.reduction, options=options
    )


def _liger_fused() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda c: liger(c.hidden, c.head, c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _liger_of_logits() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy as liger

    def loss(c: Case) -> Tensor:
        logits = F.linear(c.hidden, c.head)
        return liger(logits, c.target, label_smoothing=c.smoothing, reduction=c.reduction)

    return loss


def _cut(filter_eps: str | None) -> Callable[[], Loss]:
    def build() -> Loss:
        from cut_cross_entropy import linear_cross_entropy as cut

        return lambda c: cut(c.hidden, c.head, c.target, reduction=c.reduction, filter_eps=filter_eps)

    return build


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda c: quack(c.hidden, c.head, c.target, reduction=c.reduction)


PROVIDERS = (
    Provider("ours", Solves.PER_ROW, _ours("high"), "ual-kernels", weights=True, ours="high"),
    Provider("ours, fast", Solves.PER_ROW, _ours("fast"), "ual-kernels", weights=True, ours="fast"),
    Provider(
        "ours, triton fused", Solves.PER_ROW, _ours("high", "fused"), "triton", weights=True, ours="high"
    ),
    Provider(
        "ours, triton cublas", Solves.PER_ROW, _ours("high", "cublas"), "triton", weights=True, ours="high"
    ),
    Provider("naive", Solves.PER_ROW, lambda: naive, weights=True),
    Provider("F.cross_entropy of 16-bit logits", Solves.ONE, lambda: _of_logits),
    Provider("torch chunked", Solves.NONE, _torch_chunked),
    Provider("liger fused linear", Solves.ONE, _liger_fused, "liger-kernel"),
    Provider("liger of 16-bit logits", Solves.ONE, _liger_of_logits, "liger-kernel"),
    Provider("cut-cross-entropy", Solves.NONE, _cut("high"), "cut-cross-entropy"),  # "high" is its default
    Provider("cut-cross-entropy, no filter", Solves.NONE, _cut(None), "cut-cross-entropy"),
    Provider("quack", Solves.NONE, _quack, "quack-kernels", rows=False, needs_gpu=True),
)


# ---- logits in: computed ones, that may be overwritten ----


def _ours_of_logits(inplace: bool) -> LogitsLoss:
    def loss(logits: Tensor, target: Tensor, smoothing: Tensor | float) -> Tensor:
        return cross_entropy(
            logits, target, label_smoothing=smoothing, inplace_backward=inplace, backend="triton"
        )

    return loss


def _liger_logits() -> LogitsLoss:
    from liger_kernel.transformers.functional import liger_cross_entropy as liger

    return lambda logits, target, s: liger(logits, target, label_smoothing=s)


def _flash_logits() -> LogitsLoss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as flash

    return lambda logits, target, s: flash(logits, target, label_smoothing=s, inplace_backward=True)[0].mean()


def _compiled_logits() -> LogitsLoss:
    def loss(logits: Tensor, target: Tensor, smoothing: Tensor | float) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    return torch.compile(loss, dynamic=False)


LOGITS_PROVIDERS = (
    Provider("ours, in place", Solves.PER_ROW, lambda: _ours_of_logits(True), "triton", ours="high"),
    Provider("ours", Solves.PER_ROW, lambda: _ours_of_logits(False), "triton", ours="high"),
    Provider("liger, in place", Solves.ONE, _liger_logits, "liger-kernel"),
    Provider("flash-attn, in place", Solves.ONE, _flash_logits, "flash-attn", needs_gpu=True),
    Provider("torch.compile", Solves.ONE, _compiled_logits),
)


def chosen(providers: tuple[Provider, ...], patterns: list[str]) -> list[Provider]:
    """Those named, in their order; all for no name. A name that ends in * stands for all that start so.

    Raises:
        ValueError: nobody has the name.
    """

    def fits(provider: Provider, pattern: str) -> bool:
        start = pattern.removesuffix("*")
        return provider.name.startswith(start) if start != pattern else provider.name == pattern

    for pattern in patterns:
        if not any(fits(p, pattern) for p in providers):
            known = "; ".join(p.name for p in providers)
            raise ValueError(
                f"--providers: nobody is called {pattern!r}; wanted a name, or its start and *: {known}"
            )
    return [p for p in providers if not patterns or any(fits(p, x) for x in patterns)]
