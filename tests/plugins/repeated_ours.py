"""Computes our losses five times, with targets of several classes ten times, so that they are slow."""

from dataclasses import replace

import torch

from benchmarks import providers
from benchmarks.problems import Case
from benchmarks.providers import Loss, Provider


def repeated(provider: Provider) -> Loss:
    loss = provider.build()

    def several_times(case: Case) -> torch.Tensor:
        return torch.stack([loss(case) for _ in range(5 if case.soft is None else 10)]).mean(0)

    return several_times


providers.PROVIDERS = tuple(
    replace(p, build=lambda p=p: repeated(p)) if p.name.startswith("ours") else p for p in providers.PROVIDERS
)
