"""Give a causal language model the fused loss: `fuse(model)`, and it never computes logits while training.

`fuse` changes the class of the model and of its lm_head (`ual.models.attach`), so the model copies, pickles,
compiles, wraps and takes hooks like any other. A labeled call runs the model's own `forward` and has the
lm_head compute `ual_kernels.linear_cross_entropy` in place of logits (`ual.models.head`).
"""

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ual.errors import UserError
from ual.models import head as heads
from ual.models import probe
from ual.models.attach import Attached, attach, detach, foreign_forward
from ual.models.loss import LossForm, TokenLoss, column, options, shifted
from ual_kernels import IGNORE_INDEX, Backend, TokenStatistics

Model = TypeVar("Model", bound=nn.Module)

_COLUMNS = ("label_smoothing", "sample_weight")
_OPTIONS = ("option_ids", "option_probabilities")
_ADDED = (
    *_COLUMNS,
    "smoothing_over",
    *_OPTIONS,
    "own_share",
    "balance_own",
    "num_items_in_batch",
    "max_loss_tokens",
    "return_statistics",
)
_MISNOMERS = {  # whole names: vision models take interp_weights
    "label_smoothing": r".*smooth.*",
    "sample_weight": r"(per_)?((loss|class|label|sample|token)s?_)*weight(s|ing)?",
    "num_items_in_batch": "num_items",
    "option_ids": r"options?(_(tokens?|indices))?",
    "option_probabilities": r"((options?|labels?|targets?|soft|teacher)_)+"
    r"(prob\w*|distributions?|labels?|targets?)|probabilities|probs",
}


@dataclass
class FusedOutput(CausalLMOutputWithPast):
    """What a fused model returns when it is given labels: the model's own outputs, a loss and statistics.

    `logits` is None while training. `statistics` fields are [B, T], aligned with `labels` shifted left:
    position t speaks of token t + 1, and holds NaN where that token is ignored.
    """

    statistics: TokenStatistics | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Any = None


@dataclass(frozen=True)
class _Settings:
    """What `fuse` was asked for, and how the model computes logits and loss."""

    z_loss: float
    backend: Backend
    require: tuple[str, ...]
    eval_logits: bool
    form: LossForm


def fuse(
    model: Model,
    *,
    z_loss: float = 0.0,
    backend: Backend = "auto",
    require: str | Iterable[str] = (),
    eval_logits: bool = True,
    verify: bool = True,
) -> Model:
    """Give a causal LM of transformers the fused loss, in place; `unfuse` takes it back.

    Afterwards ``model(input_ids=..., labels=..., label_smoothing=..., sample_weight=...)`` returns a
    `FusedOutput` whose `loss` is the mean over non-ignored tokens (or divided by `num_items_in_batch`, as
    transformers' Trainer passes it), plus the router loss of a mixture of experts if the model adds one.
    Without `labels` the model is as before, so generation works. Any trainer that calls the model with
    labels gains the loss.

    A labeled call also takes

    - label_smoothing, sample_weight: a number, or a tensor, array or list, [B] or [B, T]. The value at [b, t]
      belongs to ``labels[b, t]`` and is shifted with it (to ``shift_labels[b, t]`` if those are given).
      Integers are numbers; None is 0 (smoothing) or 1 (weight).
    - smoothing_over: "all" classes, "others": all but the target (`ual_kernels.losses.others`), or "options":
      those that `option_ids` names. Tokens without options are then not smoothed.
    - option_ids: integers [B, T, K]. Those at [b, t] are classes that could stand in place of
      ``labels[b, t]``, with -100 after them; shifted with the labels.
    - option_probabilities: [B, T, K], the target's probabilities of `option_ids`, which add up to 1 where a
      token has options. Without them, the target is the label, which must be among its options.
    - own_share: a number in [0, 1], or a tensor without dimensions. Where a token has options, this share of
      its target is the model's own most probable option (`ual_kernels.confidence`). Smoothing is added to the
      result. A tensor outside [0, 1] makes the loss NaN.
    - balance_own: whether own predictions have each option as often as the target does. Option k must have
      one meaning in all tokens, and a call should have many tokens with options.
    - shift_labels: labels that are shifted already, as sequence parallelism needs.
    - ignore_index: the label of ignored tokens, -100 by default.
    - num_items_in_batch: the divisor, in place of the sum of weights.
    - max_loss_tokens: upper bound on the number of labels that are not ignored. Avoids a device
      synchronization.
    - return_statistics: add `TokenStatistics`; logits are not returned then.

    Args:
        model: a `PreTrainedModel` with an lm_head, or a `PeftModel` around one (wrap before or after).
        z_loss, backend: as in `ual_kernels.linear_cross_entropy`.
        require: some of "label_smoothing", "sample_weight", "option_ids" and "option_probabilities". A
            training call without them raises, so that a collator that drops columns is noticed.
        eval_logits: in eval mode without gradients, a labeled call also returns logits, [B, T, V], as the
            metrics of transformers' Trainer need. False saves their memory.
        verify: compare loss and gradients of a few tokens with the model's own logits and loss. Turn it off
            only for weights that are not there yet, and call `check_logits` later.

    Returns:
        The same object.

    Raises:
        UserError: the model has no lm_head, is an encoder-decoder, computes its logits or its loss in a way
            that this cannot follow, or has an lm_head, an adapter or a hook that the fused loss does not
            support.
    """
    if backend not in get_args(Backend):
        raise UserError(f"fuse: backend must be one of {get_args(Backend)}, got {backend!r}")
    if not (isinstance(z_loss, int | float) and 0 <= z_loss < math.inf):
        raise UserError(f"fuse: z_loss must be a finite number >= 0, got {z_loss!r}")
    require = (require,) if isinstance(require, str) else tuple(require)
    if unknown := [name for name in require if name not in (*_COLUMNS, *_OPTIONS)]:
        raise UserError(f"fuse: require must name columns among {(*_COLUMNS, *_OPTIONS)}, got {unknown}")
    base = _causal_lm(model)
    _check_kind(model, base)
    head = base.get_output_embeddings()
    heads.check(head)
    try:
        heads.prepare(head)
        form = probe.loss_form(base, head)
        settings = _Settings(z_loss, backend, require, eval_logits, form)
        attach(base, _FusedCausalLM, _settings=settings)
        if verify:
            probe.check(base, head, form)
    except BaseException:
        unfuse(model)
        raise
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`.

    Raises:
        UserError: a wrapper that was set as the model's `forward` would still call the fused one.
    """
    base = _causal_lm(model, "unfuse")
    if isinstance(base, _FusedCausalLM) and (own := foreign_forward(base)) is not None:
        raise UserError(
            f"the forward of this fused {type(base).__name__} was wrapped, by {_origin(own)}",
            remedy="remove the wrapper first: accelerator.unwrap_model(model, keep_fp32_wrapper=False)",
        )
    if (head := base.get_output_embeddings()) is not None:
        heads.release(head)
    if isinstance(base, _FusedCausalLM):
        detach(base)
    return model


def check_head(model: nn.Module) -> None:
    """Refuse a model whose head could not be fused in training; weights need not be there.

    Raises:
        UserError: see `ual.models.head.check`.
    """
    heads.check(_causal_lm(model, "check_head").get_output_embeddings())


def check_logits(model: nn.Module) -> None:
    """Compare the fused loss of a few tokens with the model's own logits and loss.

    Args:
        model: fused; partitioned weights need an engine that gathers them.

    Raises:
        UserError: the model is not fused, or they differ by more than rounding: the loss of this architecture
            cannot be fused.
    """
    base = _causal_lm(model, "check_logits")
    if (settings := getattr(base, "_settings", None)) is None:
        raise UserError(
            f"check_logits() takes a fused model, got {type(base).__name__}", remedy="fuse(model)"
        )
    probe.check(base, base.get_output_embeddings(), settings.form)


@contextmanager
def at_temperature(model: nn.Module, temperature: float) -> Iterator[None]:
    """Within it, the fused loss divides logits by the temperature, after their softcap. Logits are unchanged.

    Args:
        model: fused.
        temperature: > 0.
    """
    base = _causal_lm(model, "at_temperature")
    settings: _Settings = base._settings
    form = settings.form
    cap = None if form.softcap is None else form.softcap / temperature
    scaled = replace(form, scale=form.scale / temperature, softcap=cap)
    base._settings = replace(settings, form=scaled)
    try:
        yield
    finally:
        base._settings = settings


def _causal_lm(model: nn.Module, caller: str = "fuse") -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(
            f"{caller}() takes a transformers model or a PeftModel, got {type(base).__name__}",
            remedy="call fuse(model) before the model is wrapped, or on the model inside (wrapped.module, "
            "compiled._orig_mod, PEFT's mixed.base_model.model)",
        )
    return base


def _check_kind(model: nn.Module, base: Any) -> None:
    name = type(base).__name__
    if isinstance(model, PeftModel) and any(c.peft_type == "CPT" for c in model.peft_config.values()):
        raise UserError(
            "fuse() does not support CPT, which computes its own loss from logits",
            remedy="use another adapter",
        )
    if isinstance(base, _FusedCausalLM):
        raise UserError(
            "fuse() was called on a model that is fused already", remedy="call unfuse(model) first"
        )
    if base.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder, and fuse() supports causal language models only")
    if base.get_output_embeddings() is None:
        raise UserError(f"{name} has no lm_head, so there is no loss to fuse")
    if (own := foreign_forward(base)) is not None:
        raise UserError(
            f"the forward of this {name} was replaced, by {_origin(own)}, so its loss cannot be fused",
            remedy="call fuse(model) first, before accelerator.prepare or other wrappers",
        )


# ---- the class of a fused model ----


class _ColumnName(str):
    """A parameter's name that does not count as a label.

    transformers' Trainer takes each parameter with "label" in its name for labels. It would compute no
    evaluation loss without `label_smoothing`, and give it to `compute_metrics` among the labels.
    """

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return False  # for `"label" in name`


class _FusedCausalLM(Attached):
    """In front of the class of a causal LM."""

    _settings: _Settings
    _parameters_by_position: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_plain" in vars(cls):
            signature = inspect.signature(cls._plain.forward)  # type: ignore[attr-defined]
            cls._parameters_by_position = tuple(signature.parameters)[1:]
            cls.forward = _forward(signature)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            _check_replacement(self, value)
        super().__setattr__(name, value)

    def _fused_forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        label_smoothing: Any = None,
        sample_weight: Any = None,
        smoothing_over: str = "all",
        option_ids: Any = None,
        option_probabilities: Any = None,
        own_share: float | Tensor | None = None,
        balance_own: bool = False,
        ignore_index: int = IGNORE_INDEX,
        num_items_in_batch: int | Tensor | None = None,
        max_loss_tokens: int | None = None,
        return_statistics: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        model: Any = self
        args, labels = _take_labels(self._parameters_by_position, args, labels)
        _check_names(kwargs, self._parameters_by_position)
        columns = {"label_smoothing": label_smoothing, "sample_weight": sample_weight}
        named = columns | dict(zip(_OPTIONS, (option_ids, option_probabilities), strict=True))
        named["own_share"] = own_share
        asked = [name for name, value in named.items() if value is not None]
        given = labels if shift_labels is None else shift_labels
        if given is None:
            _check_unlabeled(self, [*asked, *["return_statistics"] * bool(return_statistics)])
            if return_dict is not None:
                kwargs["return_dict"] = return_dict
            return _without_loss(super().forward(*args, **kwargs))
        _check_labeled(self, asked, given, ignore_index)
        _check_over(smoothing_over, label_smoothing, option_ids)
        _check_own(own_share, balance_own, option_ids)

        settings = self._settings
        logits = not (return_statistics or self.training or torch.is_grad_enabled())
        hidden, outputs = self._hidden_and_outputs(args, kwargs, logits=settings.eval_logits and logits)
        if given.shape != hidden.shape[:-1]:
            name = "labels" if shift_labels is None else "shift_labels"
            raise ValueError(f"{name} must have shape {list(hidden.shape[:-1])}, got {list(given.shape)}")
        shift = shift_labels is None and settings.form.shifts_labels
        ids, probabilities = options(option_ids, option_probabilities, given, shift=shift)
        loss = TokenLoss(
            targets=shifted(given, ignore_index) if shift else given,
            form=settings.form,
            **{name: column(name, value, given, shift=shift) for name, value in columns.items()},
            smoothing_over=smoothing_over,
            option_ids=ids,
            option_probabilities=probabilities,
            own_share=own_share,
            balance_own=balance_own,
            ignore_index=ignore_index,
            num_items=num_items_in_batch,
            max_loss_tokens=max_loss_tokens,
            z_loss=settings.z_loss,
            backend=settings.backend,
            statistics=bool(return_statistics),
        )
        value, statistics = heads.call(model.get_output_embeddings(), hidden, loss)
        fused = FusedOutput(loss=value + probe.router_loss(model, outputs), statistics=statistics)
        for name, entry in outputs.items():
            fused[name] = entry
        return fused.to_tuple() if return_dict is False else fused

    def _hidden_and_outputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, logits: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the model's own `forward`, without labels.

        Returns:
            hidden: [B, T, D] the input of the lm_head.
            outputs: what `forward` returns; `logits` [B, T, V] only if they are asked for.
        """
        if kwargs.get("position_ids") is not None and "use_cache" in self._parameters_by_position:
            # a cache, which transformers makes unasked, would hide from it that a sequence is packed
            kwargs.setdefault("use_cache", False)
        model: Any = self
        head = model.get_output_embeddings()
        heads.prepare(head)
        with heads.capturing(head, None if logits else heads.placeholder) as captured:
            outputs = _without_loss(super().forward(*args, **kwargs, return_dict=True))
        return captured.hidden, {k: v for k, v in outputs.items() if logits or k != "logits"}


def _forward(plain: inspect.Signature) -> Any:
    """Return a `forward` whose signature has the model's parameters and ours.

    Trainers drop data columns that `forward` does not name.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._fused_forward(*args, **kwargs)

    parameters = list(plain.parameters.values())
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    present = {p.name for p in named}
    added = [
        inspect.Parameter(_ColumnName(name), inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _ADDED
        if name not in present
    ]
    forward.__signature__ = plain.replace(parameters=[*named, *added, *rest])  # type: ignore[attr-defined]
    return forward


# ---- what a call must not ask for ----


def _take_labels(
    names: tuple[str, ...], args: tuple[Any, ...], labels: Tensor | None
) -> tuple[tuple[Any, ...], Tensor | None]:
    """Take the labels out of positional arguments."""
    if "labels" not in names[: len(args)]:
        return args, labels
    place = names.index("labels")
    if labels is not None:
        raise TypeError("forward() got multiple values for argument 'labels'")
    return (*args[:place], None, *args[place + 1 :]), args[place]


def _check_names(kwargs: Mapping[str, Any], parameters: tuple[str, ...]) -> None:
    """Refuse names that are near ours: transformers' `**kwargs` would take them without a word."""
    for name in kwargs:
        if name not in parameters and (meant := _meant(name)) is not None:
            raise TypeError(f"a fused model has no argument {name!r}; did you mean {meant!r}?")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _meant(name: str) -> str | None:
    """Return which of our arguments a name is near to, or None."""
    named = [ours for ours, pattern in _MISNOMERS.items() if re.fullmatch(pattern, name)]
    return next(iter([*named, *difflib.get_close_matches(name, _ADDED, n=1, cutoff=0.82)]), None)


def _check_unlabeled(model: Any, asked: list[str]) -> None:
    """Refuse a call that asks for a loss of ours, or must have one, but has no labels."""
    required = model._settings.require
    if asked:
        problem = f"the call has {' and '.join(asked)} but no labels, so they would be ignored"
    elif required and _is_training(model):
        problem = f"a training call without labels, though fuse(require={required}) asks for a loss"
    else:
        return
    raise UserError(
        problem,
        remedy="pass labels to the model; transformers' Trainer takes them away if it is given "
        "label_smoothing_factor or compute_loss_func, and TRL's SFTTrainer needs "
        "ual.integrations.trl.UALSFTTrainer",
    )


def _without_loss(outputs: Any) -> Any:
    """Return the outputs of the model's own `forward`, which received no labels; refuse a loss in them."""
    if getattr(outputs, "loss", None) is not None:
        raise UserError(
            "the model's own forward has returned a loss, from something else than the argument labels=",
            remedy="pass labels by name; a forward that adds a loss of its own cannot be fused",
        )
    return outputs


def _check_over(smoothing_over: str, smoothing: Any, option_ids: Any) -> None:
    if smoothing_over not in ("all", "others", "options"):
        raise ValueError(f'smoothing_over must be "all", "others" or "options", got {smoothing_over!r}')
    if smoothing_over == "options" and option_ids is None:
        raise ValueError('smoothing_over="options" needs option_ids, the classes of each token\'s options')
    if smoothing_over == "options" and callable(smoothing):
        raise ValueError('smoothing_over="options" takes label_smoothing as numbers, not as a function')
    if smoothing_over == "options" and isinstance(smoothing, int | float) and not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {smoothing}")
    if smoothing_over == "others" and option_ids is not None:
        raise ValueError('smoothing_over="others" needs one target per token, so option_ids must be None')


def _check_own(own_share: Any, balance_own: bool, option_ids: Any) -> None:
    if own_share is None:
        if balance_own:
            raise ValueError("balance_own needs own_share, the share of own predictions in the target")
        return
    if option_ids is None:
        raise ValueError("own_share needs option_ids, the classes among which the model predicts")
    if isinstance(own_share, Tensor):
        if own_share.ndim:
            raise ValueError(f"own_share must have no dimensions, got a tensor {list(own_share.shape)}")
    elif not (isinstance(own_share, int | float) and 0 <= own_share <= 1):
        raise ValueError(f"own_share must be a number in [0, 1], or a tensor, got {own_share!r}")


def _check_labeled(model: Any, asked: list[str], labels: Tensor, ignore_index: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor [B, T], got {type(labels).__name__}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    missing = [name for name in model._settings.require if name not in asked]
    if missing and _is_training(model):
        raise UserError(
            f"the batch has no {' and no '.join(missing)}, which fuse(require=...) asks for",
            remedy="see that the data collator and Trainer(remove_unused_columns=...) keep the columns",
        )
    if not model.config.return_dict:
        raise UserError(
            "config.return_dict=False makes the model's body return tuples that its own forward cannot read",
            remedy="set it to True, and pass return_dict=False in the call",
        )
    if "_loss_function" in vars(model):
        raise UserError(
            f"model.loss_function was set to {model.loss_function!r}, and the fused loss would ignore it",
            remedy="call unfuse(model), or delete model._loss_function",
        )


def _is_training(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _check_replacement(model: nn.Module, value: Any) -> None:
    """Refuse a new `forward` that does not call the fused one: smoothing and weights would be ignored."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None and "fused_lm_head" in code.co_varnames:  # its signature is a copy of ours
        raise UserError(
            "TRL's trainer puts a fused lm_head of its own in place of the fused loss, which would ignore "
            "smoothing and weights",
            remedy="use ual.integrations.trl.UALSFTTrainer, or call unfuse(model) first",
        )
    inner = value
    while inner is not None:
        if getattr(inner, "__func__", inner) is type(model).forward:
            return
        inner = getattr(inner, "__wrapped__", None) or getattr(inner, "func", None)
    raise UserError(
        f"the forward of a fused {type(model).__name__} was to be replaced, by {_origin(value)}, which would "
        "ignore smoothing and weights",
        remedy="call unfuse(model) first, or wrap model.forward with functools.wraps",
    )


def _origin(function: Any) -> str:
    function = getattr(function, "__func__", getattr(function, "func", function))
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"
