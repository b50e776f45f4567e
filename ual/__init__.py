"""Uncertainty-aware fine-tuning of language models: each sample carries its own label smoothing."""

__version__ = "0.1.0"
__all__ = ["__version__"]
