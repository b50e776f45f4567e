"""FLOP formulas of the operators for `torch.utils.flop_counter`; importing this module registers them.

`import ual_kernels` does not import it, because PyTorch's counter imports Triton. The formula of
`linear_cross_entropy` counts matrix products. `cross_entropy` has no matrix products and counts 0, as
element-wise operations of PyTorch do.

A formula sees shapes only. So ignored and zero-weight tokens are counted, although they are dropped before
the first product. Functions of the statistics and process groups bypass the operator. Their products are
then counted one by one, for loss tokens only.

>>> import torch
>>> import ual_kernels.flops
>>> from torch.utils.flop_counter import FlopCounterMode
>>> hidden, head = torch.zeros(2, 8), torch.zeros(5, 8, requires_grad=True)
>>> with FlopCounterMode(display=False) as counter:
...     ual_kernels.linear_cross_entropy(hidden, head, torch.tensor([1, -100])).backward()
>>> counter.get_total_flops() == 2 * (2 * 2 * 5 * 8)  # logits and the gradient of the head
True
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ual_kernels._operands import LinearInputs, LinearSpec


@register_flop_formula(torch.ops.ual_kernels.linear_cross_entropy)
def linear_cross_entropy(*values: Any, **_: Any) -> int:
    """Return the FLOPs of one call of the operator for the shapes of its tensors and its scalars."""
    tensors = len(LinearInputs._fields)
    shapes, spec = LinearInputs(*values[:tensors]), LinearSpec(*values[tensors:])
    (tokens, features), vocab = shapes.input, shapes.linear_weight[0]
    rank = 0 if shapes.lora_a is None else shapes.lora_a[0]
    head, a, b = (2 * tokens * size for size in (vocab * features, rank * features, vocab * rank))
    flops = head + a + b
    if spec.input_grad:
        flops += head + a
    if spec.input_grad or spec.lora_grad:
        flops += b  # the gradient of hidden A^T
    if spec.head_grad:
        flops += head
    if spec.lora_grad:
        flops += a + b
    return int(flops)
