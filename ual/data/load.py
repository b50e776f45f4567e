"""Read samples from files and hub data sets. Errors name the place and the field of wrong samples."""

import difflib
import glob
import gzip
import hashlib
import itertools
import json
import logging
import math
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ual.data import delimited
from ual.data.columns import Columns
from ual.data.schema import (
    UNANSWERED,
    FieldError,
    SampleRecord,
    check,
    conversation,
    options,
    show,
    with_response,
)
from ual.errors import UserError
from ual.files import lines, shown
from ual.records import Sample

Format = Literal["auto", "messages", "prompt_completion", "alpaca"]
Invalid = Literal["refuse", "drop"]
DecidedBy = Literal["options", "label_distribution"] | None

_log = logging.getLogger(__name__)

_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "alpaca": (("instruction", "output"),),
}
_OPTIONAL = {"alpaca": {"input", "history"}}  # columns of a form that a sample may lack
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", *delimited.DELIMITERS)
# no data set of the hub: asking the hub for a missing file takes half a minute without a network
_FILE_NAME = re.compile(
    r"\.(jsonl?|ndjson|parquet|arrow|feather|csv|tsv|txt|xlsx?|ya?ml|sqlite|db|gz|bz2|xz|zst|zip|tar)$",
    re.IGNORECASE,
)
_SHOWN = 5


def load(
    path_or_name: str | Sequence[str],
    *,
    format: Format = "auto",
    split: str = "train",
    columns: Mapping[str, str | None] | None = None,
    invalid: Invalid = "refuse",
    dropped: Counter[str] | None = None,
    decided_by: DecidedBy = None,
) -> list[Sample]:
    """Read and validate all samples.

    Args:
        path_or_name: a ``.jsonl``, ``.json`` (one array), ``.csv``, ``.tsv`` or ``.parquet`` file, all but
            the last also with ``.gz``. Otherwise a folder or a hub name that `datasets.load_dataset` accepts;
            ``name:config`` selects one of its configurations. A pattern such as ``data/*.jsonl`` is all
            files that match, in the order of their names. Several of these are read one after the other.
        format: how columns become a conversation. ``auto`` decides by the columns of the first sample and
            logs its choice; all samples must have these columns.

            ``messages``: `messages` or `conversations`, a list of ``{"role", "content"}`` or
            ``{"from", "value"}``. Roles are system, user, assistant and tool, and ShareGPT's human and gpt.
            ``prompt_completion``: `prompt` and `completion`, or `question` and `answer`; each a string or
            a list of messages.
            ``alpaca``: `instruction`, `output`, and optionally `input`, which follows the instruction after
            an empty line, and `history`, a list of earlier ``[question, answer]`` pairs.
        split: of a folder or a hub data set; a file has only one.
        columns: a sample's column -> a column of the file, or a template; see `ual.data.columns.Columns`.
        invalid: "drop" skips wrong samples.
        dropped: counts the samples that were skipped, by the reason.
        decided_by: the column of options that samples must have, see `ual.data.schema.options`; None reads
            neither `options` nor `label_distribution`. A sample without a response always has the most
            probable text of its `label_distribution` as response.

    Returns:
        The samples in order. Optional columns are `id`, `source`, `uncertainty` (finite), `label_smoothing`
        (in [0, 1]), `sample_weight` (finite, >= 0) and `tools` (a list of JSON schemas, or its JSON). Null
        means absent, and other columns are ignored. Messages may have `tool_calls`, `name`, `tool_call_id` or
        `reasoning_content`. The arguments of a call are an object, or its JSON. The id of a sample without
        `id` is a hash of its conversation; the second of two equal samples gets ``-2`` appended. Places count
        the lines of JSONL, CSV and TSV from 1, and all else from 0.

    Raises:
        UserError: nothing can be read, or samples are wrong; the first five are listed with their place and
            field. A conversation has non-empty user and assistant turns, a user turn before its first
            assistant turn, and an assistant turn at its end.
    """
    names = expand(path_or_name)
    faults = _Faults(names, invalid, dropped)
    how = _How(names, format, split, columns or {}, faults, {}, {}, decided_by=decided_by)
    return [sample for _, sample in _read(how)]


def stream(
    path_or_name: str | Sequence[str],
    *,
    format: Format = "auto",
    split: str = "train",
    columns: Mapping[str, str | None] | None = None,
    invalid: Invalid = "refuse",
    dropped: Counter[str] | None = None,
    decided_by: DecidedBy = None,
    unanswered: bool = False,
) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield every sample as it is written and as it is validated, in order.

    As `load`, in bounded memory: ``.jsonl``, ``.csv`` and ``.tsv`` are read line by line, parquet in
    batches, and hub data sets are streamed. Known ids are on disk. A ``.json`` array is read at once. A
    sample as it is written has the columns that `columns` adds, and, if they are a conversation, its
    `messages`. If `unanswered`, a sample with a prompt needs no response: it gets an empty one, and is
    written without.

    Raises:
        UserError: as `load`; at the first wrong sample.
    """
    names = expand(path_or_name)
    faults = _Faults(names, invalid, dropped, most=1)
    files = _How(names, format, split, columns or {}, faults, _OnDisk(), _OnDisk(), streaming=True)
    return _read(replace(files, decided_by=decided_by, unanswered=unanswered))


def expand(path_or_name: str | Sequence[str]) -> list[str]:
    """Return the files, folders and hub names that are meant, without patterns.

    Raises:
        UserError: a pattern matches no file, or a file is named twice.
    """
    names: list[str] = []
    for name in [path_or_name] if isinstance(path_or_name, str) else path_or_name:
        path = Path(name).expanduser()
        if path.exists() or not glob.has_magic(name):
            names.append(name)
            continue
        found = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())  # noqa: PTH207
        if not found:
            raise UserError("no file matches this pattern", place=name, remedy=_suggest(path))
        names += found
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError("the file is named twice", place=twice[0], remedy="name it once")
    return names


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
        raise UserError("no such file", place=shown(path), remedy=_suggest(path))
    lower = path.name.lower()
    if lower.endswith((".jsonl", ".jsonl.gz")):
        return ((f"line {number}", line.rstrip(b"\r\n")) for number, line in lines(path))
    if lower.endswith((".json", ".json.gz")):
        return ((f"index {i}", item) for i, item in enumerate(_json_array(path)))
    if lower.endswith(".parquet"):
        return _parquet(path)
    if lower.endswith(tuple(delimited.DELIMITERS)):
        return delimited.read(path)
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
        # the garbage collector may close it in another thread
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
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


class _Faults:
    """The wrong samples of one reading: an error at its end, or counts by reason if they are dropped."""

    def __init__(
        self, names: list[str], invalid: Invalid, dropped: Counter[str] | None, most: float = math.inf
    ) -> None:
        self._names, self._most, self.count, self.form = names, most, 0, ""
        self.drops = invalid == "drop"
        self._dropped = Counter[str]() if dropped is None else dropped
        self._first: list[tuple[str, FieldError]] = []

    def add(self, name: str, where: str, fault: FieldError) -> None:
        """Count a wrong sample.

        Raises:
            UserError: there are as many as the reading allows.
        """
        self.count += 1
        if len(self._first) < _SHOWN:
            self._first.append((where if len(self._names) == 1 else f"{name}, {where}", fault))
        if self.drops:
            self._dropped[fault.reason] += 1
        elif self.count == self._most:
            raise self.report()

    def check(self, good: int) -> None:
        """Check, at the end, that there were good samples, and no wrong ones unless they are dropped."""
        if self.count and not (self.drops and good):
            raise self.report()
        if not good:
            raise UserError("no samples", place=", ".join(self._names))

    def report(self) -> UserError:
        shown = [
            (f'{where}, field "{fault.field}"' if fault.field else where, fault.problem)
            for where, fault in self._first
        ]
        remedy = "" if self.drops else ', or set data.invalid to "drop"'
        if self.form:
            remedy += f'; the file is read as "{self.form}", data.format chooses another'
        at = f"{self._names[0]}, " if len(self._names) == 1 else ""
        if self.count == 1:
            [(place, problem)] = shown
            return UserError(problem, place=f"{at}{place}", remedy=f"correct or remove this sample{remedy}")
        first = f"; the first {_SHOWN}" if self.count > _SHOWN else ""
        listed = "".join(f"\n  {place}: {problem}" for place, problem in shown)
        problem = f"{self.count} wrong samples{first}:{listed}"
        return UserError(
            problem, place=", ".join(self._names), remedy=f"correct or remove these samples{remedy}"
        )


@dataclass(slots=True)
class _How:
    """The arguments of one reading, and what it knows so far: the places of ids, and copies of samples."""

    names: list[str]
    format: Format
    split: str
    columns: Mapping[str, str | None]
    faults: _Faults
    places: _Strings
    copies: _Strings
    streaming: bool = False
    decided_by: DecidedBy = None
    unanswered: bool = False
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _read(how: _How) -> Iterator[tuple[Mapping[str, Any], Sample]]:
    """Yield valid samples; after the last one, or after so many faults, raise an error with the faults."""
    count = 0
    for name in how.names:
        columns = Columns(how.columns, name)
        before = count
        undetected: UserError | None = None
        for where, raw in _written(name, how.split, streaming=how.streaming):
            try:
                row = columns(_mapping(raw))
                complete = with_response(row, unanswered=how.unanswered)
                if name not in how.forms:
                    try:
                        how.faults.form, how.forms[name] = _detect(
                            complete, how.format, columns.of_conversation, f"{name}, {where}"
                        )
                    except UserError as error:
                        undetected = undetected or error
                        raise FieldError("", "no columns to make a conversation of") from error
                sample = _sample(complete, how.forms[name], how, f"{name}, {where}")
                if earlier := how.places.get(sample.id):
                    said = f"{sample.id!r} is already the id of {earlier.removeprefix(f'{name}, ')}"
                    raise FieldError("id", said, reason="it is the id of an earlier sample")
            except FieldError as fault:
                if undetected and not how.faults.drops:
                    raise undetected from fault
                how.faults.add(name, where, fault)
            else:
                how.places[sample.id] = sample.place
                count += 1
                if columns.of_conversation - {"messages"} and sample.messages[-1:] != UNANSWERED:
                    row["messages"] = [message.as_dict() for message in sample.messages]
                yield row, sample
        if undetected and name not in how.forms:
            raise undetected
        columns.check()
        used = ", ".join(how.forms.get(name, ()))
        _log.info("%s: %d samples, read as %s by the columns %s", name, count - before, how.faults.form, used)
    how.faults.check(count)


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, FieldError):
        raise raw
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


def _detect(
    row: Mapping[str, Any], format: Format, added: set[str], place: str
) -> tuple[str, tuple[str, ...]]:
    """Return the form of a sample and its columns, which include some that `data.columns` has `added`."""
    if format != "auto" and format not in _COLUMNS:
        raise UserError(f"unknown format {format!r}; valid: auto, {', '.join(_COLUMNS)}")
    forms = _COLUMNS if format == "auto" else {format: _COLUMNS[format]}
    for form, choices in forms.items():
        for columns in choices:
            meant = not added or added & {*columns, *_OPTIONAL.get(form, ())}
            if meant and all(row.get(column) is not None for column in columns):
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


def _sample(row: Mapping[str, Any], columns: tuple[str, ...], how: _How, place: str) -> Sample:
    messages = conversation(row, columns)
    given = check(SampleRecord, row)
    tools = tuple(given.tools)
    id = given.id
    if id is None:
        said: list[Any] = [
            [m.role, m.content, *m.tool_calls, *filter(None, [m.reasoning_content])] for m in messages
        ]
        digest = hashlib.sha256(json.dumps([*said, tools] if tools else said).encode()).hexdigest()[:16]
        how.copies[digest] = count = (how.copies.get(digest) or 0) + 1
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
        options=options(row, messages[-1], how.decided_by, smoothed=given.label_smoothing != 0),
    )
