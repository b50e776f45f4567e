"""Swap the loss of a causal language model: `fuse(model)`, and it never computes logits while training.

The patched `forward` runs the body of the model, then hands hidden states and lm_head to
`ual_kernels.linear_cross_entropy`. The lm_head is reached by calling the module itself, and an adapter's
factors by calling theirs within, so hooks that gather a partitioned weight (DeepSpeed ZeRO-3, FSDP) run as
they do for logits.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ual.errors import UserError
from ual.models import head as heads
from ual_kernels import (
    IGNORE_INDEX,
    LinearCrossEntropyOptions,
    TokenStatistics,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
    losses,
)

Model = TypeVar("Model", bound=nn.Module)
_ADDED = (
    "label_smoothing", "smoothing_over", "sample_weight", "num_items_in_batch", "max_loss_tokens",
    "return_statistics",
)  # fmt: skip


@dataclass
class FusedOutput(CausalLMOutputWithPast):
    """What a fused model returns when it is given labels: a loss, no logits, and statistics if asked.

    `statistics` fields are [B, T], aligned with `labels` shifted left: position t speaks of token t + 1, and
    holds NaN where that token is ignored.
    """

    statistics: TokenStatistics | None = None


def fuse(
    model: Model,
    *,
    z_loss: float = 0.0,
    backend: str = "auto",
    verify: bool = True,
) -> Model:
    """Give a causal LM of transformers the fused loss, in place; `unfuse` takes it back.

    Afterwards ``model(input_ids=..., labels=..., label_smoothing=..., sample_weight=...)`` returns a
    `FusedOutput` whose `loss` is the mean over non-ignored tokens (or divided by `num_items_in_batch`, as
    transformers' Trainer passes it) and whose `logits` is None. Without `labels` the model is as before, so
    generation works. Any trainer that calls the model with labels gains the loss; per-sample columns reach it
    as tensors [B] (or [B, T]). ``smoothing_over="others"`` spreads smoothing over all classes but the target
    (`ual_kernels.losses.others`); the default is all classes. ``max_loss_tokens=``, an upper bound on the
    number of labels that are not ignored, avoids a device synchronization.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a `PeftModel` around one (wrap before or after).
        z_loss, backend: as in `ual_kernels.linear_cross_entropy`.
        verify: call `check_logits`. Turn it off only for weights that are not there yet.

    Returns:
        The same object.

    Raises:
        UserError: the model has no lm_head, computes its logits in a way this cannot follow, adds a loss of
            its own (MoE router losses), or wraps its head in an adapter other than plain LoRA.
    """
    base = _causal_lm(model)
    if hasattr(base, "_ual_unfused_forward"):
        raise UserError(
            "fuse() was called on a model that is fused already", remedy="call unfuse(model) first"
        )
    if base.get_output_embeddings() is None:
        raise UserError(f"{type(base).__name__} has no lm_head, so there is no loss to fuse")
    if getattr(base.config, "output_router_logits", False):
        raise UserError(
            f"{type(base).__name__} adds a router loss, which the fused loss would drop",
            remedy="set output_router_logits=False in the model's config",
        )
    softcap, logit_scale = _logit_transform(base)
    if verify:
        if base.get_input_embeddings().weight.numel() == 0 or base.device.type == "meta":
            raise UserError(
                "fuse() cannot check a model whose weights are not in memory",
                remedy="pass verify=False, and call check_logits(model) where the model can compute",
            )
        check_logits(model)
    unfused = base.forward

    @functools.wraps(unfused)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        label_smoothing: float | Tensor = 0.0,
        smoothing_over: str = "all",
        sample_weight: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        max_loss_tokens: int | None = None,
        return_statistics: bool = False,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return unfused(*args, **kwargs)
        if smoothing_over not in ("all", "others"):
            raise ValueError(f'smoothing_over must be "all" or "others", got {smoothing_over!r}')
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        if "position_ids" in kwargs:
            # a cache, which transformers makes unasked, would hide from it that a sequence is packed
            kwargs.setdefault("use_cache", False)
        body = self.base_model(*args, **kwargs)
        if shift_labels is None:
            assert labels is not None
            # the last position predicts nothing: it is dropped with the other ignored tokens, without a copy
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)

        def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, TokenStatistics | None]:
            smoothing = label_smoothing
            if smoothing_over == "others":
                smoothing = losses.others(smoothing, len(weight))
            arguments: dict[str, Any] = {
                **head,
                "label_smoothing": smoothing,
                "sample_weight": sample_weight,
                "num_items": num_items_in_batch,
                "softcap": softcap,
                "logit_scale": logit_scale,
                "z_loss": z_loss,
                "options": LinearCrossEntropyOptions(max_loss_tokens=max_loss_tokens),
                "backend": backend,
            }
            if return_statistics:
                return linear_cross_entropy_with_statistics(hidden, weight, shift_labels, **arguments)
            return linear_cross_entropy(hidden, weight, shift_labels, **arguments), None

        head = self.get_output_embeddings()  # type: ignore[no-untyped-call]
        loss, statistics = heads.call_head(head, body.last_hidden_state, compute)
        return FusedOutput(
            loss=loss,
            past_key_values=getattr(body, "past_key_values", None),
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            statistics=statistics,
        )

    forward.__signature__ = _signature(unfused)  # type: ignore[attr-defined]
    base._ual_unfused_forward = unfused
    base.forward = MethodType(forward, base)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`."""
    base = _causal_lm(model)
    if hasattr(base, "_ual_unfused_forward"):
        del base._ual_unfused_forward
        del base.forward
    return model


def _causal_lm(model: nn.Module) -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"fuse() takes a transformers model or a PeftModel, got {type(base).__name__}")
    return base


def _signature(unfused: Callable[..., Any]) -> inspect.Signature:
    """The original parameters and ours: trainers drop data columns that `forward` does not name."""
    signature = inspect.signature(unfused)
    parameters = list(signature.parameters.values())
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    present = {p.name for p in named}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _ADDED
        if name not in present
    ]
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[self, *named, *added, *rest])


# ---- how a model turns the head's output into logits ----


def _logit_transform(base: PreTrainedModel) -> tuple[float | None, float]:
    """Softcap and scale, by the names that transformers' configs use for them."""
    config = base.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= factor
    return softcap, scale


def check_head(model: nn.Module) -> None:
    """Refuse a model whose head could not be fused in training; weights need not be there.

    Raises:
        UserError: see `ual.models.head.check_head`.
    """
    heads.check_head(_causal_lm(model).get_output_embeddings())


@torch.no_grad()
def check_logits(model: nn.Module) -> None:
    """Compare lm_head(hidden), under the config's softcap and scale, with the model's own logits.

    Args:
        model: as for `fuse`, before or after it; partitioned weights need an engine that gathers them.

    Raises:
        UserError: they differ by more than rounding: the loss of this architecture cannot be fused.
    """
    base = _causal_lm(model)
    softcap, logit_scale = _logit_transform(base)
    was_training = base.training
    base.eval()
    try:
        probe = torch.arange(4, device=base.device)[None] % base.config.get_text_config().vocab_size
        theirs = base(input_ids=probe).logits.double()
        hidden = base.base_model(input_ids=probe).last_hidden_state
        raw = base.get_output_embeddings()(hidden).double() * logit_scale
    finally:
        base.train(was_training)
    ours = softcap * torch.tanh(raw / softcap) if softcap else raw
    # two roundings of the dtype in which the model keeps logits
    bound = 4 * torch.finfo(hidden.dtype).eps * max(1.0, theirs.abs().max().item())
    if ours.shape != theirs.shape or not (ours - theirs).abs().max().item() <= bound:
        raise UserError(
            f"{type(base).__name__} does not compute its logits as softcap(scale * lm_head(hidden)) with the "
            f"softcap ({softcap}) and scale ({logit_scale:g}) of its config, so its loss cannot be fused",
            remedy="please report the architecture; train it without fuse() meanwhile",
        )
