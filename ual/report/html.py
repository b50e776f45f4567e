"""What the pages share: pictures, tables, and the rendering of a template to one self-contained file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from matplotlib.figure import Figure

import ual
from ual.report import plots

Meaning = Literal["better", "worse", "same", ""]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure as a data URI; where `uri` is empty, the caption says why there is none."""

    caption: str
    alt: str = ""
    uri: str = ""

    @classmethod
    def of(cls, figure: Figure, alt: str, caption: str) -> "Picture":
        return cls(caption, alt, plots.data_uri(figure))


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its text, a smaller line below, and whether it is better or worse than the baseline."""

    text: str
    note: str = ""
    meaning: Meaning = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A table's heading; `hint` says in which direction a figure improves."""

    name: str
    hint: str = ""
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Cells by table row; the first cell names the table row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def render(template: str, **content: Any) -> str:
    """Return the page: one HTML file without scripts, which fetches nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=ual.__version__, plots=plots, **content)
