"""Every command, snippet and configuration of README, docs and `--help` is run or parsed.

Commands that need a cluster, the hub, a GPU or minutes are parsed, each by its own parser.
"""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from rich.text import Text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.test_prose import commands
from tests.ual.runs import ENVIRONMENT, configure, write_rows
from ual.cli.main import app
from ual.config import base, elicit, evaluate, experiment, weak_to_strong
from ual.config import run as configuration
from ual.data.tasks import Task

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("ual", "make", "pip", "pytest", "python", "torchrun", "deepspeed", "accelerate", "hf")
PARSED = (
    "ual quickstart",
    "ual publish",
    "ual elicit figures/",
    "ual w2s sciq/",
    "ual evaluate runs/",
    "ual evaluate base=",
)
"""Beginnings of `ual` commands that need minutes, the hub, or what a study writes."""
ROWS = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 10}
    for i in range(12)
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the line that it begins in."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"])
        for found in re.finditer(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if found["language"] in languages
    ]


def lines(text: str) -> list[str]:
    """The commands of a shell block, without comments and line continuations."""
    joined = text.replace("\\\n", " ").splitlines()
    return [
        " ".join(shlex.quote(word) for word in words)
        for line in joined
        if (words := shlex.split(line, comments=True))
    ]


def shown(command: Any) -> list[str]:
    """The commands that an epilog shows; two spaces begin the explanation beside a command."""
    plain = Text.from_markup(command.epilog or "").plain
    return [re.split(r"  +", line.strip())[0] for line in plain.splitlines() if line.startswith("  ual ")
            or line.startswith(tuple(f"  {p} " for p in PROGRAMS))]  # fmt: skip


def every(of: Callable[[Path], list[Any]]) -> list[Any]:
    return [item for page in PAGES for item in of(page)]


# ---- how each program is checked ----


class ParsedError(Exception):
    """Raised in place of the work that follows the parsing of arguments."""


def parse_ual(words: list[str]) -> None:
    """Parse a command of `ual` without running it, and its overrides if it has some."""
    command: Any = typer.main.get_command(app)
    name, *rest = words
    if rest and rest[0].startswith("-"):
        assert rest[0] in {option for parameter in command.params for option in parameter.opts}, words
        return
    while hasattr(command, "commands"):
        if rest and rest[0] in command.commands:
            name, *rest = rest
        elif "run" in command.commands:  # `ual elicit config.yaml`
            name = "run"
        else:
            raise AssertionError(f"no command {' '.join(words)}")
        command = command.commands[name]
    with command.make_context(name, rest) as context:
        for override in context.params.get("overrides") or []:
            assert re.match(r"[a-z_]+(\.[a-z_]+)*=", override), override


def parse_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of `python -m module`."""
    if module == "ual":
        return parse_ual(["ual", *words])
    if module == "benchmarks":
        from benchmarks.__main__ import app as benchmarks

        command: Any = typer.main.get_command(benchmarks)
        command.commands[words[0]].make_context(words[0], words[1:])
        return None
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, words if args is None else args, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [module, *words])
    found = importlib.import_module(module)
    entry = importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found
    with pytest.raises(ParsedError):
        entry.main()
    return None


def parse_launcher(words: list[str]) -> None:
    """Parse a launcher's arguments by the launcher's own parser, and what it starts."""
    program, *rest = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        assert given.module
        script, rest = given.training_script, given.training_script_args
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        given = parse_args(rest)
        assert given.module
        script, rest = given.user_script, given.user_args
    else:
        from accelerate.commands.launch import launch_command_parser

        assert rest.pop(0) == "launch"
        given = launch_command_parser().parse_args(rest)
        assert given.module
        script, rest = given.training_script, given.training_script_args
    assert script == "ual"
    parse_ual(["ual", *rest])


def parse_pip(words: list[str]) -> None:
    """Check that requirements are written correctly, and that extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[:2] == ["pip", "install"]
    rest = iter(words[2:])
    for word in rest:
        if word in ("--target", "-t", "--constraint"):
            next(rest)
        elif not word.startswith("-"):
            found = Requirement(word.replace(".", "ual-kernels", 1) if word.startswith(".") else word)
            if found.name == "ual-kernels":
                assert found.extras <= set(extras), word


def parse_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", makefile, re.MULTILINE), word


def collect(words: list[str]) -> None:
    """Let pytest collect benchmarks, which are not measured. Tests are collected by the run of this one."""
    paths = [ROOT / word for word in words[1:] if "/" in word]
    assert paths
    assert all(path.exists() for path in paths)
    if ROOT / "tests" in paths[0].parents:
        return
    done = subprocess.run(
        [sys.executable, "-m", *words, "--collect-only", "-q"],
        cwd=ROOT, env={name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTEST_")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+(/\d+)? tests? collected", done.stdout, re.MULTILINE), done.stdout


def parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    if words[0] == "ual":
        parse_ual(words)
    elif words[0] in ("torchrun", "deepspeed", "accelerate"):
        parse_launcher(words)
    elif words[0] == "make":
        parse_make(words)
    elif words[0] == "pip":
        parse_pip(words)
    elif words[0] == "pytest":
        collect(words)
    elif words[:2] == ["python", "-m"]:
        parse_module(words[2], words[3:], monkeypatch)
    elif words[:2] == ["python", "-c"]:
        done = subprocess.run([sys.executable, *words[1:]], env=ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        assert words[0] in PROGRAMS, f"unknown program: {line}"


# ---- commands ----


def place(folder: Path, stories: Path) -> None:
    """Write what the pages' commands read: samples, answers, and configurations of a tiny model."""
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "epoch"}
    data = {"eval_fraction": 0.2}
    path = configure(folder, stories, ROWS, training=training, data=data, output_dir="runs/first")
    one = yaml.safe_load(path.read_text())
    path.replace(folder / "train.yaml")
    one.pop("output_dir")
    arms = {"sft": {"loss": "sft"}, "ual": {}}
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"base": one, "arms": arms, "seeds": [1]}))
    of = {"model": str(stories), "data": {"chat_template": "plain"}, "training": training}
    words = {"kind": "words", "question": "prompt", "words": ["yes", "no"], "gold": "completion"}
    words |= {"prompt": "{{ question }} {{ options | map(attribute='text') | join(' or ') }}?"}
    (folder / "task.yaml").write_text(yaml.safe_dump(words))
    odd = [{"prompt": f"Is {i} odd?", "completion": "yes" if i % 2 else "no"} for i in range(24)]
    files = {"train": str(write_rows(folder / "odd.jsonl", odd[:16]))}
    files |= {"test": str(write_rows(folder / "more.jsonl", odd[16:]))}
    w2s = {"task": str(folder / "task.yaml"), "data": files, "weak": of, "strong": of, "ask": {"times": 2}}
    w2s |= {"arms": ["naive", "filter"], "seeds": [1]}
    (folder / "study.yaml").write_text(yaml.safe_dump(w2s))
    tasks = {"odd": {"task": str(folder / "task.yaml"), "data": files["test"]}}
    asked_of = {"models": {"base": str(stories)}, "chat_template": "plain", "tasks": tasks, "resamples": 100}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(asked_of))
    backend = {"kind": "local", "model": str(stories), "chat_template": "plain"}
    asked = {"data": "asked.jsonl", "backend": backend, "estimators": ["p_true"], "output_dir": "runs/asked"}
    (folder / "elicit.yaml").write_text(yaml.safe_dump(asked))
    write_rows(folder / "asked.jsonl", ROWS[:3])
    sums = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    write_rows(folder / "test.jsonl", sums)
    write_rows(folder / "answers.jsonl", [{"question": "6 x 7?", "answers": ["42", "42", "41"]}])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.slow
def test_shell_commands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In one folder, in their order. `config.yaml` is the configuration of the command that reads it."""
    found = [(str(block), line) for block in blocks(page, "sh", "bash") for line in lines(block.text)]
    if any(line.startswith("ual ") for _, line in found):
        place(tmp_path, request.getfixturevalue("stories"))
        monkeypatch.chdir(tmp_path)
    for where, line in found:
        if not line.startswith("ual ") or line.startswith(PARSED):
            parse(line, monkeypatch)
            continue
        kind = "elicit" if line.startswith("ual elicit") else "train"
        (tmp_path / "config.yaml").write_text((tmp_path / f"{kind}.yaml").read_text())
        if "deepspeed=" in line:  # what joins a process group has a process of its own
            command = [sys.executable, "-m", *shlex.split(line)]
            path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            done = subprocess.run(
                command,
                env=ENVIRONMENT | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            code, said = done.returncode, done.stdout + done.stderr
        else:
            result = CliRunner().invoke(app, shlex.split(line)[1:])
            code, said = result.exit_code, result.output
        assert code == 0, f"{where}: {line}\n{said}"


INLINE = every(
    lambda page: [
        span
        for span in re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        )
        if span.split()[0] in PROGRAMS and len(span.split()) > 1
    ]
)


@pytest.mark.parametrize("line", sorted(set(INLINE)))
def test_commands_within_sentences(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        parse(line, monkeypatch)
    except typer.Exit:
        assert line.endswith("--help")
    except (typer.BadParameter, SystemExit):  # the name of a command, without its arguments
        assert not re.search(r" -(?!m )", line)
        with pytest.raises((typer.Exit, SystemExit)) as end:
            parse(f"{line} --help", monkeypatch)
        assert getattr(end.value, "exit_code", 0) == getattr(end.value, "code", 0) == 0


EXAMPLES = sorted({line for command in commands().values() for line in shown(command)})


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_of_help(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(line, monkeypatch)


def test_what_is_found() -> None:
    """The collection itself: a page that is not read would pass."""
    assert "ual train config.yaml" in {
        line for b in blocks(ROOT / "README.md", "sh") for line in lines(b.text)
    }
    assert "ual merge runs/first -o merged" in INLINE
    assert "ual train config.yaml --dry-run" in EXAMPLES
    assert lines("a \\\n  'b c'   # d\n\n# e\nf") == ["a 'b c'", "f"]


@pytest.mark.parametrize(
    "line",
    ["ual trian config.yaml", "ual train config.yaml --resme", "ual train config.yaml deepspeed zero3",
     "torchrun --nprocs 8 -m ual train config.yaml", "torchrun -m ual trian config.yaml",
     "deepspeed --gpus 2 --module ual train config.yaml", "make tests", "make bench SHAPE=full", "frobnicate",
     "pip install 'ual-kernels[trian]'", "pytest benchmarks/suits", "python -m benchmarks reprot",
     "python -m benchmarks.gpu prove", "python -m benchmarks.studies.none", "python -c 'import none'"],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)):
        parse(line, monkeypatch)


# ---- configurations ----


def schema_of(raw: dict[str, Any]) -> type[base.CommandConfig]:
    if "models" in raw:
        return evaluate.EvaluateConfig
    if "weak" in raw:
        return weak_to_strong.WeakToStrongConfig
    if "arms" in raw:
        return experiment.ExperimentConfig
    return elicit.ElicitConfig if {"backend", "estimators"} & set(raw) else configuration.RunConfig


@pytest.mark.parametrize("block", every(lambda page: blocks(page, "yaml")), ids=str)
def test_configurations(block: Block) -> None:
    """A part of a configuration is completed by a model, samples and a folder."""
    raw = yaml.safe_load(block.text)
    if "question" in raw:
        Task.model_validate(raw)
        return
    schema = schema_of(raw)
    whole = {"model": "m", "data": "rows.jsonl"} if schema is configuration.RunConfig else {}
    if set(raw) <= set(configuration.DataConfig.model_fields) - {"format"}:
        raw = {"data": raw}
    base.parse_as(schema, {"output_dir": "runs/x"} | base.merged(whole, raw), place=str(block))


def test_the_first_configuration_is_short() -> None:
    (block,) = blocks(ROOT / "README.md", "yaml")
    run = configuration.parse(yaml.safe_load(block.text))
    assert (run.smoothing.max, run.lora and run.lora.r, run.uncertainty.estimator) == (0.2, 16, "white_box")
    assert len(block.text.splitlines()) <= 10


# ---- Python ----


@pytest.fixture
def names(stories: Path) -> dict[str, Any]:
    """What the snippets use: tensors of a batch, a head, a model."""
    return {
        "hidden": torch.randn(2, 5, 8, requires_grad=True),
        "labels": torch.randint(11, (2, 5)),
        "lm_head": torch.nn.Linear(8, 11),
        "smoothing": torch.tensor([0.0, 0.2]),
        "weight": torch.ones(2),
        "model": AutoModelForCausalLM.from_pretrained(stories),
        "teacher": AutoModelForCausalLM.from_pretrained(stories),
        "student": AutoModelForCausalLM.from_pretrained(stories),
        "ids": torch.randint(3, 512, (2, 5)),
    }


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, for snippets about sharded models. Another test may have made it."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_python_snippets(
    page: Path, names: dict[str, Any], one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        if isinstance(loss := names.get("loss"), torch.Tensor):
            assert loss.isfinite()
            assert loss.requires_grad


# ---- links ----


def headings(page: Path) -> set[str]:
    """What links to a page's headings name, as GitHub makes it."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "DESIGN.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link
