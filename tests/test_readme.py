"""What the README shows is run: its configuration, its snippets, its commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ual.config import run as configuration

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_configuration_is_valid_and_short() -> None:
    (text,) = blocks("yaml")
    run = configuration.parse(yaml.safe_load(text))
    assert (run.smoothing.max, run.lora.r, run.uncertainty.estimator) == (0.2, 16, "white_box")
    assert len(text.splitlines()) <= 10


def test_the_losses_run_as_shown(stories: Path) -> None:
    loss, preset, fused = blocks("python")
    hidden, labels = torch.randn(2, 5, 8, requires_grad=True), torch.randint(11, (2, 5))
    names: dict[str, Any] = {
        "hidden": hidden,
        "lm_head": torch.nn.Linear(8, 11),
        "labels": labels,
        "smoothing": torch.tensor([0.0, 0.2]),
        "weight": torch.ones(2, 5),
    }
    exec(loss, names)
    names["loss"].backward()
    assert hidden.grad is not None
    exec(preset, names)
    assert names["loss"].requires_grad
    names["model"] = AutoModelForCausalLM.from_pretrained(stories)
    names["ids"] = torch.randint(3, 512, (2, 5))
    exec(fused, names)
    assert names["loss"].isfinite()


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_the_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
