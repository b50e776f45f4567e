"""The modules call the functions, with some of the arguments from the constructor."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ual_kernels
from ual_kernels import LinearCrossEntropyOptions, cross_entropy, linear_cross_entropy, losses
from ual_kernels.modules import CrossEntropyLoss, LinearCrossEntropyLoss

V, D = 11, 6
TARGET = [[1, -100, 10], [0, 3, 3]]
FACES = [
    pytest.param(CrossEntropyLoss, cross_entropy, id="logits"),
    pytest.param(LinearCrossEntropyLoss, linear_cross_entropy, id="linear"),
]
faces = pytest.mark.parametrize(("module", "function"), FACES)


def tensors(module: type[nn.Module], device: torch.device) -> tuple[Tensor, ...]:
    target = torch.tensor(TARGET, device=device)
    if module is CrossEntropyLoss:
        return torch.randn(2, 3, V, device=device), target
    return torch.randn(2, 3, D, device=device), torch.randn(V, D, device=device), target


# every option with a value that is not the default
CONSTANT: dict[str, Any] = {
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.2,
    "sample_weight": losses.mile()["sample_weight"],
    "softcap": 2.0,
    "logit_scale": 0.5,
    "z_loss": 0.1,
    "options": LinearCrossEntropyOptions(compact=False, chunk_tokens=2),
    "backend": "reference",
}
PER_CALL: dict[str, Any] = {
    "label_smoothing": torch.tensor([0.1, 0.3]),
    "sample_weight": torch.tensor([0.5, 2.0]),
    "num_items": 7,
    "linear_bias": torch.linspace(-1.0, 1.0, V),
    "linear_lora": (torch.ones(2, D), torch.ones(V, 2), 0.5),
    "options": LinearCrossEntropyOptions(max_loss_tokens=5),
}


def recorded(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> list[inspect.BoundArguments]:
    """Replace the module's function; return the list of its recorded calls."""
    calls: list[inspect.BoundArguments] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(inspect.signature(function).bind(*args, **kwargs))
        calls[-1].apply_defaults()
        return torch.zeros(())

    monkeypatch.setattr(f"ual_kernels.functional.{function.__name__}", record)
    return calls


def options_of(signature: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(signature).parameters.items()}


@faces
def test_every_option_is_there_with_its_default(
    module: type[nn.Module], function: Callable[..., Any]
) -> None:
    theirs, constant, per_call = options_of(function), options_of(module), options_of(module.forward)
    assert set(constant) | set(per_call) == set(theirs) | {"self"}
    for name, default in constant.items():
        assert default == theirs[name], name


@pytest.mark.kills("ual_kernels/modules.py", "return own | {", "return {")
@pytest.mark.kills("ual_kernels/modules.py", "            num_items=num_items,\n", "")
@faces
def test_every_option_arrives(
    module: type[nn.Module],
    function: Callable[..., Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = recorded(monkeypatch, function)
    arguments = tensors(module, device)
    constant = {name: CONSTANT[name] for name in options_of(module) if name in CONSTANT}
    assert set(options_of(module)) - set(constant) == {"weight"}
    module(torch.ones(V), **constant)(*arguments)
    assert constant.items() <= {k: v for k, v in calls[-1].arguments.items() if k in constant}.items()
    assert torch.equal(calls[-1].arguments["weight"], torch.ones(V))
    assert all(a is b for a, b in zip(calls[-1].args, arguments, strict=False))

    per_call = {name: PER_CALL[name] for name in options_of(module.forward) if name in PER_CALL}
    module(**constant)(*arguments, **per_call)
    for name, value in per_call.items():
        assert calls[-1].arguments[name] is value, name
    for name in constant.keys() - per_call.keys():
        assert calls[-1].arguments[name] == constant[name], name


@faces
def test_the_module_is_the_function(
    module: type[nn.Module], function: Callable[..., Any], device: torch.device
) -> None:
    arguments = tensors(module, device)
    smoothing, weight = torch.rand(2, device=device), torch.rand(V, device=device)
    loss = module(weight, softcap=3.0, **losses.eaft())
    keywords = {"weight": weight, "softcap": 3.0, **losses.eaft()}
    given = {**losses.ual(smoothing), "num_items": 4}
    assert torch.equal(loss(*arguments, **given), function(*arguments, **keywords, **given))
    with_statistics = getattr(ual_kernels, f"{function.__name__}_with_statistics")
    ours, theirs = loss.with_statistics(*arguments, **given), with_statistics(*arguments, **keywords, **given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    # the arguments of a call do not change later calls
    assert torch.equal(loss(*arguments), function(*arguments, **keywords))


def test_a_drop_in_for_pytorchs(device: torch.device) -> None:
    logits, target = tensors(CrossEntropyLoss, device)
    weight = torch.rand(V, device=device)
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": 3,
        "reduction": "sum",
        "label_smoothing": 0.1,
    }
    ours, theirs = CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    target = target.clamp(min=0)
    torch.testing.assert_close(ours(logits, target), theirs(logits.flatten(0, 1), target.flatten()))
    for name in ("ignore_index", "reduction", "label_smoothing"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.reduction = theirs.reduction = "mean"
    torch.testing.assert_close(ours(logits, target), theirs(logits.flatten(0, 1), target.flatten()))


@pytest.mark.kills("ual_kernels/modules.py", 'self.register_buffer("weight", weight)', "self.weight = weight")
@faces
def test_only_the_class_weights_are_state(module: type[nn.Module], function: Callable[..., Any]) -> None:
    assert not module(**losses.gem()).state_dict()
    given = module(torch.ones(V), **losses.gem())
    assert list(given.state_dict()) == ["weight"]
    assert not list(given.parameters())
    assert given.double().weight.dtype == torch.float64


@faces
def test_the_repr_shows_what_was_chosen(module: type[nn.Module], function: Callable[..., Any]) -> None:
    name = module.__name__
    assert repr(module()) == f"{name}()"
    assert (
        repr(module(torch.ones(V), reduction="sum", softcap=30.0))
        == f"{name}(weight=[{V}], reduction='sum', softcap=30.0)"
    )
    assert repr(module(**losses.dft())) == f"{name}(sample_weight=target_probability)"
    assert "sample_weight=Constant(value=0.5)" in repr(module(**losses.gem(0.5)))


@faces
def test_modules_can_be_copied_and_pickled(module: type[nn.Module], function: Callable[..., Any]) -> None:
    loss = module(torch.ones(V), **losses.mile())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(twin.weight, loss.weight)


@faces
def test_an_unknown_option_is_refused(module: type[nn.Module], function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'size_average'"):
        module(size_average=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcap'"):
        module()(*tensors(module, torch.device("cpu")), softcap=3.0)


@faces
def test_the_function_checks_the_options(
    module: type[nn.Module], function: Callable[..., Any], device: torch.device
) -> None:
    with pytest.raises(ValueError, match="reduction must be one of"):
        module(reduction="avg")(*tensors(module, device))
