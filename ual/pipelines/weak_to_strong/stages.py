"""Which stage of a study has been computed from which inputs, and files that survive a kill at any moment."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ual.errors import UserError
from ual.files import json_line, read_jsonl, write_json


class Ledger:
    """The inputs of every stage that has begun, in a file: a stage never mixes results of different inputs.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, stage: str, output: Path, **inputs: Any) -> bool:
        """Record the inputs of a stage; return whether it is complete with them.

        Args:
            stage: its name, with its seed.
            output: its file or folder. Without it, the stage has not begun.
            inputs: what decides its results: JSON values.

        Raises:
            UserError: it began with other inputs.
        """
        stages = self._read()
        digests = {name: digest_of(value) for name, value in inputs.items()}
        known = stages.get(stage)
        if known is not None and output.exists():
            if changed := sorted(name for name in digests if known["inputs"].get(name) != digests[name]):
                raise UserError(
                    f"{stage} was computed with other settings: {', '.join(changed)} changed",
                    place=str(self._path.parent),
                    remedy=f"choose another output_dir, or remove {output} to compute it again",
                )
            return bool(known["complete"])
        write_json(self._path, stages | {stage: {"complete": False, "inputs": digests}})
        return False

    def finish(self, stage: str) -> None:
        """Record that a stage is complete."""
        stages = self._read()
        write_json(self._path, stages | {stage: stages[stage] | {"complete": True}})

    def complete(self, stage: str, output: Path) -> bool:
        """Return whether a stage is complete, with any inputs."""
        return output.exists() and bool(self._read().get(stage, {}).get("complete"))

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            found = json.loads(self._path.read_bytes())
            assert isinstance(found, dict)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"not a record of stages: {error}", place=str(self._path), remedy="restore the file"
            ) from error
        return found


def digest_of(value: Any) -> str:
    """Return a hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


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
