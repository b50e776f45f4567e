"""Answers of models to instructions, as files in AlpacaEval's format: read, and matched in pairs.

A file is a JSON list of objects with "instruction", "output", "generator" and perhaps "dataset".
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ual.errors import UserError

_SHOWN = 3  # instructions that an error names


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction with the answers of model and reference."""

    instruction: str
    dataset: str | None
    model: str
    reference: str


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """Return the answers of one generator, in AlpacaEval's format.

    Raises:
        UserError: the file cannot be read, is not in this format, has an instruction twice, or has answers of
            several generators.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read the answers: {error}", place=str(path), remedy="expected a JSON list of objects"
        ) from error
    if not isinstance(records, list) or not records:
        raise UserError(
            f"expected a JSON list of one object or more, got {type(records).__name__}", place=str(path)
        )
    for number, record in enumerate(records, start=1):
        given = record if isinstance(record, dict) else {}
        for name in ("instruction", "output", "generator"):
            if not isinstance(given.get(name), str):
                raise UserError(
                    f"expected an object with a text `{name}`, got {json.dumps(record)[:100]}",
                    place=f"{path}, object {number}",
                )
    twice = [text for text, count in Counter(r["instruction"] for r in records).items() if count > 1]
    if twice:
        raise UserError(f"{_named(twice)} more than once", place=str(path), remedy="keep one answer to each")
    generators = {record["generator"] for record in records}
    if len(generators) > 1:
        raise UserError(
            f"answers of several generators: {', '.join(sorted(generators)[:5])}",
            place=str(path),
            remedy="write a file for each generator",
        )
    return records


def pairs(model: Path, reference: Path, limit: int | None = None) -> tuple[tuple[str, str], list[Pair]]:
    """Return the names of model and reference, and their answers in the order of the model's file.

    Args:
        model, reference: files of answers.
        limit: only the first instructions of the model's file, >= 1.

    Raises:
        UserError: as `read_outputs`; or an instruction is in one file only.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    answers, others = read_outputs(model), read_outputs(reference)
    by_instruction = {other["instruction"]: other for other in others}
    asked = {answer["instruction"] for answer in answers}
    for missing, place in (
        ([text for text in asked if text not in by_instruction], reference),
        ([text for text in by_instruction if text not in asked], model),
    ):
        if missing:
            raise UserError(
                f"there is no answer to {_named(sorted(missing))}",
                place=str(place),
                remedy="both files must answer the same instructions",
            )
    found = [
        Pair(
            answer["instruction"],
            answer.get("dataset"),
            answer["output"],
            by_instruction[answer["instruction"]]["output"],
        )
        for answer in answers[:limit]
    ]
    return (answers[0]["generator"], others[0]["generator"]), found


def _named(instructions: Sequence[str]) -> str:
    shown = ", ".join(repr(text[:60]) for text in instructions[:_SHOWN])
    more = len(instructions) - _SHOWN
    return f"{len(instructions)} instructions: {shown}" + (f" and {more} more" if more > 0 else "")
