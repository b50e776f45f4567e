"""Find out how a model computes logits and loss, and check the fused loss of a few tokens against them.

Config attributes do not tell: Granite divides logits by `logits_scaling` and HyperCLOVA X multiplies by it;
MPT has a `logit_scale` that it does not use. So the head is made to return chosen numbers in place of logits,
and the model's own `forward` shows what it makes of them.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast

from ual.errors import UserError
from ual.models import head as heads
from ual.models.attach import plain_class
from ual.models.loss import LossForm, TokenLoss, shifted
from ual_kernels import IGNORE_INDEX

_TOKENS = 8
_LARGEST = 64.0  # of the check's logits: a cap shows in any dtype
_SMOOTHING = 0.3
_REMEDY = "please report the architecture; train it without fuse() meanwhile"
_RECORDER, _RECORDING = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"
_GATHER = (
    "call fuse(model) while its weights are in memory: before FSDP shards them, or within "
    "deepspeed.zero.GatheredParameters(list(model.parameters()))"
)


def loss_form(base: Any, head: nn.Module) -> LossForm:
    """Find out the scale and the cap of the logits, and whether the model shifts its labels.

    Args:
        base: a `PreTrainedModel`, fused or not. If its weights are not in memory, its body is not computed.
        head: its head, prepared by `ual.models.head.prepare`.

    Raises:
        UserError: the logits are not softcap(scale * head(hidden)) of one call of the head, or the loss is
            not their cross entropy over all labels that are not ignored.
    """
    absent = _weights_are_absent(base)
    model = _without_body(base, head) if absent else base
    batch = _batch(base, "cpu" if absent else _device(base))
    chosen = _chosen_logits(int(head.out_features))  # type: ignore[arg-type]

    def reply(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != batch["input_ids"].shape:
            raise _refusal(base, f"calls its lm_head with hidden states of shape {list(hidden.shape)}")
        return chosen[None].to("cpu" if hidden.is_meta else hidden.device, copy=True)

    def own(**more: Tensor) -> tuple[Tensor, Tensor]:
        with _evaluating(base), torch.no_grad(), heads.capturing(head, reply) as captured:
            outputs = _own_forward(model, {**batch, **more}, routers=not absent)
            captured.hidden  # noqa: B018  raises if the head was not called once
        return outputs["logits"], (outputs["loss"] - router_loss(base, outputs)).double().cpu()

    with _errors_of(base, _GATHER if absent else _REMEDY):
        logits, loss = own()
    if logits.shape != (1, *chosen.shape):
        raise _refusal(base, f"makes logits of shape {list(logits.shape)} from {[1, *chosen.shape]}")
    scale, softcap = _scale_and_cap(base, chosen, logits[0].double().cpu())
    padding = (torch.arange(_TOKENS) < _TOKENS - 2).to(batch["input_ids"])[None]
    padded_loss = loss
    with suppress(Exception):  # a model that takes no mask cannot drop labels by it
        _, padded_loss = own(attention_mask=padding)
    labels = batch["labels"][0].cpu()
    expected = softcap_of(chosen * scale, softcap)
    bound = 16 * torch.finfo(torch.float32).eps * expected[3:].abs().max()
    if (padded_loss - loss).abs() > bound:
        raise _refusal(base, "drops the labels of padding (where attention_mask is 0) from its loss")
    for shifts in (True, False):
        target = shifted(labels, IGNORE_INDEX) if shifts else labels
        if (loss - cross_entropy(expected, target)).abs() <= bound:
            return LossForm(scale, softcap, shifts)
    raise _refusal(base, "does not compute its loss as the cross entropy of its logits")


def check(base: Any, head: nn.Module, form: LossForm) -> None:
    """Compare the fused loss of a few tokens with the model's own loss and with float64 from its own logits.

    The head's input is scaled up, so that logits are large. A smoothed loss and the gradient of the head's
    input are compared as well.

    Args:
        base: a fused `PreTrainedModel`. Its weights are in memory, or an engine gathers them (ZeRO-3).
        head, form: as in `loss_form`.

    Raises:
        UserError: they differ by more than rounding, or the model cannot compute the probe.
    """
    if _weights_are_absent(base):
        raise UserError(
            "fuse() cannot check a model whose weights are not in memory",
            remedy=f"{_GATHER}; or pass verify=False, and call check_logits(model) once there is an engine",
        )
    batch = _batch(base, _device(base))
    with _evaluating(base), _errors_of(base), _without_autocast(base):
        with torch.no_grad():
            with heads.capturing(head, None) as captured:
                _own_forward(base, batch)
            largest = head(captured.hidden).abs().max().item() * abs(form.scale)
        wanted = min(_LARGEST, 2 * form.softcap) if form.softcap else _LARGEST
        hidden = captured.hidden.detach() * (wanted / largest if largest > 0 else 1.0)
        with heads.given(head, hidden), torch.no_grad():
            own = _own_forward(base, batch)
            fused = base(**batch).loss
            smoothed = base(**batch, label_smoothing=_SMOOTHING).loss
    logits = own["logits"][0].double()
    target = shifted(batch["labels"][0], IGNORE_INDEX) if form.shifts_labels else batch["labels"][0]
    target = target.to(logits.device)
    own_loss = own["loss"] + _z_loss(base, logits[target != IGNORE_INDEX])
    effect = cross_entropy(logits, target, label_smoothing=_SMOOTHING) - cross_entropy(logits, target)
    # the model rounds its logits to its dtype, and its loss to float32;
    # a loss changes by at most twice as much as its logits
    eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps)
    bound = 4 * eps * max(1.0, logits.abs().max().item())
    for what, ours, theirs in (("loss", fused, own_loss), ("smoothing", smoothed - fused, effect)):
        if not abs(ours.item() - theirs.item()) <= bound:
            raise _refusal(
                base, f"has a {what} of {theirs.item():.6g}, and the fused one is {ours.item():.6g}"
            )
    if not any(hasattr(p, "ds_id") for p in head.parameters()):
        _check_gradient(base, head, form, hidden, batch, bound)


def _z_loss(base: Any, logits: Tensor) -> Tensor:
    """Return what `fuse(z_loss=...)` adds to the loss of these tokens, [N, V]."""
    return base._settings.z_loss * logits.logsumexp(-1).square().mean()  # type: ignore[no-any-return]


def _check_gradient(
    base: Any, head: nn.Module, form: LossForm, hidden: Tensor, batch: dict[str, Tensor], bound: float
) -> None:
    """Compare the gradients of the head's input, for the smoothed loss."""
    labels = batch["labels"]
    target = shifted(labels, IGNORE_INDEX) if form.shifts_labels else labels
    leaf = hidden.requires_grad_()
    compute = TokenLoss(target, form, label_smoothing=_SMOOTHING)

    def frozen(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: heads.Lora | None
    ) -> heads.HeadLoss:
        return compute(hidden, weight.detach(), bias if bias is None else bias.detach(), lora)

    with _evaluating(base), torch.enable_grad(), _errors_of(base), _without_autocast(base):
        with heads.given(head, leaf):
            logits = _own_forward(base, {"input_ids": batch["input_ids"]})["logits"][0].double()
        loss = cross_entropy(logits, target[0].to(logits.device), label_smoothing=_SMOOTHING)
        (theirs,) = torch.autograd.grad(loss, leaf)
        (ours,) = torch.autograd.grad(heads.call(head, leaf, frozen).loss, leaf)
    # probabilities change by a factor of at most exp(2 d) if logits change by d; the rest is GEMM rounding
    relative = torch.expm1(torch.tensor(bound)).item() + 16 * torch.finfo(hidden.dtype).eps
    error = (ours - theirs).double().norm().item()
    if not error <= relative * theirs.double().norm().item():
        raise _refusal(base, f"has another gradient: the fused one differs by {error:.3g}")


def router_loss(model: Any, outputs: Mapping[str, Any]) -> Tensor | float:
    """Return the router loss of a mixture of experts, weighted as in the model; 0 if it has computed none."""
    loss = outputs.get("aux_loss")
    if not isinstance(loss, Tensor):
        return 0.0
    config = model.config.get_text_config()
    for place, name in (
        (model, "router_aux_loss_coef"),
        (model, "aux_loss_coef"),
        (config, "router_aux_loss_coef"),
    ):
        if (coefficient := getattr(place, name, None)) is not None:
            return coefficient * loss  # type: ignore[no-any-return]
    raise UserError(
        f"{type(model).__name__} computes a router loss, and fuse() finds no coefficient for it",
        remedy="set router_aux_loss_coef in the model's config, or output_router_logits=False",
    )


# ---- the model's own forward ----


def _own_forward(model: Any, batch: Mapping[str, Tensor], *, routers: bool = True) -> Any:
    """Call the `forward` of the class that the model had before `fuse`; optionally without router losses."""
    forward = plain_class(model).forward
    off = ["use_cache", *([] if routers else ["output_router_logits"])]
    options = {name: False for name in off if name in inspect.signature(forward).parameters}
    return forward(model, **batch, **options, return_dict=True)


def _batch(base: Any, device: torch.device | str) -> dict[str, Tensor]:
    """Return input_ids and labels [1, T] of ordinary tokens.

    Labels 2 and 3 are ignored, so position 2 has no loss, whether labels are shifted or not.
    """
    config = base.config.get_text_config()
    special = {
        value
        for part in (base.config, config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ordinary = [i for i in range(min(config.vocab_size, 1000)) if i not in special] or [0]
    ids = torch.tensor([[ordinary[i % len(ordinary)] for i in range(_TOKENS)]], device=device)
    labels = ids.clone()
    labels[0, 2:4] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def _device(base: Any) -> torch.device:
    """Return where the embedding computes; with accelerate's hooks its weight may be elsewhere."""
    embedding = base.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return embedding.weight.device  # type: ignore[no-any-return]


def _weights_are_absent(base: Any) -> bool:
    """Return whether weights are partitioned (ZeRO-3, FSDP) or on no device, and no hook brings them."""
    embedding = base.get_input_embeddings()
    weight: Tensor = embedding.weight
    if isinstance(weight, DTensor):  # FSDP2 gathers weights when the outermost module is called
        return not heads.is_tensor_parallel(embedding)
    if weight.ndim != 2:  # a flat part, which may be empty: ZeRO-3 or FSDP1
        return not (hasattr(weight, "ds_id") and embedding._forward_pre_hooks)
    return weight.is_meta and not hasattr(embedding, "_hf_hook")


def _without_autocast(base: Any) -> torch.autocast:
    return torch.autocast(_device(base).type, enabled=False)


@contextmanager
def _evaluating(base: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each module back into its own mode.

    transformers installs hooks in the first forward that records outputs, such as a router loss, and a model
    with these hooks cannot be pickled. So hooks that this forward has installed are removed.
    """
    modules = list(base.modules())
    training = [module for module in modules if module.training]
    unhooked = [module for module in modules if _RECORDING not in vars(module)]
    hooks = {id(hook) for module in modules for hook in module._forward_hooks.values()}
    base.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in unhooked:
            vars(module).pop(_RECORDING, None)
        for module in modules:
            for key, hook in list(module._forward_hooks.items()):
                if id(hook) not in hooks and getattr(hook, "__module__", "") == _RECORDER:
                    del module._forward_hooks[key]


class _Body(nn.Module):
    """Stands for a body whose weights are not in memory: hidden states of 0, and no other output."""

    class _Outputs(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("_") else self  # OPT calls `model.decoder`

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._Outputs(last_hidden_state=self._hidden)


def _without_body(base: Any, head: Any) -> Any:
    """Return a shallow copy whose body is a `_Body`; modules between body and head are the model's own."""
    shell = object.__new__(type(base))  # FSDP's classes cannot be copied
    vars(shell).update(vars(base))
    hidden = torch.zeros(1, _TOKENS, int(head.in_features), device=next(head.parameters()).device)
    vars(shell)["_modules"] = {**base._modules, base.base_model_prefix: _Body(hidden)}
    return shell


# ---- what it makes of the head's output ----


def _chosen_logits(vocab: int) -> Tensor:
    """Return [T, V] float64: 0, a number in the linear part of any cap, one beyond it, a random spread."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.empty(_TOKENS, vocab, dtype=torch.float64)
    chosen.uniform_(-3 * _LARGEST, 3 * _LARGEST, generator=generator)
    chosen[:3] = torch.tensor([0.0, 2.0**-10, 2.0**30], dtype=torch.float64)[:, None]
    return chosen


def _scale_and_cap(base: Any, chosen: Tensor, logits: Tensor) -> tuple[float, float | None]:
    scale, top = (logits[1, 0] / chosen[1, 0]).item(), logits[2, 0].item()
    capped = abs(top) < 0.5 * abs(scale) * chosen[2, 0].item()
    softcap = top if capped else None
    expected = softcap_of(chosen * scale, softcap)
    bound = 8 * torch.finfo(torch.float32).eps * expected.abs() + 1e-30
    if scale == 0 or not bool(((logits - expected).abs() <= bound).all()):
        raise _refusal(base, "does not compute its logits as softcap(scale * lm_head(hidden))")
    return scale, softcap


def softcap_of(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap), or the logits for None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _refusal(base: Any, problem: str, remedy: str = _REMEDY) -> UserError:
    return UserError(f"{type(base).__name__} {problem}, so its loss cannot be fused", remedy=remedy)


@contextmanager
def _errors_of(base: Any, remedy: str = _REMEDY) -> Iterator[None]:
    """Name the model if it cannot compute a few tokens of text."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refusal(
            base, f"cannot compute the loss of {_TOKENS} tokens ({type(error).__name__}: {first})", remedy
        ) from error
