"""Tiny random models of every architecture, from the generic sizes and exceptions of `sizes`."""

import dataclasses
import functools
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from tests.architectures import sizes

CAUSAL_LM = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
MOST_PARAMETERS = 10_000_000


def config_options(cls: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """The generic sizes of the fields that this class of config has, its sub-configs', and the overrides."""
    own = {f.name for f in dataclasses.fields(cls)}
    options = {k: v for k, v in sizes.SIZES.items() if k in own} | overrides
    for name, sub in cls.sub_configs.items():
        given = overrides.get(name, {})
        if sub.__name__ != "AutoConfig":
            options[name] = config_options(sub, given)
        elif "model_type" in given:
            options[name] = config_options(CONFIG_MAPPING[given["model_type"]], given)
        elif default := getattr(_default(cls), name, None):
            options[name] = {"model_type": default.model_type} | config_options(type(default), given)
    return options


@functools.cache
def _default(cls: Any) -> Any:
    return cls()


def config_of(name: str, cls: Any, **options: Any) -> Any:
    """The small config: of this name's own class, or of the part (text, decoder) that the model takes."""
    config_class, overrides = CONFIG_MAPPING[name], sizes.OVERRIDES.get(name, {})
    if cls.config_class is not None and not issubclass(config_class, cls.config_class):
        config_class, overrides = cls.config_class, overrides.get("text_config", {})
    return config_class(**config_options(config_class, overrides | options))


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Two samples of eight tokens, of which the first two have no label, and what `sizes.INPUTS` adds."""
    make = {
        "float": lambda shape: torch.randn(shape, generator=generator),
        "ids": lambda shape: torch.randint(3, 50, shape, generator=generator),
        "ones": torch.ones,
        "first": lambda shape: torch.arange(shape[-1]).expand(shape) < 4,
        "zeros": lambda shape: torch.zeros(shape, dtype=torch.long),
    }
    generator = torch.Generator().manual_seed(2)
    ids = make["ids"]((2, 8))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels} | {
        argument: make[kind](shape) for argument, (kind, *shape) in sizes.INPUTS.get(name, {}).items()
    }


def build(name: str, class_name: str, **options: Any) -> Any:
    """A random model in float32, in evaluation mode, whose weights are large enough that caps matter."""
    cls = getattr(transformers, class_name)
    config = config_of(name, cls, **options)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the tiny model has {count:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().train(name in sizes.TRAIN_MODE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model
