"""From files to batches: load and validate, hold out, render with a chat template, pack, collate.

`import ual.data` does not import torch. `Collator`, `PackedCollator` and `Stream` do, at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ual.data.groups import Groups
from ual.data.load import expand, load, stream
from ual.data.pack import pack
from ual.data.render import Renderer, TokenizedSample
from ual.data.split import hold_out
from ual.data.tokenize import tokenize

if TYPE_CHECKING:
    from ual.data.collate import Collator, PackedCollator
    from ual.data.streaming import Stream

__all__ = [
    "Collator",
    "Groups",
    "PackedCollator",
    "Renderer",
    "Stream",
    "TokenizedSample",
    "expand",
    "hold_out",
    "load",
    "pack",
    "stream",
    "tokenize",
]

_NEED_TORCH = {"Collator": "collate", "PackedCollator": "collate", "Stream": "streaming"}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(f"ual.data.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
