"""Whether a model keeps the rows of a packed sequence apart: asked of the model itself, before training."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ual.errors import UserError

_ROW = 4


def is_padding_free(model: PreTrainedModel) -> bool:
    """Whether packed rows must come as one unpadded sequence: flash attention tells them apart only there."""
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which a packed row sees its neighbour, or is not what it is alone.

    Two rows of four tokens share a sequence. The second must not change with the tokens of the first, beyond
    the order of sums (8 eps), and must equal itself alone to half the digits of the dtype: another attention
    kernel rounds otherwise in every layer, but a wrong position changes everything.

    transformers builds block-diagonal masks from `position_ids` for the attention implementations "sdpa",
    "eager" and "flex_attention", and flash attention's variable lengths in a batch of one; state-space and
    linear-attention layers, and implementations without masks, carry state from row to row.

    Args:
        model: on its device, with its weights in memory; left in the mode in which it came.

    Raises:
        UserError: it does not, naming the architecture and its attention implementation.
    """
    embeddings: nn.Module = model.get_input_embeddings()
    weight = embeddings.weight
    assert isinstance(weight, Tensor)
    tokens = torch.arange(3 * _ROW, device=weight.device) % weight.shape[0]
    first, other, second = tokens.view(3, _ROW).unbind()
    positions = torch.arange(_ROW, device=weight.device)
    was_training = model.training
    model.train(False)
    try:
        beside, beside_other = (
            _hidden(model, torch.cat([left, second]), positions.repeat(2))[_ROW:] for left in (first, other)
        )
        alone = _hidden(model, second, positions)
    finally:
        model.train(was_training)
    attention = model.config._attn_implementation
    eps = torch.finfo(alone.dtype).eps
    scale = alone.double().norm()
    for difference, bound, what in (
        (beside - beside_other, 8 * eps, "lets packed rows see each other"),
        (beside - alone, eps**0.5, "computes a packed row otherwise than the row alone"),
    ):
        if not difference.double().norm() <= bound * scale:
            raise UserError(
                f"{type(model).__name__} with attn_implementation {attention!r} {what}",
                place="configuration, data.packing",
                remedy='set model.attn_implementation to "sdpa", "eager" or "flash_attention_2", '
                "or data.packing to false",
            )


def _hidden(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    body: nn.Module = model.base_model
    hidden = body(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden[0]
