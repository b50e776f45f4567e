"""Read samples from a file or a hub data set. Errors name the place and the field of wrong samples."""

import difflib
import gzip
import hashlib
import itertools
import json
import logging
import math
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ual.data.schema import FieldError, SampleRecord, check, conversation, show
from ual.errors import UserError
from ual.files import lines
from ual.records import Sample

Format = Literal["auto", "messages", "prompt_completion", "alpaca"]

_log = logging.getLogger(__name__)

_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "alpaca": (("instruction", "output"),),
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# no data set of the hub: asking the hub for a missing file takes half a minute without a network
_FILE_NAME = re.compile(
    r"\.(jsonl?|ndjson|parquet|arrow|feather|csv|tsv|txt|xlsx?|ya?ml|sqlite|db|gz|bz2|xz|zst|zip|tar)$",
    re.IGNORECASE,
)
_SHOWN = 5


def load(path_or_name: str, *, format: Format = "auto", split: str = "train") -> list[Sample]:
    """Read and validate all samples.

    Args:
        path_or_name: a ``.jsonl``, ``.json`` (one array) or ``.parquet`` file, the first two also with
            ``.gz``. Otherwise a folder or a hub name that `datasets.load_dataset` accepts; ``name:config``
            selects one of its configurations.
        format: how columns become a conversation. ``auto`` decides by the columns of the first sample and
            logs its choice; all samples must have these columns.

            ``messages``: `messages` or `conversations`, a list of ``{"role", "content"}`` or
            ``{"from", "value"}``. Roles are system, user, assistant and tool, and ShareGPT's human and gpt.
            ``prompt_completion``: `prompt` and `completion`, or `question` and `answer`; each a string or
            a list of messages.
            ``alpaca``: `instruction`, `output`, and optionally `input`, which follows the instruction after
            an empty line, and `history`, a list of earlier ``[question, answer]`` pairs.
        split: of a folder or a hub data set; a file has only one.

    Returns:
        The samples in order. Optional columns are `id`, `source`, `uncertainty` (finite), `label_smoothing`
        (in [0, 1]), `sample_weight` (finite, >= 0) and `tools` (a list of JSON schemas, or its JSON). Null
        means absent, and other columns are ignored. Messages may have `tool_calls`, `name`, `tool_call_id` or
        `reasoning_content`. The arguments of a call are an object, or its JSON. The id of a sample without
        `id` is a hash of its conversation; the second of two equal samples gets ``-2`` appended. Places count
        the lines of JSONL from 1, and all else from 0.

    Raises:
        UserError: nothing can be read, or samples are wrong; the first five are listed with their place and
            field. A conversation has non-empty user and assistant turns, a user turn before its first
            assistant turn, and an assistant turn at its end.
    """
    written = _written(path_or_name, split)
    return [sample for _, sample in _read(path_or_name, written, format, {}, {})]


def stream(
    path_or_name: str, *, format: Format = "auto", split: str = "train"
) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield every sample as it is written and as it is validated, in order.

    As `load`, in bounded memory: ``.jsonl`` is read line by line, parquet in batches, and hub data sets are
    streamed. Known ids are on disk. A ``.json`` array is read at once.

    Raises:
        UserError: as `load`; at the first wrong sample.
    """
    written = _written(path_or_name, split, streaming=True)
    return _read(path_or_name, written, format, _OnDisk(), _OnDisk(), most_faults=1)


def _written(name: str, split: str, *, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Return the place of every sample, and the sample as it is written: its line of JSONL, or an object."""
    path = Path(name).expanduser()
    repository, _, config = (name, "", "") if path.is_dir() else name.partition(":")
    folder = Path(repository).expanduser()
    is_folder = repository != "" and folder.is_dir()
    names_a_file = (
        _FILE_NAME.search(name) is not None
        or name.startswith(("./", "../", "~"))
        or path.is_absolute()
        or repository.count("/") > 1  # the hub has names and owners, no folders
    )
    if is_folder or not (path.exists() or names_a_file):
        repository = str(folder) if is_folder else repository
        return _hub(name, repository, config or None, split, is_folder=is_folder, streaming=streaming)
    if not path.exists():
        raise UserError("no such file", place=str(path), remedy=_suggest(path))
    lower = path.name.lower()
    if lower.endswith((".jsonl", ".jsonl.gz")):
        return ((f"line {number}", line.rstrip(b"\r\n")) for number, line in lines(path))
    if lower.endswith((".json", ".json.gz")):
        return ((f"index {i}", item) for i, item in enumerate(_json_array(path)))
    if lower.endswith(".parquet"):
        return _parquet(path)
    raise UserError(
        f"cannot tell how to read a file named {path.name!r}",
        place=str(path),
        remedy=f"valid endings: {', '.join(_SUFFIXES)}",
    )


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


def _json_array(path: Path) -> list[Any]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        found = json.loads(content.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the file: {error}", place=str(path)) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"not UTF-8: {error.reason}", place=f"{path}, line {line}") from error
    except json.JSONDecodeError as error:
        said = f"invalid JSON: {error.msg}, column {error.colno}"
        raise UserError(
            said if content.strip() else "the file is empty",
            place=f"{path}, line {error.lineno}",
            remedy="a .json file holds one array of objects; name a file of one object per line .jsonl",
        ) from error
    if not isinstance(found, list):
        raise UserError(f"expected an array of objects, got {show(found)}", place=str(path))
    return found


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "parquet needs pyarrow", place=str(path), remedy="pip install 'ual-kernels[train]'"
        ) from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        samples = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"sample {i}", sample) for i, sample in enumerate(samples))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read the parquet file: {error}", place=str(path)) from error


def _hub(
    place: str, name: str, config: str | None, split: str, *, is_folder: bool, streaming: bool
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
    return ((f"sample {i}", sample) for i, sample in enumerate(dataset))


class _OnDisk:
    """A dictionary in a temporary file without a name; the value of an unknown key is None."""

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


_Strings = dict[str, Any] | _OnDisk


def _read(
    name: str,
    written: Iterable[tuple[str, Any]],
    format: Format,
    places: _Strings,
    copies: _Strings,
    most_faults: float = math.inf,
) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield valid samples; after the last one, or after so many faults, raise an error with the faults."""
    form, count = "", 0
    columns: tuple[str, ...] = ()
    faults: list[tuple[str, FieldError]] = []
    for where, raw in written:
        try:
            row = _mapping(raw)
            if not form:
                form, columns = _detect(row, format, f"{name}, {where}")
            sample = _sample(row, columns, copies, f"{name}, {where}")
            if earlier := places.get(sample.id):
                raise FieldError("id", f"{sample.id!r} is already the id of {earlier}")
        except FieldError as fault:
            faults.append((where, fault))
            if len(faults) == most_faults:
                break
        else:
            places[sample.id] = where
            count += 1
            yield row, sample
    if faults:
        raise _report(name, form, faults)
    if not count:
        raise UserError("no samples", place=name)
    _log.info("%s: %d samples, read as %s by the columns %s", name, count, form, ", ".join(columns))


def _report(name: str, form: str, faults: list[tuple[str, FieldError]]) -> UserError:
    shown = [
        (f'{where}, field "{fault.field}"' if fault.field else where, fault.problem)
        for where, fault in faults[:_SHOWN]
    ]
    remedy = f'; the file is read as "{form}", data.format chooses another' if form else ""
    if len(faults) == 1:
        [(place, problem)] = shown
        return UserError(problem, place=f"{name}, {place}", remedy=f"correct or remove this sample{remedy}")
    first = f"; the first {_SHOWN}" if len(faults) > _SHOWN else ""
    listed = "".join(f"\n  {place}: {problem}" for place, problem in shown)
    problem = f"{len(faults)} wrong samples{first}:{listed}"
    return UserError(problem, place=name, remedy=f"correct or remove these samples{remedy}")


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise FieldError("", f"invalid JSON: {error.msg}, column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise FieldError("", f"invalid JSON: {error}") from error
    if not isinstance(raw, Mapping):
        raise FieldError("", f"expected an object, got {show(raw)}")
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
        f"no columns to make a conversation of: expected {wanted}; got {', '.join(row) or 'none'}",
        place=place,
        remedy="rename the columns" + ("" if format == "auto" else ", or set data.format to auto"),
    )


def _sample(row: Mapping[str, Any], columns: tuple[str, ...], copies: _Strings, place: str) -> Sample:
    messages = conversation(row, columns)
    given = check(SampleRecord, row)
    tools = tuple(given.tools)
    id = given.id
    if id is None:
        said: list[Any] = [
            [m.role, m.content, *m.tool_calls, *filter(None, [m.reasoning_content])] for m in messages
        ]
        digest = hashlib.sha256(json.dumps([*said, tools] if tools else said).encode()).hexdigest()[:16]
        copies[digest] = count = (copies.get(digest) or 0) + 1
        id = digest if count == 1 else f"{digest}-{count}"
    return Sample(
        id=id,
        messages=messages,
        source=given.source or "",
        uncertainty=given.uncertainty,
        label_smoothing=given.label_smoothing,
        sample_weight=1.0 if given.sample_weight is None else given.sample_weight,
        place=place,
        tools=tools,
    )
