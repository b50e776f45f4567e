"""Replaces our losses by the naive loss, so that they are as slow."""

from dataclasses import replace

from benchmarks import providers

providers.PROVIDERS = tuple(
    replace(p, build=lambda: providers.naive, adapters=False) if p.name.startswith("ours") else p
    for p in providers.PROVIDERS
)
