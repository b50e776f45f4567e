"""The operators' arguments and results as typed records, in the order of the operators' schemas.

N tokens, V classes, D features, rank r. ACC is the accumulator's dtype: float32, or float64 for float64
input. `schema` generates an operator's schema from the fields of the records.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ual_kernels.statistics import CORRECT, LINEAR_STATISTICS, LOGITS_STATISTICS, PREDICTED

ALL_TOKENS = -1
"""Value of `max_loss_tokens` if the number of loss tokens is read from the device."""


class LogitsInputs(NamedTuple):
    """Tensors of `cross_entropy`."""

    logits: Tensor  # [N, V], columns of stride 1
    target: Tensor  # [N] int32 or int64
    smoothing: Tensor  # [N] ACC
    class_weight: Tensor | None  # [V] ACC
    # [N, K] int64: `target` first, and no class twice except where the probability is 0
    classes: Tensor | None = None
    probabilities: Tensor | None = None  # [N, K] ACC, or [N, V] ACC without `classes`; None: 1 for `target`

    @property
    def dense(self) -> bool:
        """Whether the target is a probability for every class."""
        return self.classes is None and self.probabilities is not None


class LogitsSpec(NamedTuple):
    """Scalars of `cross_entropy`."""

    ignore_index: int
    softcap: float  # 0.0 is none
    logit_scale: float
    z_loss: float
    statistics: bool
    probability_grad: bool
    backend: str


class LogitsOutputs(NamedTuple):
    """Results of `cross_entropy`. Ignored tokens are 0, and NaN in the statistics."""

    loss: Tensor  # [N] ACC, for a sample weight of 1
    state: Tensor  # [4, N] ACC: reference point, log-sum, coefficient of p, dloss/ds
    statistics: Tensor  # [8, N or 0] ACC
    dprobabilities: Tensor  # like `probabilities`, or no elements

    @classmethod
    def empty(cls, inputs: LogitsInputs, spec: LogitsSpec) -> "LogitsOutputs":
        """Allocate uninitialized results."""
        acc, tokens = accumulator(inputs.logits), inputs.logits.shape[0]

        def new(*shape: int) -> Tensor:
            return inputs.logits.new_empty(shape, dtype=acc)

        return cls(
            new(tokens),
            new(4, tokens),
            new(LOGITS_STATISTICS, tokens if spec.statistics else 0),
            new(*probability_shape(inputs.probabilities, spec.probability_grad)),
        )


class LinearInputs(NamedTuple):
    """Tensors of `linear_cross_entropy`."""

    input: Tensor  # [N, D]
    linear_weight: Tensor  # [V, D]
    linear_bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D]
    lora_b: Tensor | None  # [V, r]
    target: Tensor  # [N] int32 or int64
    smoothing: Tensor  # [N] ACC
    token_scale: Tensor  # [N] ACC, sample weight over the reduction's divisor
    class_weight: Tensor | None  # [V] ACC
    classes: Tensor | None = None  # as for `LogitsInputs`
    probabilities: Tensor | None = None  # [N, K] ACC; None: 1 for `target`

    @property
    def rank(self) -> int:
        """LoRA's r, 0 without an adapter."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]


class LinearSpec(NamedTuple):
    """Scalars of `linear_cross_entropy`.

    `per_token` is True if upstream gradients may differ between tokens. `dinput` then has dtype ACC, and
    `head_grad`, `bias_grad` and `lora_grad` must be False: backward calls the operator again with the
    upstream gradient in `token_scale`.
    """

    ignore_index: int
    softcap: float  # 0.0 is none
    logit_scale: float
    lora_scale: float
    z_loss: float
    gradient_filter: float  # 0.0 is exact
    statistics: bool
    input_grad: bool
    head_grad: bool
    bias_grad: bool
    lora_grad: bool
    probability_grad: bool
    per_token: bool
    max_loss_tokens: int  # or ALL_TOKENS
    chunk_tokens: int  # 0: the backend chooses
    precision: str
    backend: str

    @property
    def gradients(self) -> bool:
        """Whether any gradient is computed."""
        return self.input_grad or self.head_grad or self.bias_grad or self.lora_grad


class LinearOutputs(NamedTuple):
    """Results of `linear_cross_entropy`. Gradients that are not requested have no elements."""

    loss: Tensor  # [N] ACC, times token_scale
    state: Tensor  # [2, N] ACC: loss for a token_scale of 1, and its derivative by the smoothing
    statistics: Tensor  # [9, N or 0] ACC
    dprobabilities: Tensor  # [N or 0, K] ACC, for a token_scale of 1
    dinput: Tensor  # [N, D], times token_scale
    dlinear_weight: Tensor  # [V, D] ACC; this and the following are sums over tokens
    dlinear_bias: Tensor  # [V] ACC
    dlora_a: Tensor  # [r, D] ACC
    dlora_b: Tensor  # [V, r] ACC

    @classmethod
    def empty(cls, inputs: LinearInputs, spec: LinearSpec) -> "LinearOutputs":
        """Allocate uninitialized results."""
        (tokens, features), vocab = inputs.input.shape, inputs.linear_weight.shape[0]
        acc = accumulator(inputs.input)

        def new(*shape: int, when: bool = True, dtype: torch.dtype = acc) -> Tensor:
            return inputs.input.new_empty((shape[0] if when else 0, *shape[1:]), dtype=dtype)

        return cls(
            loss=new(tokens),
            state=new(2, tokens),
            statistics=new(LINEAR_STATISTICS, tokens if spec.statistics else 0),
            dprobabilities=new(*probability_shape(inputs.probabilities, spec.probability_grad)),
            dinput=new(
                tokens, features, when=spec.input_grad, dtype=stored_dtype(inputs.input.dtype, spec.per_token)
            ),
            dlinear_weight=new(vocab, features, when=spec.head_grad),
            dlinear_bias=new(vocab, when=spec.bias_grad),
            dlora_a=new(inputs.rank, features, when=spec.lora_grad),
            dlora_b=new(vocab, inputs.rank, when=spec.lora_grad),
        )

    def fill_ignored(self) -> None:
        """Give every token the results of an ignored token, and call `zero_summed`."""
        for tensor in (self.loss, self.state, self.dprobabilities, self.dinput):
            tensor.zero_()
        fill_ignored(self.statistics)
        self.zero_summed()

    def zero_summed(self) -> None:
        """Set the gradients that are sums over tokens to 0, except the head's.

        The head's gradient is as large as the head; the first chunk of tokens initializes it.
        """
        for tensor in (self.dlinear_bias, self.dlora_a, self.dlora_b):
            tensor.zero_()


def fill_ignored(statistics: Tensor) -> None:
    """Fill statistics [fields, N] with those of ignored tokens."""
    statistics.fill_(torch.nan)
    statistics[CORRECT], statistics[PREDICTED] = 0.0, -1.0


def probability_shape(probabilities: Tensor | None, wanted: bool) -> tuple[int, int]:
    """The shape of `dprobabilities`."""
    if probabilities is None or not wanted:
        return 0, 0
    return probabilities.shape[0], probabilities.shape[1]


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the tensor's device; meta tensors have no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over this tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def stored_dtype(dtype: torch.dtype, per_token: bool) -> torch.dtype:
    """The dtype in which forward stores the gradient of the hidden states.

    bfloat16 has the range of float32, so a gradient that backward multiplies by a constant can be stored in
    bfloat16. In float16, 1 / tokens underflows before the loss scale is applied. Upstream gradients that
    differ between tokens would round a second time.
    """
    return dtype if dtype == torch.bfloat16 and not per_token else torch.promote_types(dtype, torch.float32)


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}


def schema(arguments: Sequence[Any], results: str, *, mutated: str = "") -> str:
    """Return an operator's schema.

    Args:
        arguments: records, whose fields become arguments in order, or names of additional tensors.
        results: the schema's part after the arrow.
        mutated: the argument that the operator overwrites.
    """
    fields: list[tuple[str, Any]] = []
    for argument in arguments:
        fields += [(argument, Tensor)] if isinstance(argument, str) else argument.__annotations__.items()
    types = ("Tensor(a!)" if name == mutated else _SCHEMA_TYPES[kind] for name, kind in fields)
    names = (name for name, _ in fields)
    return f"({', '.join(map(' '.join, zip(types, names, strict=True)))}) -> {results}"


def tensors(record: type) -> str:
    """Return the results part of a schema for a record of tensors."""
    return f"({', '.join(['Tensor'] * len(record.__annotations__))})"
