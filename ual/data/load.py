"""Rows of a file or a hub data set to `Sample`s, each checked, with its place in every complaint."""

import contextlib
import difflib
import gzip
import hashlib
import json
import logging
import math
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ual.errors import UserError
from ual.records import Message, Role, Sample

Format = Literal["auto", "messages", "prompt_completion", "alpaca"]

_log = logging.getLogger(__name__)

_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "alpaca": (("instruction", "output"),),
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
# Each would change what is trained, and `Message` cannot hold it.
_UNSUPPORTED = ("function_call", "reasoning_content", "weight")
_SHOWN = 5

_Turn = tuple[str, Message]  # the field that it was read from, for complaints


class _RowError(Exception):
    """One row's first fault."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem


@dataclass(slots=True)
class _Faults:
    """The wrong rows of a file, each with where it is, and what the rows were read as."""

    rows: list[tuple[str, _RowError]] = field(default_factory=list)
    form: str = ""


def load(path_or_name: str, *, format: Format = "auto", split: str = "train") -> list[Sample]:
    """Read and validate every row.

    Args:
        path_or_name: a ``.jsonl``, ``.json`` (one array) or ``.parquet`` file, the first two also with
            ``.gz``; else a folder or a hub name that `datasets.load_dataset` understands, where
            ``name:config`` chooses one of its configurations.
        format: how a row becomes a conversation. ``auto`` decides by the columns of the first row and
            logs its choice; every row must then fit.

            ``messages``: `messages` or `conversations`, a list of ``{"role", "content"}`` or
            ``{"from", "value"}``; roles are system, user, assistant and tool, and ShareGPT's human and gpt.
            ``prompt_completion``: `prompt` and `completion`, or `question` and `answer`; each a string or
            a list of messages.
            ``alpaca``: `instruction`, `output` and optionally `input`, which follows the instruction after
            an empty line, and `history`, a list of earlier ``[question, answer]`` pairs.
        split: which split of a folder or hub data set; a file has only one.

    Returns:
        One sample per row, in order. The optional columns `id`, `source`, `uncertainty` (finite),
        `label_smoothing` (in [0, 1]), `sample_weight` (finite, >= 0) and `tools` (JSON schemas, a list or its
        JSON) are taken over, null meaning absent; further columns are ignored. Messages may have
        `tool_calls`, `name` and `tool_call_id`. A row without `id` gets a hash of its conversation, the
        second of two equal rows with ``-2`` behind it. Places count lines from 1 in JSONL, array indices and
        parquet or hub rows from 0.

    Raises:
        UserError: nothing could be read, or rows are wrong: the first five are named with their line and
            field. A conversation must have non-empty user and assistant turns, a user turn before the
            first assistant turn, and an assistant turn at its end.
    """
    file = Path(path_or_name).expanduser()
    repository, _, config = (path_or_name, "", "") if file.is_dir() else path_or_name.partition(":")
    folder = Path(repository).expanduser()
    is_folder = repository != "" and folder.is_dir()
    if is_folder or not (file.exists() or _names_a_file(path_or_name)):
        rows: Iterable[tuple[str, Any]] = _hub_rows(
            path_or_name, str(folder) if is_folder else repository, config or None, split, is_folder=is_folder
        )
    else:
        rows = _file_rows(file)
    return _samples(path_or_name, rows, format)


def stream(
    path_or_name: str, *, format: Format = "auto", split: str = "train"
) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield every row as it was written, with its sample, in order.

    As `load`, in bounded memory: ``.jsonl`` is read line by line, parquet in batches, hub data sets as they
    stream, and the ids that were seen are on disk. A ``.json`` array is read whole.

    Raises:
        UserError: see `load`; at the first wrong row.
    """
    file = Path(path_or_name).expanduser()
    rows: Iterable[tuple[str, Any]]
    if file.name.lower().endswith((".jsonl", ".jsonl.gz")) and file.is_file():
        rows = _lines(file)
    elif file.name.lower().endswith(".parquet") and file.is_file():
        rows = _parquet_rows(file)
    elif file.is_file() or _names_a_file(path_or_name):
        rows = _file_rows(file)
    else:
        name, _, config = (path_or_name, "", "") if file.is_dir() else path_or_name.partition(":")
        rows = _hub_rows(path_or_name, name, config or None, split, is_folder=file.is_dir(), streaming=True)
    faults = _Faults()
    for row in _each(path_or_name, rows, format, _OnDisk(), _OnDisk(), faults):
        if faults.rows:
            break
        yield row
    if faults.rows:
        raise _report(path_or_name, faults)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for n, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {n}", line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the file: {error}", place=str(path)) from error


class _OnDisk:
    """A dictionary of strings in a temporary file that nobody else sees; what is not there is None."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("CREATE TABLE pair (key TEXT PRIMARY KEY, value) WITHOUT ROWID")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("BEGIN")

    def get(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM pair WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def __setitem__(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO pair VALUES (?, ?)", (key, value))

    def __del__(self) -> None:
        self._db.close()


class _Seen(Protocol):
    """What both a dictionary and `_OnDisk` can do."""

    def get(self, key: str, /) -> Any: ...
    def __setitem__(self, key: str, value: Any, /) -> None: ...


def _names_a_file(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) or name.startswith(("./", "../", "~")) or Path(name).is_absolute()


def _file_rows(path: Path) -> list[tuple[str, Any]]:
    name = path.name.lower()
    if path.exists() and not name.endswith(_SUFFIXES):
        raise UserError(
            f"cannot tell how to read a file named {path.name!r}",
            place=str(path),
            remedy=f"valid endings: {', '.join(_SUFFIXES)}",
        )
    try:
        if name.endswith(".parquet"):
            return list(_parquet_rows(path))
        content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    except FileNotFoundError as error:
        raise UserError("no such file", place=str(path), remedy=_suggest(path)) from error
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UserError(f"cannot read the file: {error}", place=str(path)) from error
    if name.removesuffix(".gz").endswith(".jsonl"):
        # Only "\n" ends a line: str.splitlines would also break at U+2028 inside a JSON string.
        return [(f"line {n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    return [(f"index {i}", row) for i, row in enumerate(_json_array(path, content))]


def _suggest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"nearest names in {folder}: {', '.join(close)}"
    data = [name for name in names if name.lower().endswith(_SUFFIXES)][:_SHOWN]
    return f"data files in {folder}: {', '.join(data) or 'none'}"


def _json_array(path: Path, content: bytes) -> list[Any]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"not UTF-8: {error.reason}", place=f"{path}, line {line}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            "the file is empty"
            if not content.strip()
            else f"invalid JSON: {error.msg}, column {error.colno}",
            place=f"{path}, line {error.lineno}",
            remedy="a .json file holds one array of objects; name a file of one object per line .jsonl",
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"want an array of objects, got {_describe(rows)}", place=str(path))
    return rows


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "parquet needs pyarrow", place=str(path), remedy="pip install 'ual-kernels[train]'"
        ) from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        i = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield f"row {i}", row
                i += 1
    except pa.ArrowInvalid as error:
        raise UserError(f"not a parquet file: {error}", place=str(path)) from error


def _hub_rows(
    place: str, name: str, config: str | None, split: str, *, is_folder: bool, streaming: bool = False
) -> Iterator[tuple[str, Any]]:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            "no such file, and hub data sets need `datasets`",
            place=place,
            remedy="correct the path, or pip install 'ual-kernels[train]'",
        ) from error
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises whatever its transport does
        first_line = next(iter(str(error).splitlines()), "")
        said = f"{type(error).__name__}: {first_line}"
        if is_folder:
            raise UserError(f"datasets cannot read this folder: {said}", place=place) from error
        raise UserError(
            f"neither reading worked. As a file: no such file. As a hub data set, split {split!r}: {said}",
            place=place,
            remedy=f"give a path that ends in {', '.join(_SUFFIXES)}, or check the name and the network",
        ) from error
    return ((f"row {i}", row) for i, row in enumerate(dataset))


def _samples(path: str, rows: Iterable[tuple[str, Any]], format: Format) -> list[Sample]:
    faults = _Faults()
    samples = [sample for _, sample in _each(path, rows, format, {}, {}, faults)]
    if faults.rows:
        raise _report(path, faults)
    return samples


def _each(
    path: str,
    rows: Iterable[tuple[str, Any]],
    format: Format,
    places: _Seen,
    copies: _Seen,
    faults: _Faults,
) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield the right rows, and add the faults of the others."""
    form, count = "", 0
    columns: tuple[str, ...] = ()
    for where, raw in rows:
        try:
            row = _mapping(raw)
            if not form:
                form, columns = _detect(row, format, f"{path}, {where}")
                faults.form = form
            sample = _sample(row, form, columns, copies, f"{path}, {where}")
            if earlier := places.get(sample.id):
                raise _RowError("id", f"{sample.id!r} is already the id of {earlier}")
        except _RowError as fault:
            faults.rows.append((where, fault))
        else:
            places[sample.id] = where
            count += 1
            yield row, sample
    if not count and not faults.rows:
        raise UserError("no rows", place=path)
    _log.info("%s: %d rows, read as %s by the columns %s", path, count, form, ", ".join(columns))


def _report(path: str, faults: _Faults) -> UserError:
    def place(where: str, field: str) -> str:
        return f'{where}, field "{field}"' if field else where

    remedy = "correct or remove " + ("this row" if len(faults.rows) == 1 else "these rows")
    if faults.form:
        remedy += f'; the file is read as "{faults.form}", data.format chooses another'
    if len(faults.rows) == 1:
        where, fault = faults.rows[0]
        return UserError(fault.problem, place=f"{path}, {place(where, fault.field)}", remedy=remedy)
    shown = [f"  {place(where, fault.field)}: {fault.problem}" for where, fault in faults.rows[:_SHOWN]]
    first = f"; the first {_SHOWN}" if len(faults.rows) > _SHOWN else ""
    return UserError("\n".join([f"{len(faults.rows)} wrong rows{first}:", *shown]), place=path, remedy=remedy)


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise _RowError("", f"not UTF-8: {error.reason} at byte {error.start}") from error
        except json.JSONDecodeError as error:
            raise _RowError("", f"invalid JSON: {error.msg}, column {error.colno}") from error
    if not isinstance(raw, Mapping):
        raise _RowError("", f"want an object, got {_describe(raw)}")
    return raw


def _detect(row: Mapping[str, Any], format: Format, place: str) -> tuple[str, tuple[str, ...]]:
    if format != "auto" and format not in _COLUMNS:
        raise UserError(f"unknown format {format!r}; valid: auto, {', '.join(_COLUMNS)}")
    forms = _COLUMNS if format == "auto" else {format: _COLUMNS[format]}
    for form, choices in forms.items():
        for columns in choices:
            if all(row.get(column) is not None for column in columns):
                return form, columns
    wanted = "; ".join(
        f"{' or '.join(' + '.join(columns) for columns in choices)} ({form})"
        for form, choices in forms.items()
    )
    raise UserError(
        f"no columns to make a conversation of: want {wanted}; got {', '.join(row) or 'none'}",
        place=place,
        remedy="rename the columns" + ("" if format == "auto" else ", or set data.format to auto"),
    )


def _sample(row: Mapping[str, Any], form: str, columns: tuple[str, ...], copies: _Seen, place: str) -> Sample:
    for column in columns:
        if row.get(column) is None:
            raise _RowError(column, f"is missing, got {', '.join(row) or 'no columns'}")
    if form == "messages":
        turns = _messages(row[columns[0]], columns[0])
    elif form == "prompt_completion":
        turns = _speech(row[columns[0]], columns[0], "user") + _speech(
            row[columns[1]], columns[1], "assistant"
        )
    else:
        turns = _alpaca(row)
    _check_order(turns, columns[0])
    messages = tuple(message for _, message in turns)
    smoothing = _number(row, "label_smoothing", low=0, high=1)
    weight = _number(row, "sample_weight", low=0)
    tools = _mappings(row.get("tools"), "tools")
    return Sample(
        id=_id(row, messages, tools, copies),
        messages=messages,
        source="" if row.get("source") is None else _text(row["source"], "source"),
        uncertainty=_number(row, "uncertainty"),
        label_smoothing=smoothing,
        sample_weight=1.0 if weight is None else weight,
        place=place,
        tools=tools,
    )


def _messages(value: Any, field: str) -> list[_Turn]:
    if not isinstance(value, list) or not value:
        raise _RowError(field, f"want a list of messages, got {_describe(value)}")
    return [_message(item, f"{field}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, field: str) -> _Turn:
    if not isinstance(item, Mapping):
        raise _RowError(field, f'want {{"role": ..., "content": ...}}, got {_describe(item)}')
    for key in _UNSUPPORTED:
        if item.get(key) not in (None, [], {}, ""):
            raise _RowError(
                f"{field}.{key}", "is not supported, and to leave it out would change what is trained"
            )
    role_key, content_key = (
        ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    )
    role = item.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise _RowError(f"{field}.{role_key}", f"unknown role {_describe(role)}; valid: {', '.join(_ROLES)}")
    content_field = f"{field}.{content_key}"
    calls = _mappings(item.get("tool_calls"), f"{field}.tool_calls")
    if calls and _ROLES[role] != "assistant":
        raise _RowError(f"{field}.tool_calls", f"only the assistant calls tools, got the role {role!r}")
    content = item.get(content_key)
    return content_field, Message(
        _ROLES[role],
        "" if calls and content is None else _text(content, content_field),
        tool_calls=calls,
        **{
            key: _text(item[key], f"{field}.{key}")
            for key in ("name", "tool_call_id")
            if item.get(key) is not None
        },
    )


def _mappings(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas or calls: a list of objects, or the JSON of one, since Arrow wants objects to be alike."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _RowError(field, f"invalid JSON: {error.msg}, column {error.colno}") from error
    if value in (None, "", {}):
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise _RowError(field, f"want a list of objects, or its JSON, got {_describe(value)}")
    return tuple(_without_nulls(item) for item in value)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all others, as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _speech(value: Any, field: str, role: Role) -> list[_Turn]:
    if isinstance(value, list):
        return _messages(value, field)
    return [(field, Message(role, _text(value, field)))]


def _alpaca(row: Mapping[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise _RowError("history", f"want a list of [question, answer] pairs, got {_describe(history)}")
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _RowError(f"history[{i}]", f"want a [question, answer] pair, got {_describe(pair)}")
        turns += _speech(pair[0], f"history[{i}][0]", "user")
        turns += _speech(pair[1], f"history[{i}][1]", "assistant")
    prompt = _text(row["instruction"], "instruction")
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    if extra.strip():
        prompt += f"\n\n{extra}"
    return [*turns, *_speech(prompt, "instruction", "user"), *_speech(row["output"], "output", "assistant")]


def _check_order(turns: list[_Turn], field: str) -> None:
    roles = [message.role for _, message in turns]
    if roles[-1] != "assistant":
        raise _RowError(field, f"the conversation must end with an assistant turn, it ends with {roles[-1]}")
    for content_field, message in turns:
        if message.role in ("user", "assistant") and not (message.content.strip() or message.tool_calls):
            kind = "response" if message.role == "assistant" else "prompt"
            raise _RowError(content_field, f"the {kind} is empty")
    if "user" not in roles[: roles.index("assistant")]:
        raise _RowError(field, "the conversation needs a user turn before its first assistant turn")


def _id(
    row: Mapping[str, Any],
    messages: tuple[Message, ...],
    tools: tuple[Mapping[str, Any], ...],
    copies: _Seen,
) -> str:
    given = row.get("id")
    if given is None:
        said: list[Any] = [[message.role, message.content, *message.tool_calls] for message in messages]
        text = json.dumps([*said, tools] if tools else said)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        copies[digest] = count = (copies.get(digest) or 0) + 1
        return digest if count == 1 else f"{digest}-{count}"
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    if not (isinstance(given, str) and given.strip()):
        raise _RowError("id", f"want a non-empty string or an integer, got {_describe(given)}")
    return _text(given, "id")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _RowError(field, f"want a string, got {_describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError(
            field, f"half of a surrogate pair at character {error.start}: not valid Unicode"
        ) from error
    return value


def _number(
    row: Mapping[str, Any], field: str, *, low: float = -math.inf, high: float = math.inf
) -> float | None:
    value = row.get(field)
    if value is None:
        return None
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond float64
            number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        want = "a finite number"
        if high < math.inf:
            want += f" in [{low:g}, {high:g}]"
        elif low > -math.inf:
            want += f" >= {low:g}"
        raise _RowError(field, f"want {want}, got {_describe(value)}")
    return number


def _describe(value: Any) -> str:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return shown if isinstance(value, int | float | None) else f"{type(value).__name__} {shown}"
