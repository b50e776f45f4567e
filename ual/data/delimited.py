"""CSV and TSV files: one sample for each record, and errors that name its first line."""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ual.data.columns import Cells
from ual.data.schema import FieldError
from ual.errors import UserError
from ual.files import every_line

DELIMITERS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""Endings of names, and the character between two cells."""


def read(path: Path) -> Iterator[tuple[str, Cells | FieldError]]:
    """Yield the place of every record, and its cells by the names in the first line, or what is wrong.

    Cells may be quoted, with line ends inside, as RFC 4180 defines. Empty records are skipped. Columns
    without a name, such as the index that pandas writes, are ignored.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has no valid first line, or a quote is not closed.
    """
    name = path.name.lower()
    delimiter = next(character for ending, character in DELIMITERS.items() if name.endswith(ending))
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"not a valid table: {error}",
                place=f"{path}, line {first}",
                remedy="quote cells that contain a quote or a line end, and double the quotes inside",
            ) from error
        if record is None:
            return
        if not any(map(str.strip, record)):
            continue
        where = f"line {first}"
        if header is None:
            header = _header(record, delimiter, f"{path}, {where}")
        elif len(record) != len(header):
            problem = f"expected {len(header)} cells, as in the first line, got {len(record)}"
            yield where, FieldError("", problem)
        else:
            yield where, Cells({n: cell for n, cell in zip(header, record, strict=True) if n})


def _header(record: list[str], delimiter: str, place: str) -> list[str]:
    names = [name.strip() for name in record]
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise UserError(
            f"the first line names {repeated[0]!r} twice", place=place, remedy="rename one of these columns"
        )
    others = [other for other in (";", "\t", ",", "|") if other in names[0]]
    if len(names) == 1 and others:
        raise UserError(
            f"the first line has one column, {names[0]!r}, and {others[0]!r} inside it",
            place=place,
            remedy=f"separate columns by {delimiter!r}; a file with tabs has a name that ends in .tsv",
        )
    return names


def _decoded(path: Path) -> Iterator[str]:
    for number, line in every_line(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"not UTF-8: {error.reason}",
                place=f"{path}, line {number}",
                remedy="save the file as UTF-8",
            ) from error
