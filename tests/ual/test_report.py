"""The page: built from real run folders, parsed back, and held to what it says."""

import base64
import copy
import io
import json
import os
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ual.config import run as configuration
from ual.config.base import dump
from ual.errors import UserError
from ual.evaluate import Evaluation, TokenMetrics
from ual.report import findings, write
from ual.runs.read import read

HEADLINE = ("nll", "perplexity", "accuracy", "ece", "brier")
SECTIONS = ("results", "figures", "sources", "examples", "reproduce")
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}
COMMAND = ["ual", "train", "my config.yaml", "loss=ual", "name=it's $HOME; rm -rf 'x'"]
EVIL = "<script>alert(1)</script>\" onerror=\"alert(2)' autofocus onfocus='alert(3)"


class Page(HTMLParser):
    """Every tag with its attributes, every text with the tags around it; refuses tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, tag: str) -> str:
        return "\n".join(text for around, text in self.texts if tag in around)

    def blocks(self, *around: str) -> list[str]:
        """Return the texts whose innermost tags are these."""
        return [text for tags, text in self.texts if tags[-len(around) :] == around]

    @property
    def text(self) -> str:
        return " ".join(self.inside("body").split())


def evaluation(rng: np.random.Generator, *, rows: int, nll: float, boldness: float) -> Evaluation:
    metrics = TokenMetrics()
    for row in range(rows):
        confidence = rng.beta(2, 1, size=30)
        correct = rng.uniform(size=30) < confidence * (1 - boldness)
        source = ("arithmetic", "open-ended")[row % 2]
        metrics.update(source, rng.exponential(nll, 30), confidence, correct)
    return metrics.result()


def build(
    folder: Path,
    kind: str = "ual",
    *,
    seed: int = 42,
    steps: int = 40,
    held_out: int = 20,
    nll: float = 1.6,
    boldness: float = 0.1,
    change: Callable[[dict[str, Any]], None] = lambda files: None,
) -> Path:
    """Write a run folder as `ual train` does; `change` may alter what is about to be written."""
    rng = np.random.default_rng(7)
    n = 24
    uncertainty = rng.permutation(n) / n + 0.25
    smoothing = {"sft": np.zeros(n), "uniform": np.full(n, 0.1), "ual": 0.2 * (uncertainty - 0.25)}[kind]
    known = kind == "ual"
    before = evaluation(rng, rows=held_out, nll=2.4, boldness=0.25)
    after = evaluation(rng, rows=held_out, nll=nll, boldness=boldness)
    losses = 3 * np.exp(-np.arange(steps) / steps) + rng.normal(0, 0.05, steps)
    files: dict[str, Any] = {
        "config.yaml": configuration.parse(
            {
                "name": folder.name,
                "model": "models/SmolLM2-135M-Instruct",
                "data": {"train": "data/train.jsonl", "eval": "data/eval.jsonl"},
                "output_dir": str(folder),
                "loss": kind,
                "uncertainty": "white_box",
                "smoothing": {"match_mean": 0.1},
                "training": {"max_steps": steps, "learning_rate": 5e-4},
            }
        ),
        "environment.json": {
            "command": COMMAND,
            "created": "2026-11-21T22:59:48+00:00",
            "versions": {"ual-kernels": "0.1.0", "torch": "2.13.0"},
            "python": "3.11.7",
            "machine": {"processor": "AMD EPYC", "cores": 2, "memory_gib": 23.6, "gpu": None},
            "git_commit": "135d12f0a1b2c3d4e5f60718293a4b5c6d7e8f90",
            "seed": seed,
            "data_sha256": {"data/train.jsonl": "85c6e71683558332"},
            "model": {"path": "models/SmolLM2-135M", "parameters": 134515008, "trainable_parameters": 921600},
        },
        "history.jsonl": [
            {"step": i + 1, "loss": float(loss), "tokens_per_second": 150.0} for i, loss in enumerate(losses)
        ]
        + [{"step": steps, "eval_loss": 1.5}],
        "samples.jsonl": [
            {
                "id": f"row-{i}",
                "source": ("arithmetic", "open-ended")[i % 2],
                "uncertainty": float(uncertainty[i]) if known else None,
                "scaled_uncertainty": float(uncertainty[i] - 0.25) if known else None,
                "label_smoothing": float(smoothing[i]),
                "sample_weight": 1.0,
                "response_tokens": 30,
                "prompt": f"Question {i}?",
                "response": f"Answer {i}.",
            }
            for i in range(n)
        ],
        "evaluation.json": {"before": before, "after": after},
        "held_out.jsonl": [
            {
                "id": f"held-{i}",
                "source": "all",
                "tokens": 30,
                "nll": nll + 0.01 * i,
                "accuracy": 0.5,
                "confidence": 0.6,
            }
            for i in range(held_out)
        ],
        "metrics.json": {
            "name": folder.name,
            "loss_kind": kind,
            "steps": steps,
            "train_loss_first": float(losses[0]),
            "train_loss_last": float(losses[-1]),
            "seconds": 312.4,
            "tokens_per_second": 154.2,
            "mean_smoothing": float(smoothing.mean()),
            "trained_rows": n,
            "trained_tokens": 7200,
            "eval": {key: after[key] for key in HEADLINE},  # type: ignore[literal-required]
            "eval_before": {key: before[key] for key in HEADLINE},  # type: ignore[literal-required]
            "status": "completed",
        },
    }
    files = copy.deepcopy(files)
    change(files)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if name == "config.yaml":
            text = dump(content) if isinstance(content, configuration.RunConfig) else content
        elif isinstance(content, list):
            text = "".join(json.dumps(row) + "\n" for row in content)
        else:
            text = json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build(tmp_path / "runs" / "ual")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A run and its page, to look at only."""
    folder = build(tmp_path_factory.mktemp("one") / "ual")
    return folder, Page(write([folder]))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Page]:
    """Three arms and the page that compares them, to look at only; the first has a page of its own."""
    runs = tmp_path_factory.mktemp("three")
    arms = [
        build(runs / "sft", "sft", nll=1.6, boldness=0.2),
        build(runs / "uniform", "uniform", nll=1.7, boldness=0.1),
        build(runs / "ual", "ual", nll=1.8, boldness=0.02),
    ]
    write(arms[:1])
    assert write(arms) == runs / "comparison.html"
    return arms, Page(runs / "comparison.html")


def check_page(page: Page, sections: tuple[str, ...] = SECTIONS) -> None:
    """What holds for every page: it stands alone, runs nothing, and its pictures are pictures."""
    policies = [tag for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert [p["content"] for p in policies] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "svg"}
        assert not any(name.startswith("on") for name in attributes)
        assert not {"srcset", "poster", "data", "action"} & set(attributes)
        for name in {"src", "href"} & set(attributes):
            assert attributes[name].startswith("data:") or tag == "a"
            assert ":" not in attributes[name] or attributes[name].startswith("data:")
    style = "".join(text for around, text in page.texts if "style" in around)
    assert "url(" not in style
    assert "@import" not in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert set(sections) <= set(ids)
    assert len(ids) == len(set(ids))
    for image in page.all("img"):
        assert image["alt"]
        kind, content = image["src"].split(";base64,")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(content)).tag == "{http://www.w3.org/2000/svg}svg"


# ---- one run ----


def test_page_of_one_run(written: tuple[Path, Page]) -> None:
    run, page = written
    check_page(page)
    assert (run / "report.html").read_text(encoding="utf-8") == page.source
    assert len(page.all("img")) == 4
    assert {p.name for p in (run / "plots").iterdir()} == {
        "loss.png", "reliability.png", "uncertainty.png", "smoothing.png",
    }  # fmt: skip
    for picture in (run / "plots").iterdir():
        image = Image.open(io.BytesIO(picture.read_bytes()))
        assert image.format == "PNG"
        image.verify()
    for fact in (
        "SmolLM2-135M",
        "135 M",
        "922 k trained",
        "24",
        "7,200",
        "40",
        "5 min 12 s",
        "154",
        "completed",
    ):
        assert fact in page.text
    assert "What is missing" not in page.text


def test_table_shows_the_evaluation_and_its_change(written: tuple[Path, Page]) -> None:
    run, page = written
    stored = json.loads((run / "evaluation.json").read_text())
    before, after = stored["before"], stored["after"]
    for key, digits, scale in (("nll", 4, 1), ("perplexity", 2, 1), ("accuracy", 2, 100), ("ece", 4, 1)):
        for figures in (before, after):
            assert f"{figures[key] * scale:.{digits}f}" in page.text
    assert after["nll"] < before["nll"]
    change = round(after["nll"], 4) - round(before["nll"], 4)
    assert f"\N{MINUS SIGN}{-change:.4f} better" in page.text
    assert "arithmetic" in page.text
    assert f"{after['by_source']['open-ended']['nll']:.4f}" in page.text


def test_tails_are_the_ends_of_the_uncertainties(written: tuple[Path, Page]) -> None:
    run, page = written
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    ordered = sorted(rows, key=lambda row: row["uncertainty"])
    shown = page.blocks("article", "pre")
    expected = [*ordered[:3], *reversed(ordered[-3:])]
    assert shown == [text for row in expected for text in (row["prompt"], row["response"])]


def test_commands_survive_the_shell(written: tuple[Path, Page]) -> None:
    run, page = written
    (commands,) = page.blocks("section", "pre")
    assert "git checkout 135d12f0a1b2" in commands
    line = next(line for line in commands.splitlines() if "my config.yaml" in line)
    assert shlex.split(line) == COMMAND
    again = next(line for line in commands.splitlines() if line.endswith("-again"))
    assert shlex.split(again) == ["ual", "train", str(run / "config.yaml"), f"output_dir={run}-again"]
    assert configuration.load(run / "config.yaml", [shlex.split(again)[-1]]).output_dir == f"{run}-again"
    assert page.blocks("details", "pre") == [(run / "config.yaml").read_text()]
    for fact in ("AMD EPYC", "no GPU", "torch 2.13.0", "85c6e71683558332", "3.11.7"):
        assert fact in page.text


def test_equal_runs_give_equal_bytes(run: Path) -> None:
    first = write([run]).read_bytes()
    assert write([run]).read_bytes() == first


def test_output_may_be_anywhere(run: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "folder" / "page.html"
    assert write([run], wanted) == wanted
    assert not (run / "report.html").exists()
    check_page(Page(wanted))


# ---- what is said ----


def test_small_runs_are_called_small(written: tuple[Path, Page]) -> None:
    _, page = written
    assert "Too small for a claim about the method" in page.text
    assert "40 steps (fewer than 200)" in page.text
    assert "600 held-out tokens (fewer than 10,000)" in page.text
    assert "one seed" in page.text


def said(*folders: Path) -> str:
    return " ".join(findings.cautions([read(folder) for folder in folders]))


@pytest.mark.kills(
    "ual/report/findings.py", "for seed in shared] or [list(runs)]", "for seed in ()] or [list(runs)]"
)
def test_large_runs_of_three_seeds_are_not_called_small(tmp_path: Path) -> None:
    def tokens(seed: int) -> Callable[[dict[str, Any]], None]:  # packing and batches depend on the seed
        return lambda files: files["metrics.json"].update(trained_tokens=7200 + seed)

    words = said(
        *(
            build(tmp_path / f"{kind}-{seed}", kind, seed=seed, steps=300, held_out=400, change=tokens(seed))
            for kind in ("uniform", "ual")
            for seed in (1, 2, 3)
        )
    )
    for doubt in ("Too small", "not matched"):
        assert doubt not in words


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sft", "Plain fine-tuning, without label smoothing"),
        ("uniform", "Fine-tuning with the same label smoothing for every sample, 0.1"),
        ("ual", "the base model's own NLL, rank scale, linear map to [0, 0.2], scaled to a mean of 0.1"),
    ],
)
def test_subtitle_says_what_was_trained(tmp_path: Path, kind: str, words: str) -> None:
    def shrink(files: dict[str, Any]) -> None:
        files["environment.json"]["model"] |= {"parameters": 640, "trainable_parameters": 2100}

    page = Page(write([build(tmp_path / "run", kind, change=shrink)]))
    assert words in page.text
    assert "640, 2.1 k trained" in page.text


def test_differences_below_the_last_digit_are_none() -> None:
    assert findings.NLL.change(1.00001, 1.0) == ("±0", "same")
    assert findings.NLL.change(1.1, 1.0) == ("+0.1000", "worse")
    assert findings.ACCURACY.change(0.51, 0.5) == ("+1.00", "better")
    assert findings.NLL.change(None, 1.0) == ("", "")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "\N{EM DASH}"), (3.14, "3.1 s"), (61, "1 min 01 s"), (3660, "1 h 01 min")]
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert findings.duration(seconds) == shown


# ---- several runs ----


def test_comparison(compared: tuple[list[Path], Page]) -> None:
    arms, page = compared
    check_page(page)
    assert len(list((arms[0].parent / "comparison-plots").glob("*.png"))) == 4
    assert len(page.blocks("td", "span")) == 5  # one best for each metric
    assert "loss.kind sft uniform ual" in page.text
    assert "Difference from sft per token of the same held-out samples" in page.text
    assert "ual +0.2000 +0.2000 to +0.2000 0 of 1 +0.00 +0.00 to +0.00 0 of 1 20 1" in page.text
    assert "covers the choice of held-out samples and not the randomness of training" in page.text
    assert [a["href"] for a in page.all("a")] == ["sft/report.html"]
    assert "not matched" not in page.text
    assert "shuffled among the samples" in page.text


def test_comparison_in_json(compared: tuple[list[Path], Page]) -> None:
    arms, _ = compared
    stored = json.loads(
        (arms[0].parent / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert stored["baseline"] == "sft"
    assert [arm["loss_kind"] for arm in stored["arms"]] == ["sft", "uniform", "ual"]
    for arm, folder in zip(stored["arms"], arms, strict=True):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert arm["eval"] == metrics["eval"]
        assert arm["eval_before"] == metrics["eval_before"]
        assert (arm["steps"], arm["trained_tokens"], arm["held_out_tokens"]) == (40, 7200, 600)
    sft, _, ual = (arm["eval"] for arm in stored["arms"])
    uniform, ual_against_sft = stored["paired"]
    assert (uniform["arm"], uniform["baseline"]) == (["uniform"], ["sft"])
    assert ual_against_sft["nll"] == pytest.approx(
        {"value": 0.2, "low": 0.2, "high": 0.2, "samples": 20, "seeds": 1, "better": 0}
    )
    assert stored["arms"][2]["difference_from_baseline"]["ece"] == pytest.approx(ual["ece"] - sft["ece"])


def test_plots_and_json_take_the_name_of_the_page(compared: tuple[list[Path], Page], tmp_path: Path) -> None:
    write(compared[0], tmp_path / "report.html")
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "report-plots" / "loss.png").is_file()


def other_arm(files: dict[str, Any]) -> None:
    files["held_out.jsonl"] = [
        sample | {"nll": sample["nll"] - 0.5 * (i < 10), "accuracy": 0.75}
        for i, sample in enumerate(files["held_out.jsonl"][:16])
    ]
    files["held_out.jsonl"][15]["tokens"] = 31  # not the same sample


@pytest.mark.kills("ual/report/findings.py", "side[name].tokens == sample.tokens", "True")
@pytest.mark.kills("ual/report/findings.py", "for seed in arm if seed in baseline]", "for seed in arm]")
@pytest.mark.kills("ual/report/findings.py", "and seed not in members", "")
@pytest.mark.kills(
    "ual/report/findings.py", '"name", "output_dir", "training.seed")', '"name", "output_dir")'
)
def test_seeds_of_an_arm_are_paired_with_the_baseline(tmp_path: Path) -> None:
    """On 15 samples of both: 10 have an NLL 0.5 lower, in the two seeds that both arms have."""

    def seeded(seed: int) -> Callable[[dict[str, Any]], None]:
        def change(files: dict[str, Any]) -> None:
            raw = files["config.yaml"].model_dump() | {
                "training": files["config.yaml"].training | {"seed": seed}
            }
            files["config.yaml"] = configuration.parse(raw)
            if raw["loss"]["kind"] == "ual":
                other_arm(files)

        return change

    folders = [build(tmp_path / f"sft-{s}", "sft", seed=s, change=seeded(s)) for s in (1, 2)]
    folders += [build(tmp_path / f"ual-{s}", seed=s, change=seeded(s)) for s in (2, 1, 3)]
    folders.append(build(tmp_path / "again", seed=1, change=seeded(1)))
    found, again = findings.comparisons([read(folder) for folder in folders])
    assert found.arm == ("ual-2", "ual-1")
    assert again.arm == ("again",)  # a seed counts once in an arm
    assert found.baseline == ("sft-2", "sft-1")
    assert found.nll.value == pytest.approx(-0.5 * 10 / 15)
    assert (found.nll.samples, found.nll.seeds, found.nll.better) == (15, 2, 2)
    assert -0.5 < found.nll.low < found.nll.value < found.nll.high < 0
    assert (found.accuracy.value, found.accuracy.better) == (0.25, 2)


def test_runs_without_samples_in_common_are_not_paired(tmp_path: Path) -> None:
    folders = [build(tmp_path / "sft", "sft"), build(tmp_path / "ual")]
    (folders[1] / "held_out.jsonl").unlink()
    assert findings.comparisons([read(folder) for folder in folders]) == []
    (folders[1] / "held_out.jsonl").write_text(
        '{"id": "held-0", "tokens": 30, "nll": 1, "accuracy": 1}\n{"id"\n'
    )
    assert findings.comparisons([read(folder) for folder in folders]) == []


def test_arms_that_are_not_matched_are_named(tmp_path: Path) -> None:
    def other_data(files: dict[str, Any]) -> None:
        files["environment.json"]["data_sha256"] = {"data/train.jsonl": "another"}
        files["environment.json"]["model"]["path"] = "models/other"
        files["metrics.json"]["trained_rows"] = 12

    sft = build(tmp_path / "sft", "sft")
    ual = build(tmp_path / "ual", steps=60, held_out=10, seed=1, change=other_data)
    words = said(sft, ual)
    for what in (
        "training samples differ (24, 12)",
        "steps differ (40, 60)",
        "held-out tokens differ (600, 300)",
        "base models differ",
        "data files have different hashes",
        "different seeds",
        "No arm has uniform smoothing of the same mean",
    ):
        assert what in words
    table = findings.arms([read(sft), read(ual)])
    assert table is not None
    assert [row[0].text for row in table.rows] == ["sft", "ual"]  # no common start, hence no line for it


def test_uniform_arm_of_another_mean_is_no_control(tmp_path: Path) -> None:
    def stronger(files: dict[str, Any]) -> None:
        files["metrics.json"]["mean_smoothing"] = 0.3

    words = said(build(tmp_path / "uniform", "uniform", change=stronger), build(tmp_path / "ual"))
    assert "No arm has uniform smoothing of the same mean" in words


def test_arms_that_tie_are_both_best(tmp_path: Path) -> None:
    page = Page(write([build(tmp_path / "a", "sft"), build(tmp_path / "b", "sft")]))
    assert len(page.blocks("td", "span")) == 10
    assert "±0" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = Page(write([build(tmp_path / "x" / "ual"), build(tmp_path / "y" / "ual", seed=1)]))
    assert f"ual ({tmp_path / 'x' / 'ual'})" in page.text
    assert f"ual ({tmp_path / 'y' / 'ual'})" in page.text
    for seed in (1, 2):
        run = build(
            tmp_path / f"ual-seed{seed}",
            seed=seed,
            change=lambda files: files["metrics.json"].update(name="ual"),
        )
    page = Page(write([run.with_name("ual-seed1"), run]))
    assert "ual-seed1 · ual-seed2" in page.inside("h1")


def test_many_sources_are_drawn_as_one(tmp_path: Path) -> None:
    def many(files: dict[str, Any]) -> None:
        for i, row in enumerate(files["samples.jsonl"]):
            row["source"] = f"subject {i % 7}"

    page = Page(write([build(tmp_path / "run", change=many)]))
    assert "Histogram of the samples' uncertainty: ." in [image["alt"] for image in page.all("img")]


# ---- data is data ----


def test_markup_in_texts_and_names_is_text(tmp_path: Path) -> None:
    def poison(files: dict[str, Any]) -> None:
        files["metrics.json"] |= {"name": EVIL, "loss_kind": EVIL, "status": EVIL}
        files["config.yaml"] = files["config.yaml"].model_copy(update={"name": EVIL})
        files["environment.json"] |= {"command": ["ual", EVIL], "created": EVIL, "git_commit": EVIL}
        files["environment.json"]["versions"] = {EVIL: EVIL}
        files["environment.json"]["data_sha256"] = {EVIL: EVIL}
        for row in files["samples.jsonl"]:
            row |= {"source": EVIL, "prompt": EVIL, "response": EVIL + "\x00\ud800"}
        for when in ("before", "after"):
            evaluated = files["evaluation.json"][when]
            evaluated["by_source"] = {EVIL: evaluated["by_source"]["arithmetic"]}

    folder = build(tmp_path / "<img src=x onerror=alert(1)>", change=poison)
    other = build(tmp_path / "javascript:alert(1)", "sft")
    write([other])
    for runs in ([folder], [other, folder]):
        page = Page(write(runs))
        check_page(page)
        assert EVIL in page.inside("h1")
        assert EVIL in page.inside("article")
        assert EVIL in page.inside("table")
        assert EVIL in page.inside("dl")
    links = [a["href"] for a in page.all("a")]
    assert links == [
        "javascript%3Aalert%281%29/report.html",
        "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/report.html",
    ]


def test_long_texts_are_cut_where_they_say_least(tmp_path: Path) -> None:
    def long(files: dict[str, Any]) -> None:
        for row in files["samples.jsonl"]:
            row |= {"prompt": "system " * 200 + "the question", "response": "the answer" + " and more" * 200}

    page = Page(write([build(tmp_path / "run", change=long)]))
    shown = page.blocks("article", "pre")
    assert all(len(text) < 760 for text in shown)
    assert shown[0].endswith("the question")
    assert shown[1].startswith("the answer")
    assert "characters more]" in shown[1]


# ---- what is missing ----

FILES = (
    "environment.json",
    "history.jsonl",
    "samples.jsonl",
    "evaluation.json",
    "metrics.json",
    "config.yaml",
)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_the_page_stands(run: Path, name: str) -> None:
    (run / name).unlink()
    page = Page(write([run]))
    check_page(page)
    assert f"{name} is missing." in page.text


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_a_damaged_file_is_named_and_the_page_stands(run: Path, name: str) -> None:
    for content in (b"", b"[1, 2]", b"\x00\xff", b'{"half":'):
        (run / name).write_bytes(content)
        assert f"{name} is damaged and was ignored." in read(run).missing
    check_page(Page(write([run])))


def test_a_config_of_another_version_is_shown_as_it_is(run: Path) -> None:
    (run / "config.yaml").write_text("model: m\nquantum: true\n")
    page = Page(write([run]))
    assert 'unknown key "quantum"' in page.text
    assert "quantum: true" in page.inside("pre")


def test_only_a_config_is_left(run: Path) -> None:
    for name in FILES:
        if name != "config.yaml":
            (run / name).unlink()
    page = Page(write([run]))
    check_page(page)
    assert not page.all("img")
    for words in (
        "Nothing was measured on held-out samples.",
        "No training loss was logged",
        "no reliability diagram",
        "No sample has an uncertainty",
        "No label smoothing is recorded",
        "There is no held-out evaluation by source",
        "Fewer than two training samples have an uncertainty",
        "Nothing is recorded",
        "unknown",
    ):
        assert words in page.text


def test_a_killed_run(tmp_path: Path) -> None:
    def kill(files: dict[str, Any]) -> None:
        files["metrics.json"] |= {"status": "running", "eval": None}
        files["evaluation.json"]["after"] = None

    folder = build(tmp_path / "killed", change=kill)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    page = Page(write([folder]))
    check_page(page)
    assert "1 damaged line of history.jsonl ignored." in page.text
    assert "had been killed" in page.text
    assert "only the model before training" in page.text
    assert read(folder).losses[-1][0] == 40


def test_an_interrupted_run_without_held_out_rows(tmp_path: Path) -> None:
    def stop(files: dict[str, Any]) -> None:
        files["metrics.json"] |= {"status": "interrupted", "eval": None, "eval_before": None, "steps": 17}
        files["evaluation.json"] = {"before": None, "after": None}

    page = Page(write([build(tmp_path / "stopped", change=stop)]))
    assert "stopped after 17 steps" in page.text
    assert "set data.eval or data.eval_fraction" in page.text
    assert "Line chart of training loss by step: stopped." in [image["alt"] for image in page.all("img")]


@pytest.mark.parametrize("value", ["half", {"nll": 1.0}, None])
def test_an_incomplete_evaluation_counts_as_none(tmp_path: Path, value: object) -> None:
    def break_it(files: dict[str, Any]) -> None:
        if value is None:
            files["evaluation.json"]["after"]["ece"] = None
        else:
            files["evaluation.json"]["after"] = value

    loaded = read(build(tmp_path / "run", change=break_it))
    assert loaded.after is None
    assert "evaluation.json holds an incomplete evaluation, which was ignored." in loaded.missing


def test_settings_that_differ_are_shown_as_yaml_writes_them(tmp_path: Path) -> None:
    def tune(files: dict[str, Any]) -> None:
        tuned = {"lora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True}}
        raw = files["config.yaml"].model_dump() | tuned
        files["config.yaml"] = configuration.parse(raw)

    runs = [read(build(tmp_path / "a")), read(build(tmp_path / "b", change=tune))]
    table = findings.differing_settings(runs)
    assert table is not None
    assert [tuple(cell.text for cell in row) for row in table.rows] == [
        ("lora.target_modules", "all-linear", "q_proj, v_proj"),
        ("lora.use_dora", "false", "true"),
    ]
    assert findings.differing_settings(runs[:1]) is None


def test_only_the_end_was_measured(tmp_path: Path) -> None:
    def forget(files: dict[str, Any]) -> None:
        files["evaluation.json"]["before"] = None

    page = Page(write([build(tmp_path / "run", change=forget)]))
    assert findings.before_and_after(read(tmp_path / "run")).rows[0][1].text == findings.ABSENT  # type: ignore[union-attr]
    check_page(page)


def test_comparison_with_an_arm_that_was_not_measured(tmp_path: Path) -> None:
    def stop(files: dict[str, Any]) -> None:
        files["metrics.json"] |= {"status": "interrupted", "eval": None}
        files["evaluation.json"]["after"] = None

    page = Page(write([build(tmp_path / "sft", "sft", change=stop), build(tmp_path / "ual")]))
    check_page(page)
    assert "Not measured after training: sft." in page.text
    assert findings.arms([read(tmp_path / "sft")] * 2) is None
    assert json.loads((tmp_path / "comparison.json").read_text())["arms"][0]["eval"] is None
    page = Page(write([tmp_path / "sft"], tmp_path / "one.html"))
    check_page(page)


def test_resumed_steps_count_once_and_infinite_losses_are_told(tmp_path: Path) -> None:
    def resume(files: dict[str, Any]) -> None:
        files["history.jsonl"] = [
            {"step": 1, "loss": 3.0},
            {"step": 2, "loss": 9.0},
            {"step": 2, "loss": 2.0},
            {"step": 3, "loss": float("nan")},
        ]

    folder = build(tmp_path / "run", change=resume)
    losses = read(folder).losses
    assert losses[:2] == ((1, 3.0), (2, 2.0))
    assert len(losses) == 3
    assert "1 logged loss is not finite and not drawn." in read(folder).missing


def test_rows_without_uncertainty_are_counted(tmp_path: Path) -> None:
    def drop(files: dict[str, Any]) -> None:
        for row in files["samples.jsonl"][:5]:
            row["uncertainty"] = None

    page = Page(write([build(tmp_path / "run", change=drop)]))
    assert "5 samples without an uncertainty are not drawn" in page.text


# ---- refusals ----


def test_folders_that_are_no_runs(tmp_path: Path, run: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("")
    empty.mkdir()
    for path, problem in (
        (tmp_path / "none", "no such folder"),
        (file, "a file"),
        (empty, "not a run folder"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            write([path])
        assert caught.value.place == str(path)
        assert "ual train" in caught.value.remedy
    with pytest.raises(UserError) as caught:
        write([run.parent])
    assert "name those: ual" in caught.value.remedy
    assert list(empty.iterdir()) == []


def test_no_run_and_one_run_twice(run: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write([])
    with pytest.raises(UserError, match="twice"):
        write([run, run.parent / "." / "ual"])


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write the report") as caught:
        write([run], blocked / "page.html")
    assert str(blocked) in caught.value.place


def test_a_failed_write_leaves_the_old_page(run: Path) -> None:
    page = write([run])
    before = page.read_bytes()
    os.mkdir(run / f".report.html.{os.getpid()}.partial")  # noqa: PTH102
    with pytest.raises(UserError, match="cannot write the report"):
        write([run])
    assert page.read_bytes() == before
