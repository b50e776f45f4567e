"""Held-out conversations that are also trained. Contents decide: ids may differ, or be equal by chance."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from ual.config.run import DataConfig, named
from ual.errors import UserError
from ual.records import Message, Sample


class Overlap:
    """Compares held-out samples with training samples, which are added one by one.

    Conversations are compared turn by turn, with their tools, as `contents` writes them. A held-out
    conversation is also found where a training conversation begins with it.

    >>> from ual.records import Message
    >>> turns = Message("user", "2 + 2?"), Message("assistant", "4")
    >>> overlap = Overlap([Sample("1", turns)])
    >>> _ = overlap.add(Sample("another id", turns))
    >>> len(overlap.conversations)
    1
    """

    def __init__(self, held_out: Sequence[Sample]) -> None:
        self._count = len(held_out)
        self._conversations: dict[bytes, Sample] = {}
        self._prompts: dict[bytes, int] = {}
        for sample in held_out:
            prompt, conversation = list(_pairs(sample))[-1]
            self._conversations[conversation] = sample
            self._prompts[prompt] = self._prompts.get(prompt, 0) + 1
        self.conversations: dict[bytes, tuple[Sample, Sample]] = {}  # held out, trained
        self.prompts: set[bytes] = set()

    def add(self, sample: Sample) -> Sample:
        """Compare a training sample, and return it."""
        if self._count:
            for prompt, conversation in _pairs(sample):
                if found := self._conversations.get(conversation):
                    self.conversations.setdefault(conversation, (found, sample))
                if prompt in self._prompts:
                    self.prompts.add(prompt)
        return sample

    def check(self, data: DataConfig) -> list[str]:
        """Return a sentence about prompts that are on both sides with different responses, if there are any.

        Raises:
            UserError: a held-out conversation is also a training sample.
        """
        if self.conversations:
            held_out, trained = next(iter(self.conversations.values()))
            raise UserError(
                f"{len(self.conversations)} held-out conversations are also trained, such as "
                f"{held_out.place}, which is {trained.place}",
                place=f"{named(data.train)} and {named(data.eval or '')}",
                remedy="remove them from one of the files; their ids do not matter",
            )
        shared = sum(self._prompts[prompt] for prompt in self.prompts)
        if not shared:
            return []
        return [
            f"{shared} of {self._count} held-out samples have the prompt of a training sample, with another "
            "response: the metrics of these prompts may be too good."
        ]


def contents(message: Message) -> list[Any]:
    """Return what a message says, so that messages that say the same are equal.

    Runs of white space are one space, characters are in Unicode's form NFC, and calls have no ids.
    """
    calls = [{key: value for key, value in call.items() if key != "id"} for call in message.tool_calls]
    return [message.role, unicodedata.normalize("NFC", " ".join(message.content.split())), *calls]


def _pairs(sample: Sample) -> Iterator[tuple[bytes, bytes]]:
    """Yield, for each assistant turn, a hash of the turns before it and one of the turns through it."""
    digest = hashlib.blake2b(json.dumps(sample.tools).encode(), digest_size=16)
    for message in sample.messages:
        before = digest.digest()
        digest.update(json.dumps(contents(message)).encode())
        if message.role == "assistant":
            yield before, digest.digest()
