"""Words of documentation, docstrings, comments, messages and `--help` (CONTRIBUTING.md, "Plain English")."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from ual.cli.main import app
from ual.pipelines.quickstart.model import NAME  # a folder on users' disks, which keeps its spelling

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ual", "ual_kernels", "benchmarks", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted(
    path
    for folder in PACKAGES
    for pattern in ("*.py", "*.j2")
    for path in (ROOT / folder).rglob(pattern)
    if path != Path(__file__).resolve()  # quotes what it forbids
)
LONGEST = 30
"""Words in a sentence."""


@dataclass(frozen=True)
class Term:
    """A word that has a better one. In `kernels` only, if the word is good English elsewhere."""

    pattern: str
    better: str
    kernels: bool = False


_MATRIX = (
    r"(?:heads?|lm_head|matrix|matrices|tables?|weights?|embeddings?|adapters?|gradients?|grid|masks?"
    r"|(?-i:[A-Z]\w?)|¤)"
)
TERMS = (
    # "row" stands beside its matrix or table: "rows of the head", "table row", "row-major"
    Term(
        r"(?<!\btable )(?<!\bresult )(?<!\bmatrix )(?<!\bhead )(?<!\bhead's )(?<!\bheader )"
        r"\brows?\b(?!-major\b)(?!-parallel\b)"
        rf"(?! of (?:\w+(?:'s)? ){{0,2}}{_MATRIX}(?![\w-]))",
        "sample (data) or token (kernels); of a matrix or table: 'row of the head', 'table row'",
    ),
    Term(r"\b(?:live|trained|response) (?:tokens?|rows?)\b", "loss token"),
    Term(r"\bfad(?:e|es|ed|ing)\b", "rescale"),
    Term(r"\banchor(?:s|ed|ing)?\b", "reference point"),
    Term(r"\bpoison(?:s|ed|ing|ous)?\b", "NaN mask, make NaN"),
    Term(r"\bkept (?:tokens?|rows?|columns?|samples?)\b", "selected"),
    Term(r"\b(?:il)?legal\b", "valid, invalid"),
    Term(r"\bisolat(?:ion|es?|ed|ing)\b|\bsees? each other\b", "cross-contamination check"),
    Term(r"\bfacts\b", "statistics; in a report: figures"),
    Term(r"\b(?<!log-)(?<!log )odds\b", "log-odds"),
    Term(r"\bgaps?\b", "smoothing term", kernels=True),
    Term(r"\brules?\b", "weight_fn, smoothing_fn", kernels=True),
    Term(r"\bplans?\b", "launch config", kernels=True),
    # the verb; the noun, autograd's leaf tensors, has "the" or "all" before it, or begins a sentence
    Term(r"(?<!\bthe )(?<!\ball )(?<!\bwith )\b(?-i:leaves)\b", "is dropped, returns, keeps"),
    Term(r"\b(?:goes|comes)\b", "is removed, is added, or the exact verb"),
    Term(r"\b(?:go|going|went|gone) on\b", "resume, continue"),
    Term(r"\brewordings?\b", "paraphrase"),
    Term(r"\bmeters?\b", "budget"),
    Term(r"\bverbalis\w+", "verbalized; the estimator's name is `verbalised`"),
    Term(r"\bwhole files?\b", "complete file"),
    Term(r"\b(?:whoever|everybody|nobody)\b", "name the thing: the implementation, the process, the caller"),
    Term(r"\b(?:wears?|wearing|believes?|believed)\b", "has, expects: programs neither wear nor believe"),
)
MODULES = ("given", "asking", "meter", "rewording", "isolation", "seen", "ranks", "zero")
"""Names of modules whose better name is in use."""

_ISE = (
    "categor character custom dequant emphas equal factor final general initial local marginal material "
    "maxim memor minim modular normal optim organ parallel parametr penal priorit quant random real recogn "
    "regular serial special stabil standard summar symbol synchron token util vector visual"
)
BRITISH = re.compile(
    rf"(?:{'|'.join(_ISE.split())})is(?:e|es|ed|er|ers|ing|ation|ations|able)(?![a-z])"
    r"|analys(?:e|ed|er|ing)(?![a-z])"
    r"|(?:behavi|col|fav|flav|hon|neighb|rum)our"
    r"|(?<![a-z])(?:centre|fibre|metre)"
    r"|(?:label|model|travel|signal|total|level|channel)l(?:ed|ing|er)(?![a-z])"
    r"|(?:spel|lear|bur)nt(?![a-z])|misspelt|(?<![a-z])(?:artefact|catalogue|defence|grey|judgement|licence|whilst)",
    re.IGNORECASE,
)
"""In names too. `verbalised`, an estimator's configured name, is not among them."""


# ---- prose ----


@dataclass(frozen=True)
class Prose:
    """Text without what is not prose, one space between words, and the line of every character."""

    text: str
    lines: tuple[int, ...]

    @classmethod
    def of(cls, text: str, line: int = 1) -> "Prose":
        letters: list[str] = []
        lines: list[int] = []
        for letter in text:
            if not letter.isspace():
                letters.append(letter)
                lines.append(line)
            elif letters and letters[-1] != " ":
                letters.append(" ")
                lines.append(line)
            line += letter == "\n"
        return cls("".join(letters), tuple(lines))


def blank(pattern: str, text: str, by: str = "", flags: int = re.NOFLAG) -> str:
    """`text` with every match replaced by `by` and as many line ends as the match has."""
    return re.sub(pattern, lambda m: by + "\n" * m[0].count("\n"), text, flags=flags)


def without_names(text: str) -> str:
    """Code spans, flags, paths, dotted names, `key=value` and fields become ¤: names, not prose."""
    text = blank(r"``.+?``|`[^`]+`", text, "¤", re.DOTALL)
    text = blank(r"\{[^{}\n]*\}|%\(\w+\)\w", text, "¤")
    text = blank(r"(?<!\w)--?[a-z][\w-]*", text, "¤")
    text = blank(r"\b\w+=\S*", text, "¤")
    return blank(r"[\w./-]*\w\.(?!\d)\w+", text, "¤")


def page(text: str) -> str:
    """Markdown without code blocks, comments, link targets and generated tables. Lines keep their numbers."""
    text = blank(r"<!-- ([^>]*): begin -->.*?<!-- \1: end -->", text, flags=re.DOTALL)
    text = blank(r"<!--.*?-->", text, flags=re.DOTALL)
    text = blank(r"^( *)```.*?^\1```[ ]*$", text, flags=re.DOTALL | re.MULTILINE)
    text = blank(r"(?<=\n\n)(?:    [^\n]*\n|\n(?=    ))+", text)  # an indented block
    return blank(r"(?<=\])\([^)\s]+\)", text)


def template(text: str) -> str:
    """The text that a Jinja template shows, and its comments."""
    for pattern in (r"<style.*?</style>", r"<script.*?</script>", r"\{%.*?%\}"):
        text = blank(pattern, text, flags=re.DOTALL)
    text = blank(r"\{\{.*?\}\}", text, "¤", re.DOTALL)
    return blank(r"<[^>]*>", text.replace("{#", "  ").replace("#}", "  "), " ")


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Comments with their first line; comments on consecutive lines are one."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield first, "\n".join(block)
            block = []
        last = token.start[0]
        first = first if block else last
        block.append(token.string.lstrip("#!: "))
    if block:
        yield first, "\n".join(block)


def literals(node: ast.AST, inside: bool = False) -> Iterator[tuple[int, str]]:
    """Docstrings and other literals of more than one word. The marks of mutants quote code: left out."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "kills":
        return
    text = ""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "¤" for part in node.values]
        text = "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not inside:
        text = node.value
    if re.search(r"\S\s+\S", text):
        text = blank(r"^\s*(?:>>>|\.\.\.|python|pytest|torchrun|deepspeed) .*$", text, flags=re.MULTILINE)
        yield node.lineno, blank(r"^[ ]+\w+:(?=[ ])", text, flags=re.MULTILINE)  # an argument's name
    for child in ast.iter_child_nodes(node):
        yield from literals(child, inside=isinstance(node, ast.JoinedStr))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def prose(path: Path) -> list[Prose]:
    """The prose of a page, a template or a source file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = [*comments(text), *literals(tree(path))]
    else:
        found = [(1, page(text) if path.suffix == ".md" else template(text))]
    return [Prose.of(without_names(words), line) for line, words in found]


# ---- terms ----


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def in_kernels(path: Path) -> bool:
    return named(path).startswith(("ual_kernels/", "tests/kernels/", "docs/kernels.md"))


def offences(path: Path) -> list[str]:
    terms = [term for term in TERMS if in_kernels(path) or not term.kernels]
    return [
        f"{named(path)}:{part.lines[match.start()]}: {match[0]!r}; better: {term.better}"
        for part in prose(path)
        for term in terms
        for match in re.finditer(term.pattern, part.text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=named)
def test_terms_are_the_fields(path: Path) -> None:
    found = offences(path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_has_an_old_name(name: str) -> None:
    assert not [named(path) for path in SOURCES if path.stem == name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("every row is a sample; rows of 4 tokens; per-row smoothing", ["row", "rows", "row"]),
        (
            "rows of the head, a row of C, the head's rows, row-major, table row, `row`, --rows, rows.jsonl",
            [],
        ),
        ("rows of a model; a row of\nits weight matrix", ["rows"]),
        ("trained\n    tokens", ["trained tokens"]),
        ("in fact; the facts; log-odds; odds of 3", ["facts", "odds"]),
        ("the test goes on; it leaves 1; the leaves; Leaves of a tree; a gap", ["goes", "leaves"]),
    ],
)
def test_what_a_term_is(text: str, words: list[str]) -> None:
    part = Prose.of(without_names(text))
    found = sorted(
        (match.start(), match[0])
        for term in TERMS
        if not term.kernels
        for match in re.finditer(term.pattern, part.text, re.IGNORECASE)
    )
    assert [word for _, word in found] == words


# ---- spelling ----


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=named)
def test_the_spelling_is_american(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{named(path)}:{number}: {match[0]!r}"
        for number, line in enumerate(lines, 1)
        for match in BRITISH.finditer(line.replace(NAME, ""))
    ]
    assert not found, "\n".join(found)


# ---- sentences ----


def blocks(text: str) -> Iterator[Prose]:
    """Paragraphs, headings and list items of a page. A table is none of them."""
    start, block = 1, list[str]()
    for number, line in enumerate([*page(text).split("\n"), ""], 1):
        item = re.match(r"\s*(?:[-*+]|\d+\.)\s+|#+ ", line)
        if item or not line.strip() or line.lstrip().startswith("|"):
            if block:
                yield Prose.of("\n".join(block), start)
            block = []
            line = line[item.end() :] if item else ""
        if line:
            start = start if block else number
            block.append(line)


def long_sentences(part: Prose) -> Iterator[tuple[int, int, str]]:
    """Line, number of words and text of each sentence above the limit. A code span is one word."""
    spans = re.sub(r"`[^`]+`", lambda m: "`" + "x" * (len(m[0]) - 2) + "`", part.text)
    ends = [
        m.end() for m in re.finditer(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bal)[.!?]['\")*_]*(?= |$)", spans)
    ]
    begin = 0
    for end in [*ends, len(spans)]:
        words = sum(any(letter.isalnum() for letter in word) for word in spans[begin:end].split())
        if words > LONGEST:
            at = begin + (spans[begin] == " ")
            yield part.lines[at], words, part.text[at:end]
        begin = end


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_sentences_are_short(path: Path) -> None:
    found = [
        f"{named(path)}:{line}: {words} words: {sentence}"
        for part in blocks(path.read_text(encoding="utf-8"))
        for line, words, sentence in long_sentences(part)
    ]
    assert not found, "\n".join(found)


def long_help(text: str) -> list[str]:
    """Sentences above the limit; what is shown as it stands, configurations and examples, has none."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.lstrip("\n ").startswith("\b")]
    plain = [Prose.of(re.sub(r"\[/?\w+\]", "", paragraph)) for paragraph in paragraphs]
    return [f"{words} words: {sentence}" for part in plain for _, words, sentence in long_sentences(part)]


def commands() -> dict[str, Any]:
    """Every command of `ual`, by its name."""
    found: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("ual", typer.main.get_command(app))]
    while todo:
        name, command = todo.pop()
        found[name] = command
        todo += [(f"{name} {word}", child) for word, child in getattr(command, "commands", {}).items()]
    return found


COMMANDS = commands()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_sentences_of_a_command_are_short(name: str) -> None:
    command = COMMANDS[name]
    texts = [command.help, command.epilog, *(getattr(option, "help", None) for option in command.params)]
    found = [long for text in texts if text for long in long_help(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", PACKAGES)
def test_sentences_of_options_are_short(folder: str) -> None:
    """Those of argparse too: every `help=` that is a literal."""
    found = [
        f"{named(path)}:{node.value.lineno}: {long}"
        for path in SOURCES
        if path.suffix == ".py" and named(path).startswith(f"{folder}/")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword) and node.arg == "help"
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for long in long_help(node.value.value)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (f"{'word ' * 30}. {'word ' * 31}.\nShort.", [31]),
        (f"- {'word ' * 20}\n- {'word ' * 20}\n\n| {'word ' * 40} |\n\n```\n{'word ' * 40}\n```\n", []),
        (f"[{'word ' * 16}](docs/a.md) `{'word ' * 20}` 0.5 e.g. {'word ' * 13} = ", [32]),
        (f"Text:\n\n    {'word ' * 40}\n\n{'word ' * 15}\n{'word ' * 16}", [31]),
    ],
)
def test_what_a_sentence_is(text: str, counts: list[int]) -> None:
    assert [words for part in blocks(text) for _, words, _ in long_sentences(part)] == counts
