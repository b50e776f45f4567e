"""One self-contained HTML page about a run or several; the model card of an adapter."""

from ual.report.card import card
from ual.report.page import write

__all__ = ["card", "write"]
