"""Cross-contamination check: packed samples must not influence each other in this model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ual.errors import UserError

_LENGTH = 4


def is_padding_free(model: PreTrainedModel) -> bool:
    """Return whether packed samples must form one unpadded sequence, as flash attention requires."""
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Raise if packing changes the hidden states of a sample.

    Two samples of four tokens are packed into one sequence. The second sample's hidden states must not depend
    on the first sample, except for the order of sums (8 eps). They must equal those of the second sample on
    its own in half the digits of the dtype: another attention kernel rounds differently in every layer, but a
    wrong position changes everything.

    transformers builds block-diagonal masks from `position_ids` for the attention implementations "sdpa",
    "eager" and "flex_attention"; flash attention takes variable lengths in a batch of one. State-space and
    linear-attention layers, and implementations without masks, carry state from one sample to the next.

    Args:
        model: on its device, with its weights in memory; its mode (train or eval) is restored.

    Raises:
        UserError: packing changes a sample; the message names architecture and attention implementation.
    """
    weight: Any = model.get_input_embeddings().weight
    tokens = torch.arange(3 * _LENGTH, device=weight.device) % weight.shape[0]
    first, other, second = tokens.view(3, _LENGTH).unbind()
    positions = torch.arange(_LENGTH, device=weight.device)
    was_training = model.training
    model.train(False)
    try:
        beside, beside_other = (
            _hidden(model, torch.cat([left, second]), positions.repeat(2))[_LENGTH:]
            for left in (first, other)
        )
        alone = _hidden(model, second, positions)
    finally:
        model.train(was_training)
    architecture = f"{type(model).__name__} with attn_implementation {model.config._attn_implementation!r}"
    eps = torch.finfo(alone.dtype).eps
    scale = alone.double().norm()
    for difference, bound, problem in (
        (beside - beside_other, 8 * eps, "mixes packed samples: the second depends on the first"),
        (beside - alone, eps**0.5, "computes a packed sample differently from the sample alone"),
    ):
        if not difference.double().norm() <= bound * scale:
            raise UserError(
                f"{architecture} {problem}",
                place="configuration, data.packing",
                remedy='set model.attn_implementation to "sdpa", "eager" or "flash_attention_2", '
                "or data.packing to false",
            )


def _hidden(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    output = model.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden
