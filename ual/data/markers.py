"""Where a turn ends: end-of-turn markers, and the tokens that stop generation."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from ual.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Markers:
    """The added tokens of a tokenizer, as they are written, and its stop tokens.

    Attributes:
        stop_ids: tokens that stop generation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]) -> None:
        self.stop_ids = frozenset(stop_ids)
        self._stops = frozenset(filter(None, tokenizer.convert_ids_to_tokens(sorted(stop_ids))))
        self._words = self._stops | set(tokenizer.get_added_vocab())
        self._lengths = sorted({len(word) for word in self._words}, reverse=True)
        longest_first = sorted(self._words, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def any_in(self, text: str) -> bool:
        """Return whether the text contains a marker."""
        return len(self._split(text)) > 1

    def stops(self, text: str) -> bool:
        """Return whether the text contains a stop token."""
        return not self._stops.isdisjoint(self._split(text))

    def trailing(self, text: str) -> str:
        """Return the markers and the white space at the end of the text."""
        start = length = len(text)
        while length:
            start = len(text[:start].rstrip())
            length = next(
                (n for n in self._lengths if n <= start and text[start - n : start] in self._words), 0
            )
            start -= length
        return text[start:]

    def shared(self, closing: str, text: str) -> str:
        """Return the part of `closing` that the text begins with, in complete markers.

        A template may write more at the end of the conversation than between turns.
        """
        matched = ""
        for piece in self._split(closing):
            if not text.startswith(matched + piece):
                break
            matched += piece
        return matched

    def end(self, closing: str) -> int:
        """Return the length of what is trained of the text after a response: through the first stop token.

        Without a stop token, all is trained but the white space at its end.
        """
        length = 0
        for i, piece in enumerate(self._split(closing)):
            length += len(piece)
            if i % 2 and piece in self._stops:
                return length
        return len(closing.rstrip())

    def end_of_block(self, block: str, message: Message) -> int:
        """Return the length of what is trained of a ``{% generation %}`` block.

        White space after a marker is not trained, and nothing after a stop token is. Both are of the
        template: the message's own are after its content.
        """
        said = message.content.strip()
        closing = self.trailing(block[block.find(said) + len(said) :] if said in block else block)
        return len(block) - len(closing) + (self.end(closing) if self.any_in(closing) else len(closing))
