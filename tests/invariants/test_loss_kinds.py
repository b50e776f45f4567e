"""For each loss kind, the trainer's loss and gradient over micro-batches are those of the definition."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from ual.config.run import LossConfig
from ual.data import Collator
from ual.errors import UserError
from ual.models import fuse
from ual.train import UALTrainer
from ual.train.objective import objective

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def samples(weight: float = 1.0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(4):
        ids = torch.randint(3, 264, (9 + i,), generator=generator).tolist()
        made.append({"id": f"sample {i}", "input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return [sample | {"label_smoothing": 0.0, "sample_weight": weight} for sample in made]


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


WEIGHT_FNS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "sft": ({}, lambda log_p, log_py: torch.ones_like(log_py)),
    "dft": ({}, lambda log_p, log_py: log_py.exp()),
    "power": ({"k": 0.5}, lambda log_p, log_py: log_py.exp().sqrt()),
    "reverse": ({"A": 3.0, "cross_entropy": 0.1}, lambda log_p, log_py: 0.1 + 3.0 * log_py.exp()),
    "eaft": ({"alpha": 0.5, "top_k": 10}, lambda log_p, log_py: (entropy(log_p) / math.log(10)).sqrt()),
    "mile": ({"gamma": 2.0, "sigma": 0.5}, lambda log_p, log_py: (0.5 + entropy(log_p)) ** 2),
}


@pytest.mark.kills("ual/train/objective.py", "return loss / mean.nan_to_num(nan=1.0)", "return loss")
@pytest.mark.kills("ual/train/objective.py", "(**config.options)", "()")
@pytest.mark.parametrize("kind", WEIGHT_FNS)
def test_the_loss_is_its_definition(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Two micro-batches of two samples; MiLe takes the mean of each; the weights have no gradient."""
    options, weight_fn = WEIGHT_FNS[kind]
    model = AutoModelForCausalLM.from_pretrained(tiny)
    batches, total = [samples()[:2], samples()[2:]], sum(len(sample["labels"]) - 2 for sample in samples())
    expected = torch.zeros(())
    for batch in batches:
        scored = []
        for sample in batch:
            ids = torch.tensor([sample["input_ids"]])
            log_p = model(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
            log_py = log_p.gather(-1, ids[0, 2:, None]).squeeze(-1)
            scored.append((weight_fn(log_p, log_py).detach(), log_py))
        mean = torch.cat([w for w, _ in scored]).mean() if kind == "mile" else 1.0
        expected = expected - sum((w * log_py).sum() for w, log_py in scored) / mean / total
    expected.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()

    class InOrder(UALTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, label_names=["labels"], optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = InOrder(
        model=fuse(model), args=args, train_dataset=samples(), data_collator=Collator(0),
        objective=objective(LossConfig(kind=kind, **options)),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    step = before - model.model.layers[0].mlp.up_proj.weight.detach()
    assert (step - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_sample_weights_are_refused_if_the_loss_makes_weights(tiny: Path, tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, label_names=["labels"], save_strategy="no",
    )  # fmt: skip
    trainer = UALTrainer(
        model=fuse(AutoModelForCausalLM.from_pretrained(tiny)), args=args, data_collator=Collator(0),
        train_dataset=samples(weight=0.5), objective=objective(LossConfig(kind="dft")),
    )  # fmt: skip
    with pytest.raises(UserError, match="has a weight"):
        trainer.train()
