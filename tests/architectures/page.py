"""The page docs/architectures.md: every name, whether `fuse` works, and why not."""

import importlib.metadata
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/architectures.md"
CAUSAL_LM, IMAGE_TEXT, ADAPTER = "causal", "image-text", "adapter"
WORKS, REFUSED, WRONG, CRASHES, NOT_BUILT = "works", "refused", "wrong", "crashes", "not compared"


def everything() -> Iterator[tuple[str, str]]:
    """The names of the installed transformers and PEFT. A class of both lists is a causal LM."""
    from tests.architectures import adapters, cases

    yield from ((CAUSAL_LM, name) for name in cases.CAUSAL_LM)
    yield from (
        (IMAGE_TEXT, name)
        for name, class_name in cases.IMAGE_TEXT.items()
        if cases.CAUSAL_LM.get(name) != class_name
    )
    yield from ((ADAPTER, method) for method in adapters.METHODS)


class Results:
    """What was found for each name: (key, outcome, reason); the key is a class, or a place and an order."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[list[str]]] = {}

    def add(self, kind: str, name: str, found: list[list[str]]) -> None:
        self.found[kind, name] = found

    def failures(self) -> list[str]:
        return [
            name for (_, name), found in self.found.items() if any(r[1] in (WRONG, CRASHES) for r in found)
        ]


def write(results: Results) -> None:
    """Replace the generated parts of the page."""
    text = PAGE.read_text()
    parts = {"versions": _versions(), "adapters": _adapters(results)}
    for kind in (CAUSAL_LM, IMAGE_TEXT):
        parts[kind] = _classes(results, kind)
    for part, lines in parts.items():
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        body = "\n".join([begin, *lines, end])
        text, count = re.subn(f"{begin}.*?{end}", lambda _, body=body: body, text, flags=re.DOTALL)
        assert count == 1, part
    PAGE.write_text(text)


def read() -> dict[tuple[str, str], str]:
    """The result of each name as the page has it."""
    text = PAGE.read_text()
    found = {}
    for kind in (CAUSAL_LM, IMAGE_TEXT):
        part = text.split(f"<!-- {kind}: begin -->")[1].split(f"<!-- {kind}: end -->")[0]
        for names, result in re.findall(r"^\| `\w+` \| (.+?) \| (.+) \|$", part, re.MULTILINE):
            found.update({(kind, name): result for name in re.findall(r"`([^`]+)`", names)})
    return found


def shown(outcome: str, reason: str) -> str:
    return f"{outcome}: {reason}".replace("|", r"\|") if reason else outcome


def _versions() -> list[str]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft")]
    return ["", f"Versions: {', '.join(versions)}.", ""]


def _classes(results: Results, kind: str) -> list[str]:
    """A table row for each class and result."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for (of, name), found in results.found.items():
        if of == kind:
            [(class_name, outcome, reason)] = found
            rows[class_name, shown(outcome, reason)].append(f"`{name}`")
            counts[outcome] += 1
    total = ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in (WORKS, REFUSED, WRONG, CRASHES, NOT_BUILT)
    )
    table = [f"| `{c}` | {', '.join(names)} | {result} |" for (c, result), names in sorted(rows.items())]
    return [
        "",
        f"{sum(counts.values())} names: {total}.",
        "",
        "| class | names | result |",
        "|---|---|---|",
        *table,
        "",
    ]


def _adapters(results: Results) -> list[str]:
    lines = ["", "| method | adapter | result |", "|---|---|---|"]
    for (kind, method), found in sorted(results.found.items()):
        if kind != ADAPTER:
            continue
        places: dict[str, list[str]] = defaultdict(list)
        for result, keys in _by_result(found).items():
            for place in dict.fromkeys(key.split(", ")[0] for key in keys):
                orders = [key.split(", ", 1)[1] for key in keys if key.startswith(f"{place},")]
                places[result].append(place if len(orders) == 2 else f"{place} ({orders[0]})")
        lines += [f"| {method} | {', '.join(places[result])} | {result} |" for result in places]
    return [*lines, ""]


def _by_result(found: list[list[str]]) -> dict[str, list[str]]:
    results: dict[str, list[str]] = defaultdict(list)
    for key, outcome, reason in found:
        results[shown(outcome, reason)].append(key)
    return results
