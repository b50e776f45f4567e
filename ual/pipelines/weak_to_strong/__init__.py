"""Reliability-aware weak-to-strong alignment (arXiv 2406.19032), from raw questions to a table."""
