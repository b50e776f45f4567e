"""Fifty steps of a small model from scratch: every backend has the reference's loss curve."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import GPU
from ual.models import fuse

if not GPU:
    from tests.kernels.interpreter import repair

    repair()

STEPS = 50
VOCAB = 257


def batches(device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return learnable texts (each token is a function of the last) with half of the labels masked."""
    generator = torch.Generator().manual_seed(1)
    step = torch.randperm(VOCAB, generator=generator)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(VOCAB, (4, 1), generator=generator)
        while ids.shape[1] < 16:
            ids = torch.cat([ids, step[ids[:, -1:]]], dim=1)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
        smoothing, weight = torch.rand(4, generator=generator) * 0.3, torch.rand(4, generator=generator) + 0.5
        made.append(tuple(t.to(device) for t in (ids, labels, smoothing, weight)))
    return made  # type: ignore[return-value]


def curve(backend: str, device: torch.device, *, head: str, nudge: float = 0.0) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=head == "tied",
    )  # fmt: skip
    model = fuse(LlamaForCausalLM(config).to(device), backend=backend)
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in learned:
            p.mul_(1 + nudge)
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    losses = []
    for ids, labels, smoothing, weight in batches(device):
        loss = model(input_ids=ids, labels=labels, label_smoothing=smoothing, sample_weight=weight).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("head", "backends"), [("frozen", ["torch"]), ("tied", ["torch"]), ("own", ["torch", "triton"])]
)
@pytest.mark.slow
def test_every_backend_has_the_references_curve(head: str, backends: list[str], device: torch.device) -> None:
    """Every step is within four times the effect of one ulp on the initial weights on the reference's curve.

    Correct float32 computations of one gradient differ by roundings, which training amplifies. The twin run
    measures by how much, up to each step. Before any amplification the losses differ by their own rounding.
    """
    exact = curve("reference", device, head=head)
    twin = curve("reference", device, head=head, nudge=2**-23)
    assert exact[-1] < exact[0] - 0.25  # it learns
    drift, bounds = 0.0, []
    for a, b in zip(exact, twin, strict=True):
        drift = max(drift, abs(a - b))
        bounds.append(4 * max(drift, 2**-22 * abs(a)))
    for backend in backends:
        ours = curve(backend, device, head=head)
        far = [
            (step, a, b) for step, (a, b, bound) in enumerate(zip(ours, exact, bounds, strict=True))
            if not abs(a - b) <= bound
        ]  # fmt: skip
        assert not far, (backend, far[:3])
