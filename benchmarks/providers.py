"""Who is compared: each provider makes a loss of a `Case`, as data.

`solves` says which question it answers. A peer that knows one smoothing for all rows, or none, is measured on
that easier question, and every table says so. What cannot be imported is named and left out.
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
    build: Callable[[], Loss]  # imports what it needs
    package: str = "torch"
    weights: bool = False  # takes a weight for each row
    rows: bool = True  # has reduction="none"
    adapters: bool = False  # takes an adapter beside the head; for the others it is merged, each step
    ours: str = ""  # "high" or "fast" where it is ours
    needs_gpu: bool = False
    overwrites: bool = False  # its input
    compiles: bool = False  # for a while, for each shape

    def load(self) -> Loss:
        """Import it.

        Raises:
            MissingError: with the reason, and the command that would install it.
        """
        if self.needs_gpu and not torch.cuda.is_available():
            raise MissingError("needs a GPU")
        try:
            if self.how:  # the others need no Triton, and must run where there is none
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
        """How its kernels run here."""
        in_triton = self.package in ("triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "unsloth")
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


# ---- logits in; with a head, what needs the logits whole ----


def reduced(rows: Tensor, c: Case) -> Tensor:
    """Weigh and reduce the losses of rows, [N], as `Case` asks."""
    live = c.target != IGNORED
    rows = torch.where(live, rows if c.weight is None else rows * c.weight, 0.0)
    if c.reduction == "none":
        return rows
    return rows.sum() / (live if c.weight is None else torch.where(live, c.weight, 0.0)).sum()


def naive(c: Case) -> Tensor:
    """What per-row smoothing takes today: logits in the model's dtype, log_softmax in float32, autograd."""
    log_p = torch.log_softmax(_logits(c).float(), -1)
    nll = -log_p.gather(1, torch.where(c.target != IGNORED, c.target, 0)[:, None]).squeeze(1)
    return reduced((1 - c.smoothing) * nll - c.smoothing * log_p.mean(1), c)


def _logits(c: Case) -> Tensor:
    return c.hidden if c.head is None else F.linear(c.hidden, c.head)


def _naive_compiled() -> Loss:
    return torch.compile(naive, dynamic=False)


def _torch_whole(c: Case) -> Tensor:
    return F.cross_entropy(_logits(c), c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _label_smoother() -> Loss:
    from transformers.trainer_pt_utils import LabelSmoother

    return lambda c: LabelSmoother(c.smoothing)({"logits": _logits(c)}, c.target)


def _liger_whole() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy as liger

    return lambda c: liger(_logits(c), c.target, label_smoothing=c.smoothing, reduction=c.reduction)


def _quack_whole() -> Loss:
    from quack import cross_entropy as quack

    return lambda c: quack(_logits(c), c.target, reduction=c.reduction)


def _flash_whole() -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as flash

    def loss(c: Case) -> Tensor:
        rows = flash(_logits(c), c.target, label_smoothing=c.smoothing, inplace_backward=True)[0]
        return reduced(rows, c)

    return loss


def _unsloth_whole() -> Loss:
    from unsloth.kernels import fast_cross_entropy_loss as unsloth

    return lambda c: unsloth(_logits(c)[None], c.target[None])


def _ours_whole(inplace: bool) -> Callable[[], Loss]:
    def loss(c: Case) -> Tensor:
        return cross_entropy(
            c.hidden, c.target, label_smoothing=c.smoothing, sample_weight=c.weight, reduction=c.reduction,
            options=CrossEntropyOptions(inplace_backward=inplace),
            backend="triton" if torch.cuda.is_available() else "torch",
        )  # fmt: skip

    return lambda: loss


# ---- hidden states and head in ----


def _ours(precision: str, variant: str = "") -> Callable[[], Loss]:
    def build() -> Loss:
        if variant:
            from ual_kernels._triton import linear_cross_entropy as kernels

        def loss(c: Case) -> Tensor:
            if variant:
                kernels.VARIANT = variant  # stays, for the backward that may call the kernels once more
            return linear_cross_entropy(
                c.hidden, c.head, c.target, linear_lora=c.lora, label_smoothing=c.smoothing,
                sample_weight=c.weight, reduction=c.reduction,
                options=LinearCrossEntropyOptions(precision=precision),
                backend="triton" if variant else "torch",
            )  # fmt: skip

        return loss

    return build


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
        live = c.target != IGNORED
        # without extra outputs, as its trainer asks where it logs nothing; 8192 columns a tile is its default
        rows = -Trl.apply(c.hidden, c.head, None, torch.where(live, c.target, 0), 1.0, 8_192, None, 1.0, ())[
            0
        ]
        return reduced(rows, c)

    return loss


def composed(build: Callable[[], Loss]) -> Callable[[], Loss]:
    """A peer's plain loss plus s (z_y - mean z), which needs no more than dot products of rows: s per row."""

    def wrapped() -> Loss:
        plain = build()

        def loss(c: Case) -> Tensor:
            assert c.head is not None
            y = torch.where(c.target != IGNORED, c.target, 0)
            z_y = (c.hidden * c.head[y]).sum(1, dtype=torch.float32)
            # the mean row keeps float32, as its product with 16-bit states would lose what smoothing adds
            mean_z = c.hidden.float() @ c.head.mean(0, dtype=torch.float32)
            rest = c._replace(smoothing=0.0, weight=None)
            if c.weight is None:
                return plain(rest) + reduced(c.smoothing * (z_y - mean_z), c)
            rows = plain(rest._replace(reduction="none"))
            return reduced(rows + c.smoothing * (z_y - mean_z), c)

        return loss

    return wrapped


HIGH, FAST = "high", "fast"
PROVIDERS = (
    Provider("ours", Solves.PER_ROW, _ours(HIGH), "ual-kernels", weights=True, adapters=True, ours=HIGH),
    Provider(
        "ours, fast", Solves.PER_ROW, _ours(FAST), "ual-kernels", weights=True, adapters=True, ours=FAST
    ),
    Provider(
        "ours, triton fused",
        Solves.PER_ROW,
        _ours(HIGH, "auto"),
        "triton",
        weights=True,
        adapters=True,
        ours=HIGH,
    ),
    Provider(
        "ours, triton cublas",
        Solves.PER_ROW,
        _ours(HIGH, "cublas"),
        "triton",
        weights=True,
        adapters=True,
        ours=HIGH,
    ),
    Provider("naive", Solves.PER_ROW, lambda: naive, weights=True),
    Provider("naive, torch.compile", Solves.PER_ROW, _naive_compiled, weights=True, compiles=True),
    Provider("torch chunked + rank one", Solves.PER_ROW, composed(_torch_chunked), weights=True),
    Provider("liger + rank one", Solves.PER_ROW, composed(_liger_fused), "liger-kernel", weights=True),
    Provider(
        "cut-cross-entropy + rank one",
        Solves.PER_ROW,
        composed(_cut("high")),
        "cut-cross-entropy",
        weights=True,
    ),
    Provider("F.cross_entropy of 16-bit logits", Solves.ONE, lambda: _torch_whole),
    Provider("transformers LabelSmoother", Solves.ONE, _label_smoother, "transformers", rows=False),
    Provider("liger fused linear", Solves.ONE, _liger_fused, "liger-kernel"),
    Provider("liger of 16-bit logits", Solves.ONE, _liger_whole, "liger-kernel"),
    Provider("torch chunked", Solves.NONE, _torch_chunked),
    Provider("trl chunked", Solves.NONE, _trl, "trl", weights=True),
    Provider("cut-cross-entropy", Solves.NONE, _cut("high"), "cut-cross-entropy"),  # "high" is its default
    Provider("cut-cross-entropy, no filter", Solves.NONE, _cut(None), "cut-cross-entropy"),
    Provider("quack", Solves.NONE, _quack, "quack-kernels", rows=False, needs_gpu=True),
)
LOGITS_PROVIDERS = (
    Provider("ours", Solves.PER_ROW, _ours_whole(False), "ual-kernels", weights=True, ours=HIGH),
    Provider(
        "ours, in place",
        Solves.PER_ROW,
        _ours_whole(True),
        "ual-kernels",
        weights=True,
        ours=HIGH,
        overwrites=True,
    ),
    Provider("naive", Solves.PER_ROW, lambda: naive, weights=True),
    Provider("naive, torch.compile", Solves.PER_ROW, _naive_compiled, weights=True, compiles=True),
    Provider("F.cross_entropy", Solves.ONE, lambda: _torch_whole),
    Provider("transformers LabelSmoother", Solves.ONE, _label_smoother, "transformers", rows=False),
    Provider("liger, in place", Solves.ONE, _liger_whole, "liger-kernel", overwrites=True),
    Provider("flash-attn, in place", Solves.ONE, _flash_whole, "flash-attn", needs_gpu=True, overwrites=True),
    Provider("quack", Solves.NONE, _quack_whole, "quack-kernels", needs_gpu=True),
    Provider(
        "unsloth, in place",
        Solves.NONE,
        _unsloth_whole,
        "unsloth",
        rows=False,
        needs_gpu=True,
        overwrites=True,
    ),
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
                f"--provider: nobody is called {pattern!r}; wanted a name, or its start and *, of: {known}"
            )
    return [p for p in providers if not patterns or any(fits(p, x) for x in patterns)]
