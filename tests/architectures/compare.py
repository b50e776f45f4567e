"""One comparison: a model's own loss and gradients, and those of the same model after `fuse`."""

import functools
import inspect
import re
from collections.abc import Callable
from contextlib import suppress

import torch
import transformers
from torch import Tensor, nn

from tests.architectures import cases
from tests.architectures.page import CRASHES, NOT_BUILT, REFUSED, WORKS, WRONG
from ual.errors import UserError
from ual.models import fuse, unfuse

SMOOTHING, WEIGHT = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 2.0])

Computed = tuple[Tensor, dict[str, Tensor]]


def check(name: str, class_name: str) -> tuple[str, str]:
    """Build a tiny model of this name and compare: the outcome and its reason."""
    if "labels" not in inspect.signature(getattr(transformers, class_name).forward).parameters:
        return NOT_BUILT, "its forward takes no labels"
    try:
        model = cases.build(name, class_name)
        inputs = cases.inputs_of(name)
        own = loss_and_gradients(model, lambda: model(**inputs).loss)
    except Exception as error:  # any: the code is another library's
        return NOT_BUILT, described(error)
    return compare(model, inputs, own)


def compare(model: nn.Module, inputs: dict[str, Tensor], own: Computed) -> tuple[str, str]:
    """The outcome and its reason."""
    expected = [("own loss", {}, own)]
    shift = shifts(model(**inputs).logits, inputs["labels"], own[0])
    if shift is not None:
        options = {"label_smoothing": SMOOTHING, "sample_weight": WEIGHT}
        expected.append(("smoothing and weights", options, reference(model, inputs, shift)))
    if "output_router_logits" in inspect.signature(model.forward).parameters:
        options = {"output_router_logits": True}
        with suppress(IndexError):  # in the own forward of DeepSeek-V4 and Flint
            own = loss_and_gradients(model, lambda: model(**inputs, **options).loss)
            expected.append(("router loss", options, own))
    try:
        fuse(model)
        for what, options, known in expected:
            actual = loss_and_gradients(model, functools.partial(loss_of, model, inputs | options))
            if wrong := difference(actual, known):
                return WRONG, f"{what}: {wrong}"
        unlabeled = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**unlabeled).logits
        if not torch.equal(logits, unfuse(model)(**unlabeled).logits):
            return WRONG, "its logits differ in a call without labels"
    except UserError as error:
        return REFUSED, str(error).splitlines()[0]
    except Exception as error:
        return CRASHES, described(error)
    finally:
        unfuse(model)
    return WORKS, ""


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


def loss_and_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Computed:
    model.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shifts(logits: Tensor, labels: Tensor, own: Tensor) -> bool | None:
    """Whether the model's own loss predicts the next label; None if it is no mean over labels."""
    if logits.shape[:-1] != labels.shape:
        return None
    for shift in (True, False):
        loss = smoothed_loss(logits, labels, shift, torch.zeros(2), torch.ones(2))
        if torch.isclose(loss.float(), own, rtol=1e-5, atol=1e-6):
            return shift
    return None


def smoothed_loss(logits: Tensor, labels: Tensor, shift: bool, smoothing: Tensor, weight: Tensor) -> Tensor:
    """Smoothing over all classes and the weighted mean, in float64, from a model's own logits."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_p = logits.double().log_softmax(-1)
    s = smoothing[:, None].double()
    token = -(1 - s) * log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) - s * log_p.mean(-1)
    scale = weight[:, None].double() * (labels != -100)
    return (token * scale).sum() / scale.sum()


def reference(model: nn.Module, inputs: dict[str, Tensor], shift: bool) -> Computed:
    """Loss and gradients with smoothing and weights, from the model's own logits."""
    return loss_and_gradients(
        model, lambda: smoothed_loss(model(**inputs).logits, inputs["labels"], shift, SMOOTHING, WEIGHT)
    )


def difference(actual: Computed, expected: Computed) -> str:
    """Where two computations in float32 differ by more than rounding, or an empty string.

    The bound of a gradient is that of `assert_same` in tests/ual/test_fused_loss.py, and some roundings of
    the model's largest gradient: the terms of a key's bias cancel, so that its gradient is only rounding.
    """
    (loss, gradients), (own_loss, own_gradients) = actual, expected
    if not torch.isclose(loss.float(), own_loss.float(), rtol=1e-5, atol=1e-6):
        return f"the loss is {loss.item():.6f}, expected {own_loss.item():.6f}"
    if gradients.keys() != own_gradients.keys():
        return f"one has no gradient: {sorted(gradients.keys() ^ own_gradients.keys())[0]}"
    largest = max(g.abs().max() for g in own_gradients.values())
    for name, gradient in own_gradients.items():
        bound = 2e-5 * gradient.abs().max() + 4 * torch.finfo(torch.float32).eps * largest
        if not (gradients[name] - gradient).abs().max() <= bound:
            return f"the gradient of {name} differs"
    return ""


def described(error: BaseException) -> str:
    """The first sentence of another library's error."""
    first = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {first}"[:150]
