"""The decision token of a sample: the first one at which its options differ.

Each option is rendered and tokenized as the response of the sample, with the chat template and the merges
across the start of the response that training has. The tokens before the decision are equal for all options.
At the decision, each option has a token of its own.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ual.data.schema import show
from ual.errors import UserError


class UndecidedError(UserError):
    """The options of a sample have no decision token."""


class Token(NamedTuple):
    """A token of a rendered sample, whether it is trained, and where its characters start."""

    id: int
    trained: bool
    start: int


class Rendering(NamedTuple):
    """The tokens of a sample, and the end of its response among the characters of the text."""

    tokens: Sequence[Token]
    end: int


class Decision(NamedTuple):
    """The position of the decision token, and the token of each option there, in the order of the options."""

    position: int
    ids: tuple[int, ...]


def find(renderings: Mapping[str, Rendering], place: str = "") -> Decision:
    """Return the decision of a sample.

    Args:
        renderings: at least two options, each with the sample as it is with this response.
        place: of the sample, for errors.

    Raises:
        UndecidedError: two options share the token at the first position where options differ; an option ends
            there, because it is a prefix of another; or the token there is not trained.
    """
    columns = itertools.zip_longest(*(rendering.tokens for rendering in renderings.values()))
    for position, column in enumerate(columns):
        if len({token and token.id for token in column}) > 1:
            there = dict(zip(renderings, column, strict=True))
            _check(there, renderings, place)
            return Decision(position, tuple(token.id for token in column))
    raise _refused(f"{_named(list(renderings))} are rendered to the same tokens", place)


def _check(there: Mapping[str, Token | None], renderings: Mapping[str, Rendering], place: str) -> None:
    for option, token in there.items():
        if token is None or token.start >= renderings[option].end:
            longer = [other for other in there if other != option]
            longer = [other for other in longer if other.startswith(option)] or longer
            raise _refused(f"the option {show(option)} is a prefix of {show(longer[0])}, in tokens", place)
    for option, token in there.items():
        assert token is not None
        same = [other for other, its in there.items() if its is not None and its.id == token.id]
        if len(same) > 1:
            raise _refused(f"{_named(same)} share their first differing token", place)
        if not token.trained:
            said = f"the first token where options differ is not a loss token in the option {show(option)}"
            raise _refused(f"{said}, since it belongs to the prompt", place)


def _named(options: Sequence[str]) -> str:
    *before, last = map(show, options)
    return f"the options {', '.join(before)} and {last}"


def _refused(problem: str, place: str) -> UndecidedError:
    return UndecidedError(
        problem,
        place=place,
        remedy="write the options so that all of them differ at one token, as (A), (B) and (C) do, or remove "
        'the sample, or set data.invalid to "drop"',
    )


def spread(options: Mapping[str, float], smoothing: float, over: str) -> dict[str, float]:
    """Return each option's probability as the target, of which `smoothing` may be spread over the options."""
    share = smoothing if over == "options" else 0.0
    return {text: (1 - share) * p + share / len(options) for text, p in options.items()}
