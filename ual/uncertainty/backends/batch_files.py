"""Requests as files for OpenAI's Batch API and `vllm run-batch`, and their answers back into the cache.

Batch files spread elicitation over machines. Export the requests that the cache does not answer, run the
files anywhere, and import the answers. An estimator with several stages needs a round for each stage: the
next export holds the requests that depend on imported answers.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ual.errors import UserError
from ual.files import read_jsonl, writing
from ual.uncertainty import protocol
from ual.uncertainty.backends.completion import error_in, parse
from ual.uncertainty.backends.endpoint import Endpoint
from ual.uncertainty.backends.faults import ServerError, quoted
from ual.uncertainty.cache import Cache
from ual.uncertainty.protocol import Reply, Request, RequestError, Task

_LARGEST = 100 * 2**20  # bytes of one file; OpenAI takes 200 MB
_MOST = 50_000  # requests in one file, OpenAI's limit


class BatchExport:
    """A backend that writes requests to files in a new folder; each request then fails, without an answer."""

    tasks: frozenset[Task] = frozenset({"generate"})

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self.identity: Mapping[str, Any] = endpoint.identity
        self._endpoint, self._folder = endpoint, folder
        self.count, self.files = 0, list[Path]()
        self._written = self._in_file = 0
        with writing("batch files", folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"{folder} is not empty", remedy="name a new folder for the batch files")

    async def __call__(self, request: Request) -> Reply:
        line = json.dumps(
            {
                "custom_id": protocol.key(self.identity, request).hex(),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": self._endpoint.body(request),
            },
            allow_nan=False,
        )
        if not self.files or self._in_file == _MOST or self._written + len(line) > _LARGEST:
            self.files.append(self._folder / f"requests-{len(self.files) + 1:05d}.jsonl")
            self._written = self._in_file = 0
        with writing("batch files", self._folder), self.files[-1].open("a", encoding="utf-8") as file:
            self._written += file.write(line + "\n")
        self._in_file += 1
        self.count += 1
        raise RequestError("exported")

    async def drain(self, seconds: float) -> None:
        """Nothing that was sent is paid for."""

    async def close(self) -> None:
        await self._endpoint.close()


def import_answers(path: Path, cache: Cache) -> Counter[str]:
    """Put the answers of a batch's output file into the cache; return the number of lines by outcome.

    A line whose request failed is counted by its error. An answer that cannot be read is kept, but is no
    reply. The next export holds these requests again.

    Raises:
        UserError: the file cannot be read, or a line is not a batch answer.
    """
    return Counter(_import(answer, f"{path}, line {number}", cache) for number, answer in read_jsonl(path))


def _import(answer: Mapping[str, Any], place: str, cache: Cache) -> str:
    key, response = answer.get("custom_id"), answer.get("response")
    if not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{64}", key):
        raise UserError(
            f"not an answer of a batch: custom_id is {key!r}"[:300],
            place=place,
            remedy="import the output of files that `ual elicit --export-batch` wrote",
        )
    if not isinstance(response, dict) or response.get("status_code") != 200:
        status = response.get("status_code") if isinstance(response, dict) else None
        said = error_in(answer)
        return f"failed with {status or 'an error'}{': ' if said else ''}{said}"
    body = json.dumps(response.get("body"))
    try:
        reply = parse(body)
    except ServerError as error:
        return f"failed with an error: {quoted(error.fault.message)}"
    except ValueError:
        cache.keep_unread(bytes.fromhex(key), body)
        return "not a chat completion"
    cache.add(bytes.fromhex(key), reply)
    return "imported"
