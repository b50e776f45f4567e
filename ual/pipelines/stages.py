"""Which step of a study has been computed from which inputs, and files that survive a kill at any moment."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ual.errors import UserError
from ual.files import json_line, read_jsonl, sha256, write_json


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a stage: its name, the file that it writes, and what decides the content: JSON values."""

    name: str
    output: Path
    inputs: Mapping[str, Any]


class Ledger:
    """The inputs of every step that has begun, in a file: no step mixes results of different inputs.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def complete(self, step: Step) -> bool:
        """Return whether a step is complete with its inputs.

        Raises:
            UserError: its output was computed from other inputs, is not recorded, or has changed since.
        """
        known = self._read().get(step.name)
        if not step.output.exists():
            return False
        if known is None:
            raise self._refused(step, f"{step.output.name} is there, and no record of its inputs")
        changed = [name for name, of in _digests(step).items() if known["inputs"].get(name) != of]
        if changed:
            raise self._refused(
                step, f"{step.name}: computed with other settings, {', '.join(changed)} changed"
            )
        if known["sha256"] is None:
            return False
        if known["sha256"] != sha256(step.output):
            raise self._refused(step, f"{step.output.name} has changed since it was computed")
        return True

    def begin(self, step: Step, *, replace: bool = False) -> bool:
        """Record the inputs of a step; return whether there is something to compute.

        Args:
            step: to begin, or to continue.
            replace: compute it again if it was computed otherwise, instead of an error.

        Raises:
            UserError: as `complete`, unless `replace`.
        """
        try:
            if self.complete(step):
                return False
        except UserError:
            if not replace:
                raise
        self._write(step, None)
        return True

    def stale(self, step: Step) -> bool:
        """Return whether there is an output that was computed from other inputs, or that has changed."""
        try:
            self.complete(step)
        except UserError:
            return True
        return False

    def finish(self, step: Step) -> None:
        """Record that a step is complete."""
        self._write(step, sha256(step.output))

    def require(self, step: Step, stage: str) -> None:
        """Check that a step is complete.

        Raises:
            UserError: it is not, or as `complete`.
        """
        if not self.complete(step):
            raise UserError(
                f"{step.output} is missing or not complete", remedy=f"run the stage `{stage}` first, or all"
            )

    def _refused(self, step: Step, problem: str) -> UserError:
        return UserError(
            problem,
            place=str(self._path.parent),
            remedy=f"choose another output_dir, or remove {step.output} to compute it again",
        )

    def _write(self, step: Step, digest: str | None) -> None:
        entry = {"sha256": digest, "inputs": _digests(step)}
        write_json(self._path, self._read() | {step.name: entry})

    def _read(self) -> dict[str, Any]:
        found = read_object(self._path) if self._path.exists() else {}
        for name, entry in found.items():
            if not (isinstance(entry, dict) and entry.keys() == {"sha256", "inputs"}):
                raise _damaged(self._path, f"{name} has no inputs")
        return found


def _digests(step: Step) -> dict[str, str]:
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in step.inputs.items()
    }


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file of the study.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, "expected an object")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"the file is damaged: {why}", place=str(path), remedy="restore it, or choose another output_dir"
    )


def intact(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, after the removal of a last line that a kill cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if (end := content.rfind(b"\n") + 1) < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return [record for _, record in read_jsonl(path)]


@contextmanager
def appending(path: Path) -> Iterator["Appended"]:
    """Open a file of JSON lines to append to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        yield Appended(file)


class Appended:
    """A file of JSON lines. What was added is with the operating system when `add` returns."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def add(self, records: Iterator[Mapping[str, Any]]) -> None:
        """Append some objects."""
        self._file.write("".join(map(json_line, records)))
        self._file.flush()
