"""Rows to batches: load and validate, hold out, render through a chat template, collate.

`import ual.data` needs no torch; `Collator`, which does, is imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

from ual.data.load import load, stream
from ual.data.render import Renderer, Tokenised
from ual.data.split import hold_out

if TYPE_CHECKING:
    from ual.data.collate import Collator

__all__ = ["Collator", "Renderer", "Tokenised", "hold_out", "load", "stream"]


def __getattr__(name: str) -> Any:
    if name == "Collator":
        from ual.data.collate import Collator

        return Collator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
