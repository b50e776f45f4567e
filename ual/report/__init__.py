"""A run, or several side by side, as one HTML page that needs nothing else; an adapter's model card."""

from ual.report.card import card
from ual.report.page import write

__all__ = ["card", "write"]
