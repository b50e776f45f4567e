"""Requests as files, for OpenAI's Batch interface and `vllm run-batch`, and their answers back into the
cache.

This is how elicitation spreads over machines: export what is not answered yet, run the files wherever there
is room, import what came back. An estimator with several stages needs a round for each: the next export holds
what the answers made possible.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ual.errors import UserError
from ual.uncertainty import protocol
from ual.uncertainty.backends.endpoint import Endpoint, parse
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Reply, Request, RequestError, Task

_LARGEST = 100 * 2**20  # bytes of one file; OpenAI takes 200 MB
_MOST = 50_000  # requests in one file, OpenAI's limit
_LONGEST = 64 * 2**20  # bytes of one line of answers


class Export:
    """Writes down requests instead of asking them; each then fails, for there is no answer yet."""

    tasks: frozenset[Task] = frozenset({"generate"})

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self.identity: Mapping[str, Any] = endpoint.identity
        self._endpoint, self._folder = endpoint, folder
        self.count, self.files = 0, list[Path]()
        self._written = self._in_file = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"{folder} is not empty", remedy="name a new folder for the batch files")
        except OSError as error:
            raise UserError(f"cannot write batch files: {error.strerror}", place=str(folder)) from error

    async def __call__(self, request: Request) -> Reply:
        line = json.dumps(
            {
                "custom_id": protocol.key(self.identity, request).hex(),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": self._endpoint.body(request),
            }
        )
        if not self.files or self._in_file == _MOST or self._written + len(line) > _LARGEST:
            self.files.append(self._folder / f"requests-{len(self.files) + 1:05d}.jsonl")
            self._written = self._in_file = 0
        with self.files[-1].open("a", encoding="utf-8") as file:
            self._written += file.write(line + "\n")
        self._in_file += 1
        self.count += 1
        raise RequestError("exported")

    async def close(self) -> None:
        await self._endpoint.close()


def import_answers(path: Path, cache: Cache) -> Counter[str]:
    """Put the answers of a batch's output file into the cache; return how many lines came to what.

    A line whose request failed, or whose answer is no chat completion, is counted by its error and not
    kept: the next export holds it again.

    Raises:
        UserError: the file cannot be read, or a line is not a batch answer.
    """
    counts: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST):
                number += 1
                if line.strip():
                    counts[_import(line, f"{path}, line {number}", cache)] += 1
    except OSError as error:
        raise UserError(f"cannot read the answers: {error.strerror}", place=str(path)) from error
    return counts


def _import(line: bytes, place: str, cache: Cache) -> str:
    try:
        answer = json.loads(line)
        key, response = answer["custom_id"], answer.get("response")
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError("custom_id is not one that `ual elicit --export-batch` wrote")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"not an answer of a batch: {error!r}"[:300], place=place) from error
    if not isinstance(response, dict) or response.get("status_code") != 200:
        status = response.get("status_code") if isinstance(response, dict) else None
        return f"failed with {status or 'an error'}"
    try:
        reply = parse(json.dumps(response.get("body")))
    except ValueError:
        return "not a chat completion"
    cache.add(bytes.fromhex(key), reply)
    return "imported"
