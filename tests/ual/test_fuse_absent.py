"""`fuse` of models whose weights are not in memory: the shape of the loss is that of the complete model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.ual.test_fused_loss import FAMILIES, SMALL
from ual.errors import UserError
from ual.models import fuse

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: FAMILIES[name] for name in ("llama", "granite", "gemma2", "cohere")},
    "mixtral": {"output_router_logits": True},
    "granitemoe": {"output_router_logits": True},
    "opt": {},
    "bert": {"is_decoder": True},
}


def family(name: str) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SMALL | OPTIONS[name])))


def vision() -> Any:
    tower = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=LlamaConfig(**SMALL), image_token_id=60)
    )


def absent(model: Any) -> Any:
    """Leave the weights as ZeRO-3 does on a rank."""
    for p in model.parameters():
        p.ds_id, p.data = 0, torch.empty(0)
    return model


BUILDS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: family(name) for name in OPTIONS if name != "bert"},  # type: ignore[misc]
    "llava": vision,
}


@pytest.mark.kills("ual/models/probe.py", "routers=not absent", "routers=True", only="mixtral")
@pytest.mark.kills("ual/models/probe.py", 'if name.startswith("_") else self', "", only="opt")
@pytest.mark.parametrize("name", BUILDS)
def test_the_loss_has_the_same_shape(name: str) -> None:
    expected = fuse(BUILDS[name]())._settings.form
    assert fuse(absent(BUILDS[name]()), verify=False)._settings.form == expected


@pytest.mark.kills("ual/models/probe.py", "_GATHER if absent else _REMEDY", "_REMEDY")
def test_layers_between_body_and_head_need_their_weights() -> None:
    """BERT's are a part of its head."""
    with pytest.raises(UserError, match=r"cannot compute.*\n.*GatheredParameters"):
        fuse(absent(family("bert")), verify=False)
    with torch.device("meta"):
        model = family("bert")
    assert fuse(model, verify=False)._settings.form == fuse(family("bert"))._settings.form
