"""Token clusters: measures against their definitions, honest intervals, and a real run from end to end."""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from sklearn.metrics import davies_bouldin_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from tests.ual.runs import configure, gsm8k, write_rows
from tests.ual.test_report import EVIL, Page, check_page
from ual.cli.main import app
from ual.config.run import ModelConfig
from ual.config.run import load as load_config
from ual.data import Collator
from ual.errors import UserError
from ual.evaluate.clusters import (
    DOCUMENTS,
    MEASURES,
    choose,
    compare,
    measure,
    principal_components,
)
from ual.models import fuse
from ual.models.load import load_model
from ual.models.states import states
from ual.pipelines import clusters as pipeline
from ual.report import plots
from ual.report.clusters import write
from ual.report.findings import ABSENT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODULE, STATES = "ual/evaluate/clusters.py", "ual/models/states.py"
PIPELINE, REPORT = "ual/pipelines/clusters.py", "ual/report/clusters.py"
Array = NDArray[Any]


def cloud(rng: np.random.Generator, *, shift: float = 1.0, documents: int = 30) -> tuple[Array, Array, Array]:
    """States of five classes whose documents have an offset and a scale: those of one are not independent."""
    classes, dimensions = 5, 8
    means = shift * np.random.default_rng(5).normal(size=(classes, dimensions))
    token, document = np.tile(np.arange(classes), documents), np.repeat(np.arange(documents), classes)
    offset = 0.5 * rng.normal(size=(documents, dimensions))
    scale = np.exp(0.3 * rng.normal(size=(documents, 1)))
    noise = (offset[document] + rng.normal(size=(token.size, dimensions))) * scale[document]
    return means[token] + noise, token, document


def brute_force(x: Array, token: Array, document: Array, k: int) -> dict[str, float]:
    """The definitions, state by state and pair by pair."""
    n, classes = len(x), sorted(set(token.tolist()))
    distance = [[math.dist(a, b) for b in x] for a in x]
    of = {c: [i for i in range(n) if token[i] == c] for c in classes}
    mean = {c: sum(x[i] for i in of[c]) / len(of[c]) for c in classes}
    spread = {c: np.mean([math.dist(x[i], mean[c]) for i in of[c]]) for c in classes}
    variance = {c: np.mean([math.dist(x[i], mean[c]) ** 2 for i in of[c]]) for c in classes}
    pairs = [(a, b) for a in classes for b in classes if a < b]
    between = {p: math.dist(mean[p[0]], mean[p[1]]) for p in pairs} | {
        (b, a): math.dist(mean[a], mean[b]) for a, b in pairs
    }
    widths, purities = [], []
    for i in range(n):
        own = sum(distance[i][j] for j in of[token[i]]) / (len(of[token[i]]) - 1)
        other = min(np.mean([distance[i][j] for j in of[c]]) for c in classes if c != token[i])
        widths.append((other - own) / max(own, other))
        near = sorted((distance[i][j], j) for j in range(n) if document[j] != document[i])[:k]
        purities.append(np.mean([token[j] == token[i] for _, j in near]))
    center = sum(mean.values()) / len(classes)
    unit = {c: (mean[c] - center) / math.dist(mean[c], center) for c in classes}
    kernel = [math.log(1 / math.dist(unit[a], unit[b])) for a, b in pairs]
    sigma = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    p = [s / sigma.sum() for s in sigma if s > 1e-9]
    worst = [max((spread[c] + spread[d]) / between[c, d] for d in classes if d != c) for c in classes]
    return {
        "silhouette": float(np.mean(widths)),
        "davies_bouldin": float(np.mean(worst)),
        "intra_inter": float(np.mean([*spread.values()]) / np.mean([between[pair] for pair in pairs])),
        "neighbor_purity": float(np.mean(purities)),
        "cdnv": float(np.mean([(variance[a] + variance[b]) / (2 * between[a, b] ** 2) for a, b in pairs])),
        "gnc2": float(np.std(kernel) / abs(np.mean(kernel))),
        "effective_rank": math.exp(-sum(q * math.log(q) for q in p)),
    }


# ---- measures ----


@pytest.mark.kills(MODULE, "(2 * between**2)", "between**2")
@pytest.mark.kills(MODULE, "/ between.mean())", "/ between.max())")
@pytest.mark.kills(MODULE, "kernel.std() / abs(kernel.mean())", "kernel.std() / kernel.mean()")
@pytest.mark.kills(MODULE, "centered = means - means.mean(axis=0)", "centered = means")
@pytest.mark.kills(MODULE, "sigma = np.sqrt(np.clip", "sigma = (np.clip")
@pytest.mark.kills(MODULE, "    centered = x - x.mean(axis=0)\n    small", "    centered = x + 1\n    small")
@pytest.mark.kills(MODULE, "np.where(document[:, None] == document, np.inf, distance)", "distance")
@pytest.mark.kills(MODULE, 'kind="stable")[:, :k]', 'kind="stable")[:, : k + 1]')
@pytest.mark.parametrize("dimensions", [3, 60])
def test_measures_are_their_definitions(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    token = np.repeat([3, 7, 7, 9, 11], 8)
    document = rng.integers(0, 12, token.size)
    x = rng.normal(size=(token.size, dimensions)) + 5 + 2 * rng.normal(size=(12, dimensions))[token % 12]
    x -= 1e-3 * x.mean(axis=0)  # far from the origin
    expected = brute_force(x, token, document, 4)
    found = measure(x, token, document, neighbors=4)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(x, token))
    assert measure(x.astype(np.float32), token, document, neighbors=4) == pytest.approx(expected, rel=1e-4)


def test_perfect_clusters_and_none() -> None:
    points = np.eye(4)[np.repeat(np.arange(4), 10)]
    token, document = np.repeat(np.arange(4), 10), np.arange(40)
    perfect = measure(points, token, document, neighbors=5)
    # four equidistant points: three directions, used equally
    expected = {"silhouette": 1, "davies_bouldin": 0, "intra_inter": 0, "neighbor_purity": 1, "cdnv": 0}
    assert perfect == pytest.approx(expected | {"gnc2": 0, "effective_rank": 3}, abs=1e-9)
    blob = measure(np.random.default_rng(0).normal(size=(400, 6)), np.arange(400) % 4, np.arange(400))
    assert abs(blob["silhouette"]) < 0.03
    assert blob["neighbor_purity"] == pytest.approx(99 / 399, abs=0.03)
    assert blob["davies_bouldin"] > 10
    assert blob["cdnv"] > 10
    assert blob["effective_rank"] == pytest.approx(6, rel=0.01)


@pytest.mark.kills(MODULE, "    if between.min() == 0:", "    if between.min() < 0:")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_model_without_differences_has_no_measure_and_not_the_best_one() -> None:
    flat = measure(np.ones((20, 3)), np.arange(20) % 2, np.arange(20), neighbors=3)
    assert all(math.isnan(flat[key]) for key in ("silhouette", "davies_bouldin", "cdnv", "gnc2"))
    assert math.isnan(flat["effective_rank"])


def test_one_document_has_no_neighbors() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3))
    assert math.isnan(measure(x, np.arange(8) % 2, np.zeros(8, int))["neighbor_purity"])


def test_nothing_changes_with_rotation_shift_scale_names_or_order() -> None:
    rng = np.random.default_rng(1)
    x, token, document = cloud(rng)
    before = measure(x, token, document)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert measure(0.01 * x @ turn + 3, token, document) == pytest.approx(before, rel=1e-6)
    assert measure(x, -7 * token, document + 40) == pytest.approx(before)
    order = rng.permutation(len(x))
    assert measure(x[order], token[order], document[order]) == pytest.approx(before)
    wide = measure(x * np.linspace(0.1, 4, 8), token, document)  # no law: axes are scaled apart
    assert abs(wide["effective_rank"] - before["effective_rank"]) > 0.1


def test_neighbors_of_the_same_document_do_not_count() -> None:
    """Each document is a tight bunch of one class, so its own states would give a purity of 1."""
    rng = np.random.default_rng(2)
    place = rng.normal(size=(40, 4))
    document = np.repeat(np.arange(40), 10)
    x = place[document] + 1e-3 * rng.normal(size=(400, 4))
    found = measure(x, document % 4, document)
    assert found["neighbor_purity"] < 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.full((4, 2), np.nan)}, "finite"),
        ({"token": [1, 1, 2]}, "states"),
        ({"token": [1, 1, 1, 2]}, "two classes"),
        ({"neighbors": 0}, "neighbors"),
    ],
)
def test_wrong_arguments_of_measures_are_refused(changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"x": np.eye(4)[:, :2], "token": [1, 1, 2, 2], "neighbors": 1} | changes
    with pytest.raises(ValueError, match=words):
        measure(given["x"], given["token"], [1, 2, 3, 4], neighbors=given["neighbors"])


# ---- which tokens ----


def stream(seed: int = 0, documents: int = 60) -> tuple[Array, Array]:
    """Tokens 0 .. 19, the small ones frequent, in documents of 40 tokens."""
    rng = np.random.default_rng(seed)
    return rng.geometric(0.2, documents * 40) % 20, np.repeat(np.arange(documents), 40)


@pytest.mark.kills(MODULE, "[:classes]", "[:]")
@pytest.mark.kills(MODULE, "int(count[chosen].min())", "int(count[chosen].max())")
@pytest.mark.kills(MODULE, "by_count = np.argsort(-count", "by_count = np.argsort(count")
def test_classes_are_balanced_and_the_most_frequent() -> None:
    token, document = stream()
    count = np.bincount(token)
    chosen = choose(token, document, classes=6, occurrences=1000, least=30)
    found, sizes = np.unique(token[chosen], return_counts=True)
    frequent = sorted(range(len(count)), key=lambda id: (-count[id], id))[:6]
    assert found.tolist() == sorted(frequent)
    assert set(sizes.tolist()) == {count[frequent].min()}
    assert np.unique(chosen).size == chosen.size
    few = choose(token, document, classes=6, occurrences=35, least=30)
    assert np.unique(token[few], return_counts=True)[1].tolist() == [35] * 6
    enough = choose(token, document, classes=100, least=100)
    assert set(token[enough].tolist()) == {id for id in range(20) if count[id] >= 100}


@pytest.mark.kills(MODULE, "drawn[np.argsort(turn, kind", "drawn[np.argsort(0 * turn, kind")
def test_occurrences_are_spread_over_documents() -> None:
    token, document = stream()
    chosen = choose(token, document, classes=4, occurrences=50)
    for id in np.unique(token[chosen]):
        of = document[chosen][token[chosen] == id]
        most = np.unique(document[token == id]).size
        assert np.unique(of).size == min(50, most)


def test_the_choice_depends_on_the_seed_alone() -> None:
    token, document = stream()
    first = choose(token, document, seed=1)
    assert np.array_equal(first, choose(token, document, seed=1))
    assert not np.array_equal(first, choose(token, document, seed=2))


def test_equally_frequent_tokens_are_taken_by_id() -> None:
    token, document = np.tile([9, 4, 6, 2], 40), np.repeat(np.arange(16), 10)
    assert set(token[choose(token, document, classes=3)].tolist()) == {2, 4, 6}


@pytest.mark.kills(MODULE, "enough = (count >= least) & (spread >= DOCUMENTS)", "enough = count >= least")
def test_a_token_of_few_documents_is_no_class() -> None:
    token, document = stream()
    token[: 40 * (DOCUMENTS - 1)] = 99  # the most frequent of all
    assert 99 not in token[choose(token, document)]


@pytest.mark.parametrize(
    ("token", "document", "words"),
    [
        (np.arange(400) % 4, np.zeros(400, int), r"of 1 document, and .* at least 8(.|\n)*--data"),
        (np.arange(80) % 4, np.arange(80), r"0 of 4 occur at least 30 times(.|\n)*two tokens .* 20 times"),
        (np.zeros(80, int), np.arange(80), r"1 of 1 occur at least 30 times"),
        (np.empty(0, int), np.empty(0, int), r"of 0 documents"),
    ],
)  # fmt: skip
def test_too_few_tokens_are_refused_with_their_counts(token: Array, document: Array, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose(token, document)


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        choose([1, 2], [1, 2], classes=1)
    with pytest.raises(ValueError, match="one shape"):
        choose([1, 2], [1])


# ---- intervals ----


@pytest.mark.kills(MODULE, "math.sqrt(taken / (documents - taken))", "math.sqrt(1)")
@pytest.mark.kills(MODULE, "inside & (count > 1)[label]", "inside[rng.permutation(len(inside))]")
@pytest.mark.untraced
@pytest.mark.slow
def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """60 samples of 30 documents whose states are dependent; the truth is the mean over 300 samples."""
    rng = np.random.default_rng(0)
    truth = np.mean([[*measure(*cloud(rng), neighbors=5).values()] for _ in range(300)], axis=0)
    runs, low, high = 60, [], []
    for i in range(runs):
        x, token, document = cloud(rng)
        found = compare({"a": x}, token, document, neighbors=5, resamples=25, seed=i).measures["a"]
        low.append([of.low for of in found.values()])
        high.append([of.high for of in found.values()])
    covered = ((np.array(low) <= truth) & (truth <= np.array(high))).mean(axis=0)
    assert covered.min() > 0.85, dict(zip(MEASURES, covered, strict=True))
    assert 0.91 < covered.mean() < 0.99, dict(zip(MEASURES, covered, strict=True))


@pytest.mark.kills(MODULE, "drawn[b] - drawn[a]", "drawn[b] + drawn[a]")
@pytest.mark.kills(MODULE, "value[b] - value[a]", "value[a] - value[b]")
def test_differences_are_paired_and_their_intervals_narrow() -> None:
    x, token, document = cloud(np.random.default_rng(3))
    tighter = x + 0.1 * (np.array([x[token == c].mean(axis=0) for c in range(5)])[token] - x)
    found = compare({"a": x, "b": tighter, "c": x}, token, document, resamples=40)
    pairs = {(of.model, of.baseline): of.measures for of in found.differences}
    assert list(pairs) == [("b", "a"), ("c", "a"), ("c", "b")]
    for key in ("silhouette", "intra_inter", "cdnv"):
        of, alone = pairs["b", "a"][key], found.measures["a"][key]
        assert of.value == pytest.approx(found.measures["b"][key].value - alone.value)
        assert of.high - of.low < 0.5 * (alone.high - alone.low)
        assert (of.low > 0) if MEASURES[key].tighter == "higher" else (of.high < 0)
        assert pairs["c", "a"][key] == pytest.approx(pairs["c", "a"][key].__class__(0, 0, 0))


def test_a_comparison_repeats_and_reports_its_progress() -> None:
    x, token, document = cloud(np.random.default_rng(4))
    done: list[int] = []
    found = compare({"a": x, "b": 2 * x}, token, document, resamples=5, seed=1, advance=done.append)
    assert sum(done) == 10
    assert compare({"a": x, "b": 2 * x}, token, document, resamples=5, seed=1) == found
    assert compare({"a": x}, token, document, resamples=5, seed=2).measures["a"] != found.measures["a"]


def test_a_class_that_a_draw_lacks_is_left_out_of_the_draw() -> None:
    x, token, document = cloud(np.random.default_rng(5))
    document[token == 0] = np.arange((token == 0).sum()) % 2  # of two documents
    found = compare({"a": x}, token, document, resamples=20).measures["a"]
    assert all(math.isfinite(of.low) and math.isfinite(of.high) for of in found.values())


@pytest.mark.parametrize(
    ("given", "document", "resamples"),
    [({}, [1, 2, 3, 4], 5), ({"a": np.eye(4)}, [1, 2, 3, 4], 1), ({"a": np.eye(4)}, [1, 1, 1, 1], 5)],
)
def test_comparisons_without_an_interval_are_refused(
    given: dict[str, Array], document: list[int], resamples: int
) -> None:
    with pytest.raises(ValueError, match="or more"):
        compare(given, [1, 1, 2, 2], document, resamples=resamples)


@pytest.mark.kills(MODULE, "[x - x.mean(axis=0) for x in each]", "each")
def test_components_are_those_of_all_models_together() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(50, 6)) * [9, 1, 1, 1, 1, 1], rng.normal(size=(50, 6)) * [1, 1, 1, 1, 1, 7]
    found = principal_components({"a": a, "b": b + 1000})
    stacked = np.concatenate([a - a.mean(axis=0), b - b.mean(axis=0)])
    _, sigma, axes = np.linalg.svd(stacked)
    assert found.shares == pytest.approx((sigma[:2] ** 2 / (sigma**2).sum()).tolist())
    points = np.concatenate([found.points["a"], found.points["b"]])
    assert np.abs(points) == pytest.approx(np.abs(stacked @ axes[:2].T), abs=1e-6)


# ---- states ----


def texts(tokenizer: Any, count: int = 7) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        ids = tokenizer(f"Once upon a time, {'there was a dog and ' * (i % 3)} Tom had {i} balls.").input_ids
        found.append({"id": f"text {i}", "input_ids": ids, "labels": ids})
    return [sample | {"label_smoothing": 0.0, "sample_weight": 1.0} for sample in found]


@pytest.mark.kills(STATES, "device=states_of.device) - 1]", "device=states_of.device)]")
@pytest.mark.kills(STATES, "found[indices] = kept", "found[: len(kept)] = kept")
@pytest.mark.kills(STATES, "model.train(was_training)", "pass")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_that_the_head_receives(stories: Path, dtype: Any, device: torch.device) -> None:
    features = texts(AutoTokenizer.from_pretrained(stories))
    rng = np.random.default_rng(0)
    places = [
        (sample["id"], int(at))
        for sample in features[::2]
        for at in rng.permutation(np.arange(1, len(sample["input_ids"])))[:4]
    ]
    places = [places[i] for i in rng.permutation(len(places))]
    model: Any = fuse(load_model(ModelConfig(path=str(stories), dtype=dtype))).to(device).train()
    done: list[int] = []
    found = states(model, features, places, Collator(0), batch_size=3, advance=done.append)
    assert sum(done) == len(features[::2]), "samples without a place are not computed"
    assert model.training
    assert found.dtype == np.float32
    plain = AutoModelForCausalLM.from_pretrained(stories, dtype=getattr(torch, dtype)).to(device).eval()
    by_id = {sample["id"]: torch.tensor([sample["input_ids"]], device=device) for sample in features}
    for state, (name, at) in zip(found, places, strict=True):
        with torch.no_grad():
            hidden = plain(by_id[name], output_hidden_states=True).hidden_states[-1][0, at - 1]
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(torch.tensor(state), hidden.float().cpu(), **close)


@pytest.mark.parametrize("place", [("text 0", 0), ("text 0", 999), ("no text", 1)])
def test_places_without_a_predicted_token_are_refused(stories: Path, place: tuple[str, int]) -> None:
    model: Any = fuse(AutoModelForCausalLM.from_pretrained(stories))
    with pytest.raises(ValueError, match="no token at position"):
        states(model, texts(AutoTokenizer.from_pretrained(stories)), [place], Collator(0))


# ---- end to end ----


@pytest.fixture(scope="module")
def runs(shared: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs on the same samples: `lora` has an adapter, `full` all weights."""
    folder = tmp_path_factory.mktemp("clusters")
    samples = gsm8k(shared, 60)
    for name, lora in (("lora", {"r": 4, "dropout": 0.0}), ("full", None)):
        within = folder / f"{name}-files"
        within.mkdir()
        path = configure(
            within, stories, samples, lora=lora, loss="sft", output_dir=str(folder / name),
            data={"eval_fraction": 0.5}, evaluation={"before": False},
            training={"max_steps": 3, "learning_rate": 2e-2, "save_strategy": "no"},
        )  # fmt: skip
        assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    return folder


def analyze(*words: object) -> Result:
    return CliRunner().invoke(app, ["analyze", "clusters", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def analyzed(runs: Path) -> tuple[dict[str, Any], Path]:
    """The analysis of both runs and their base model."""
    output = runs / "analysis"
    few = ("--resamples", 12, "--occurrences", 25, "--least", 25, "--neighbors", 5)
    done = analyze(runs / "lora", f"all={runs / 'full'}", "-o", output, *few, "--json")
    assert done.exit_code == 0, done.output
    return json.loads((output / "clusters.json").read_text()), output


def test_an_analysis_measures_all_models_on_the_same_tokens(analyzed: tuple[dict[str, Any], Path]) -> None:
    found, _ = analyzed
    assert [model["name"] for model in found["models"]] == ["base", "lora", "all"]
    assert [model["trained"] for model in found["models"]] == [False, True, True]
    places = found["places"]
    token, document = np.array(places["token"]), np.array(places["document"])
    assert set(np.unique(token, return_counts=True)[1].tolist()) == {found["occurrences"]} == {25}
    assert {of["id"] for of in found["tokens"]} == set(token.tolist())
    assert found["documents"] == np.unique(document).size
    assert len({*zip(places["sample"], places["position"], strict=True)}) == token.size
    for model in found["models"]:
        assert set(model["measures"]) == set(MEASURES)
        assert all(of["low"] <= of["value"] <= of["high"] for of in model["measures"].values())
    assert [(of["model"], of["baseline"]) for of in found["differences"]] == [
        ("lora", "base"), ("all", "base"), ("all", "lora"),
    ]  # fmt: skip
    values = [model["measures"]["silhouette"]["value"] for model in found["models"]]
    assert len(set(values)) == 3
    assert found["data"].startswith("held-out samples of ")
    assert all(len(points) == token.size for points in found["projections"]["pca"]["points"].values())


@pytest.mark.kills(PIPELINE, "trained=of.trained, trust", "trained=False, trust")
@pytest.mark.kills(PIPELINE, "+ 1 for id, of", "+ 0 for id, of")
def test_figures_are_those_of_plain_transformers(
    analyzed: tuple[dict[str, Any], Path], runs: Path, stories: Path
) -> None:
    """The adapter loaded by PEFT, and the full model by transformers, on the tokens that the file names."""
    found, _ = analyzed
    places = found["places"]
    config = load_config(runs / "lora" / "config.yaml")
    read = pipeline.training_set.read(config)
    renderer = pipeline.samples.renderer(config)[1]
    rendered = {sample.id: renderer.render(sample) for sample in read.held_out}
    for name, token, at in zip(places["sample"], places["token"], places["position"], strict=True):
        assert rendered[name].labels[at] == token  # type: ignore[union-attr]
    count = Counter(label for of in rendered.values() if of for label in of.labels[1:].tolist())
    assert all(of["occurrences"] == count[of["id"]] for of in found["tokens"])
    base = AutoModelForCausalLM.from_pretrained(stories)
    loaded: dict[str, Any] = {
        "all": AutoModelForCausalLM.from_pretrained(runs / "full" / "model"),
        "lora": PeftModel.from_pretrained(base, runs / "lora" / "adapter"),
    }
    for name, model in loaded.items():
        hidden = {}
        for sample in set(places["sample"]):
            ids = torch.tensor(np.array(rendered[sample].input_ids, dtype=np.int64))[None]  # type: ignore[union-attr]
            with torch.no_grad():
                hidden[sample] = model.eval()(ids, output_hidden_states=True).hidden_states[-1][0]
        where = zip(places["sample"], places["position"], strict=True)
        x = torch.stack([hidden[sample][at - 1] for sample, at in where]).numpy()
        expected = measure(x, places["token"], places["document"], neighbors=5)
        measures = next(of["measures"] for of in found["models"] if of["name"] == name)
        assert {key: of["value"] for key, of in measures.items()} == pytest.approx(expected, rel=1e-3)


def test_the_page_shows_the_figures_and_stands_alone(analyzed: tuple[dict[str, Any], Path]) -> None:
    found, output = analyzed
    page = Page(output / "clusters.html")
    check_page(page, ("results", "cautions", "figures", "tokens", "computed", "reproduce"))
    assert len(page.all("img")) == 3
    value = found["models"][1]["measures"]["silhouette"]["value"]
    assert f"{value:.3f}".replace("-", "\N{MINUS SIGN}") in page.text
    assert "publishes no measure" in page.text
    assert write(found, output / "again.html").read_bytes() == (output / "clusters.html").read_bytes()


def test_names_are_text_and_missing_figures_dashes(
    analyzed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    found = json.loads(json.dumps(analyzed[0]).replace('"all"', json.dumps(EVIL)))
    found["models"][0]["measures"]["gnc2"] = {"value": None, "low": None, "high": None}
    found |= {"projections": {}, "notes": ["a note & more"]}
    page = Page(write(found, tmp_path / "page.html"))
    check_page(page, ())
    assert EVIL in page.text
    assert ABSENT in page.text
    assert "no common axes" in page.text
    assert "a note & more" in page.text


def test_the_command_prints_both_tables(runs: Path, stories: Path, tmp_path: Path) -> None:
    """A model's folder beside its run is the base model, so no other one is added."""
    done = analyze(
        f"plain={stories}", runs / "lora", "-o", tmp_path / "out", "--resamples", 5, "--least", 20,
        "--classes", 3, "--data", runs / "lora-files" / "rows.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "lora - plain" in done.output
    assert "base" not in done.output.split("Silhouette")[0].split("hidden states")[-1]
    assert [model["name"] for model in _figures(tmp_path / "out")["models"]] == ["plain", "lora"]


def _figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "clusters.json").read_text())
    return found


def test_answers_to_one_question_are_one_document(stories: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {i // 3}", "completion": f"{'the dog and the cat ' * 5}{i}"} for i in range(30)
    ]
    done = analyze(
        stories, "--data", write_rows(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "out",
        "--chat-template", "plain", "--resamples", 3, "--classes", 3,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert _figures(tmp_path / "out")["documents"] == 10
    assert [model["name"] for model in _figures(tmp_path / "out")["models"]] == ["stories260K"]


# ---- refusals ----


def _unfinished(runs: Path, stories: Path, folder: Path) -> list[object]:
    (folder / "half").mkdir()
    (folder / "half" / "config.yaml").write_text((runs / "lora" / "config.yaml").read_text())
    return [folder / "half"]


def _one_document(runs: Path, stories: Path, folder: Path) -> list[object]:
    rows = write_rows(folder / "one.jsonl", [{"prompt": "Hi", "completion": "a b " * 40}])
    return [runs / "lora", "--data", rows]


REFUSALS: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "no folder": (lambda *_: ["./nowhere"], "there is no such folder"),
    "empty folder": (lambda r, s, f: [f], "neither a run nor a model"),
    "file": (lambda r, s, f: [r / "lora" / "config.yaml"], "a file, not a folder"),
    "no weights": (_unfinished, "finish it: ual train"),
    "no hub name": (lambda *_: ["nobody/nothing", "--data", "x.jsonl"], "cannot load the tokenizer"),
    "one name": (lambda r, s, f: [r / "lora", f"lora={r / 'full'}"], "two models have the name 'lora'"),
    "no data": (lambda r, s, f: [s], "models without a run have no samples"),
    "one document": (_one_document, "of 1 document, and intervals need at least 8"),
    "few": (lambda r, s, f: [r / "lora", "--least", 10**6], "0 of"),
    "output": (lambda r, s, f: [r / "lora", "-o", r / "lora" / "config.yaml" / "x"], "cannot write"),
    "umap": (lambda r, s, f: [r / "lora", "--umap"], "pip install umap-learn"),
}


@pytest.mark.kills(PIPELINE, "        clusters.check_umap()\n", "        pass\n", only="umap")
@pytest.mark.kills(PIPELINE, "if RunFolder(path).weights is None:", "if False:", only="no weights")
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do(
    case: str, runs: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    words, said = REFUSALS[case]
    arguments = words(runs, stories, tmp_path)
    if "-o" not in arguments:
        arguments += ["-o", tmp_path / "out"]
    done = analyze(*arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert "hidden states," not in done.output, "no weights are loaded before"
    assert not (tmp_path / "out" / "clusters.json").exists()


@pytest.mark.kills(PIPELINE, "        if own != first:", "        if False:")
def test_models_of_different_tokenizers_are_refused(runs: Path, tiny: Path, tmp_path: Path) -> None:
    done = analyze(runs / "lora", f"bytes={tiny}", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "bytes and base have different tokenizers" in done.output


def test_a_saved_copy_of_the_tokenizer_is_the_same(runs: Path) -> None:
    """The folder of the full model holds a tokenizer that `ual train` saved, with a template."""
    subjects = [pipeline._subject(str(runs / "lora")), pipeline._subject(str(runs / "full" / "model"))]
    assert not subjects[1].trained
    pipeline._check_tokenizers(subjects, False)


@pytest.mark.kills(PIPELINE, "    if not np.isfinite(kept).all():", "    if False:")
def test_states_that_are_not_finite_are_refused(runs: Path, stories: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "broken")
    done = analyze(runs / "lora", tmp_path / "broken", "--no-base", "-o", tmp_path / "out", "--least", 20)
    assert done.exit_code == 2, done.output
    assert "the hidden states of broken are not finite" in done.output


def test_a_scatter_plot_has_at_most_six_colors() -> None:
    points = np.zeros((5, 2))
    with pytest.raises(ValueError, match="at most 6"):
        plots.scatter(points, {f"{i}": [True] * 5 for i in range(7)}, limits=(0, 0, 1, 1), title="t")
    with pytest.raises(ValueError, match="needs points"):
        plots.scatter(np.empty((0, 2)), {}, limits=(0, 0, 1, 1), title="t")
