"""A run, or several side by side, as one HTML page that needs nothing else."""

from ual.report.page import write

__all__ = ["write"]
