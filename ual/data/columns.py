"""Columns of a file to the columns of a sample, as `data.columns` says: by name, or by a template."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ual.config.run import COLUMNS, CONVERSATION
from ual.data.schema import OPTIONS, FieldError, show
from ual.errors import UserError

_NUMBERS = ("uncertainty", "label_smoothing", "sample_weight")
_LISTS = ("messages", "conversations", "history", "tools")
_MAY_BE_EMPTY = ("system", "id", "source", "input", *_NUMBERS, "history", "tools", *OPTIONS)
_INTEGER = re.compile(r"-?\d{1,18}")
_FLOAT = re.compile(r"-?\d{1,18}\.\d+(e[+-]?\d+)?")


class Cells(dict[str, str]):
    """A sample of a CSV or TSV file, whose values are all text."""


class _Flag(int):
    """A truth value that is printed as it is written."""

    def __new__(cls, written: str) -> "_Flag":
        flag = super().__new__(cls, written.lower() == "true")
        flag.written = written
        return flag

    written: str

    def __str__(self) -> str:
        return self.written


class Columns:
    """Adds the columns that `data.columns` names to the samples of one file, and reads text as its meaning.

    A value that contains ``{{`` or ``{%`` is a Jinja template over the sample's columns. Any other value is
    the name of a column. None hides the file's column of this name. Templates also know ``__file__``, the
    name of the file without folder and endings, and ``__row__``, all columns by name.

    Args:
        columns: the name of a sample's column -> a column of the file, a template, or None.
        file: the path or name of the file.

    Raises:
        UserError: a template is not valid.
    """

    def __init__(self, columns: Mapping[str, str | None], file: str) -> None:
        self._columns = columns
        self._file = re.split(r"[.:]", Path(file).name)[0] or file
        written = {column: value for column, value in columns.items() if value is not None}
        self._templates = {
            column: template(value, f"configuration, data.columns.{column}", null_is_empty=column in _NUMBERS)
            for column, value in written.items()
            if re.search(r"\{[{%]", value)
        }
        self._unknown = {v: k for k, v in written.items() if k not in self._templates}
        self._known: tuple[str, ...] = ()

    def __call__(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with its new columns.

        Raises:
            FieldError: a template fails, or a column is not there.
        """
        row, texts = dict(written), set(self._templates)
        if isinstance(written, Cells):
            texts.update(written, self._columns)
        self._known = self._known or tuple(written)
        for name in self._unknown.keys() & written.keys():  # before a template fails
            del self._unknown[name]
        for column, value in self._columns.items():
            if column in self._templates:
                row[column] = self._render(column, written)
            elif value is not None and value in written:
                row[column] = written[value]
            elif value is None or column in _MAY_BE_EMPTY:
                row[column] = None
            else:
                known = ", ".join(written)
                raise FieldError(column, f'there is no column "{value}", got {known}')
        for column in texts & {*COLUMNS}:
            row[column] = _meant(column, row.get(column))
        for column in _LISTS:
            if isinstance(text := row.get(column), str) and text.lstrip().startswith("["):
                row[column] = _parsed(column, text)
        return row

    @property
    def of_conversation(self) -> set[str]:
        """The columns of a conversation that are added."""
        return {column for column, value in self._columns.items() if value is not None} & {*CONVERSATION}

    def check(self) -> None:
        """Check, after the last sample, that each column that was named has been found.

        Raises:
            UserError: no sample has a column of this name.
        """
        for value, column in self._unknown.items():
            if self._known:
                raise UserError(
                    f'no sample of {self._file} has a column "{value}"; got {", ".join(self._known)}',
                    place=f"configuration, data.columns.{column}",
                    remedy=f"name one of these, or write a text as a template: \"{{{{ '{value}' }}}}\"",
                )

    def _render(self, column: str, written: Mapping[str, Any]) -> str:
        values = {k: _typed(v) for k, v in written.items()} if isinstance(written, Cells) else dict(written)
        try:
            return self._templates[column]({**values, "__row__": values, "__file__": self._file})
        except Exception as error:  # whatever the expressions of a template raise
            said = f"the template {show(self._columns[column])} fails: {error}"
            raise FieldError(column, f"{said}; columns: {', '.join(written)}", reason=said) from error


@functools.lru_cache(256)
def template(text: str, place: str, *, null_is_empty: bool = False) -> Callable[[Mapping[str, Any]], str]:
    """Return a Jinja template as a function of its variables, in a sandbox.

    An unknown variable, a list and, unless `null_is_empty`, null raise an error where they are printed.

    Raises:
        UserError: the template is not valid, or jinja2 is missing.
    """
    try:
        from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("templates need jinja2", remedy="pip install 'ual-kernels[elicit]'") from error

    def printed(value: Any) -> Any:
        if isinstance(value, Undefined):
            return value  # raises an error that names it
        if value is None and null_is_empty:
            return ""
        if value is None or isinstance(value, Mapping | list | tuple) or callable(value):
            kind = "null" if value is None else "a method" if callable(value) else show(value)
            remedy = "name['key']" if callable(value) else "`or`, an index, `join` or `tojson`"
            raise ValueError(f"it prints {kind}; write {remedy}")
        return value

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=printed)
    # Jinja's own escapes characters for HTML, which a model would learn
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(text).render
    except TemplateSyntaxError as error:
        raise UserError(f"the template {show(text)} is not valid: {error.message}", place=place) from error


def _typed(cell: str) -> Any:
    """Return a cell for templates: text, or a number or a truth value that is printed as it is written."""
    if cell.lower() in ("true", "false"):
        return _Flag(cell)
    for pattern, kind in ((_INTEGER, int), (_FLOAT, float)):
        if pattern.fullmatch(cell) and str(kind(cell)) == cell:
            return kind(cell)
    return cell


def _meant(column: str, text: Any) -> Any:
    """Return the value that a text stands for in a column of a sample."""
    if not isinstance(text, str):
        return text
    if column in _MAY_BE_EMPTY and not text.strip():
        return None
    if column in _NUMBERS and "_" not in text:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _parsed(column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(column, f"invalid JSON: {error}") from error
