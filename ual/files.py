"""Reading and writing files: whole or absent on disk, errors in the user's words, and where caches lie."""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ual.errors import UserError


def shown(path: Path) -> str:
    """Return a path as an error shows it: as it was written, with the absolute path if that differs."""
    absolute = path.absolute()
    return str(path) if path == absolute else f"{path} ({absolute})"


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`. A clean exit renames it to `target`, any other removes it.

    The parent folder is created if needed. Each process has a scratch path of its own; the last rename wins.

    Raises:
        OSError: the folder cannot be written, or the disk is full. The old file is unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        if scratch.parent.is_dir():
            scratch.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """Yield a new scratch folder beside `target`. A clean exit replaces `target` by it, any other removes it.

    Raises:
        OSError: as `aside`.
    """
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def writing(
    what: str, place: Path, remedy: str = "free some space, or choose another place"
) -> Iterator[None]:
    """Turn an OSError within into a `UserError`: "cannot write <what>: No space left on device".

    Args:
        what: the noun in the message.
        place: named if the OSError names no file.
        remedy: the next step.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {what}: {error.strerror or error}",
            place=str(error.filename or place),
            remedy=remedy,
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a complete file, or leave the old one. A lone surrogate is escaped, as in `open_jsonl`."""
    with aside(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON as `write_text` does. NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line, as `write_text` does. NaN and infinities become null."""
    with aside(path) as scratch, open_jsonl(scratch) as file:
        file.writelines(json_line(record) for record in records)


def open_jsonl(path: Path) -> IO[str]:
    """Open a JSONL file for writing.

    A lone surrogate, which JSON may hold but UTF-8 may not, is escaped, so it is read back unchanged.
    """
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")


def json_line(record: Mapping[str, Any]) -> str:
    """Return an object as a line of JSONL. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(finite(record), ensure_ascii=False, default=str, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return the value with None in place of every float that JSON cannot express."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, content) of the non-blank lines of a file; see `every_line`."""
    return ((number, line) for number, line in every_line(path) if line.strip())


def every_line(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield (number, content) of the lines of a file, gzipped or not; numbers begin at 1.

    Only "\n" ends a line: `str.splitlines` would also split at U+2028 inside a JSON string.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")) as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot read the file: {reason}", place=str(path)) from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file, gzipped or not.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in lines(path):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON: {error}", place=place) from error
        if not isinstance(record, dict):
            raise UserError(f"expected an object {{...}}, got {type(record).__name__}", place=place)
        yield number, record


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the user's folder for what can be made again, by the XDG base directory specification."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ual"
