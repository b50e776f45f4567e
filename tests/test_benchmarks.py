"""The benchmarks' own measurements, reports and commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare, figures, machine, measure, report
from benchmarks.__main__ import app as command_line
from benchmarks.problems import CPU_PROBLEMS, FROZEN, PROBLEMS, SETTINGS, TINY, Setting, exact
from benchmarks.providers import LOGITS_PROVIDERS, PROVIDERS, chosen
from benchmarks.studies import accuracy
from tests.conftest import ROOT
from tests.kernels.cases import linear_definition

WITHOUT_GATES = "not near_the_bare and not near_one_class"


@pytest.mark.kills(
    "benchmarks/problems.py",
    "dz.scatter_add_(1, y, (s - 1)[:, None] * p)",
    "dz.scatter_add_(1, y, -torch.ones_like(s)[:, None] * p)",
)
@pytest.mark.kills(
    "benchmarks/problems.py", '"dA": scale * (b.T @ gradients["dC"])', '"dA": b.T @ gradients["dC"]'
)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_the_exact_answer_is_the_definition(setting: Setting, device: torch.device) -> None:
    case = TINY.case(setting, device, torch.float64)
    case = case._replace(head=case.head.detach().requires_grad_())
    wanted = case.differentiable()
    truth = linear_definition(
        case.hidden, case.soft or case.target, linear_weight=case.merged().head,
        label_smoothing=case.smoothing, sample_weight=case.weight, reduction=case.reduction,
    )  # fmt: skip
    gradients = torch.autograd.grad(truth, list(wanted.values()), case.upstream)
    found = exact(case)
    assert list(wanted) == (["dE", "dC", "dA", "dB"] if setting.lora else ["dE", "dC"])
    torch.testing.assert_close(found.token_losses if case.reduction == "none" else found.loss, truth)
    torch.testing.assert_close([found.gradients[name] for name in wanted], list(gradients))


def test_the_exact_answer_of_given_logits_is_the_definition(device: torch.device) -> None:
    case = TINY.logits(device, torch.float64)
    eye = torch.eye(TINY.vocab, dtype=torch.float64, device=device)
    truth = linear_definition(case.hidden, case.target, linear_weight=eye, label_smoothing=case.smoothing)
    found = exact(case)
    torch.testing.assert_close(found.loss, truth)
    torch.testing.assert_close(found.gradients["dz"], torch.autograd.grad(truth, case.hidden)[0])


def test_a_machine_has_the_name_of_a_folder() -> None:
    found = machine.describe()
    assert found["machine"]
    assert set(found["machine"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert found["cpu"]["cores"] >= 1


def test_providers_go_by_name() -> None:
    assert [p.name for p in chosen(PROVIDERS, ["ours"])] == ["ours"]
    assert len(chosen(PROVIDERS, ["ours*"])) == 4
    assert chosen(PROVIDERS, []) == list(PROVIDERS)
    with pytest.raises(
        ValueError,
        match=r"unknown provider 'our'; give a name or a prefix ending in \*\. Available: ours;",
    ):
        chosen(PROVIDERS, ["our"])


def test_providers_without_triton_kernels_run_without_triton() -> None:
    program = (
        "import sys; import benchmarks.interpreted; sys.modules['triton'] = None\n"
        "from benchmarks.measure import errors\n"
        "from benchmarks.problems import FROZEN, TINY\n"
        "from benchmarks.providers import PROVIDERS, MissingError, chosen\n"
        "import torch\n"
        "case = TINY.case(FROZEN, torch.device('cpu'), torch.bfloat16)\n"
        "print(errors(chosen(PROVIDERS, ['ours'])[0].load(), case)['dE'])\n"
        "try:\n    chosen(PROVIDERS, ['ours, triton fused'])[0].load()\n"
        "except MissingError as error:\n    print(error)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    error, said = done.stdout.splitlines()
    assert float(error) < 1e-2
    if not torch.cuda.is_available():
        assert said.startswith("triton")


@pytest.mark.parametrize("value", [2.3e-3, float("nan"), None])
def test_a_missed_target_is_seen(value: float | None) -> None:
    found: dict[str, Any] = {"loss": 1e-6, "hidden": value, "unrounded": 5e-4}
    assert accuracy.missed(found) == [f"hidden is {value}; at most 0.0022 is allowed"]
    assert accuracy.missed(found | {"hidden": 1.8e-3}) == []


# ---- the suites, in a pytest of their own ----


def suite(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    results = folder / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--results", str(results)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    return done, results


@pytest.mark.slow
def test_an_incorrect_provider_is_not_timed_and_a_slow_one_is_last(tmp_path: Path) -> None:
    names = [
        "ours",
        "naive",
        "sleeps",
        "ignores smoothing",
        "drops a token",
        "raises",
        "too large",
        "missing",
    ]
    wanted = [part for name in names for part in ("--provider", name)]
    done, results = suite(
        tmp_path, "-p", "tests.plugins.strangers", "benchmarks/suites/bench_linear_cross_entropy.py",
        "--smoke", "--setting", "frozen", "-k", WITHOUT_GATES, *wanted,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = report.load(results)
    rows = {r["provider"]: r for r in found["rows"]}
    assert list(rows) == ["ours", "naive", *names[2:]]
    told = {name: report.failure(row) for name, row in rows.items()}
    assert told["ours"] == told["naive"] == told["sleeps"] == ""
    assert re.match(
        r"incorrect: relative error of dE is \d\.\de-01; at most 0.06 is allowed", told["ignores smoothing"]
    )
    assert told["drops a token"].startswith("incorrect: ")
    assert told["raises"] == "raised: ZeroDivisionError: by design"
    assert told["too large"] == "raised: out of memory: by design"
    assert told["missing"] == "skipped: stranger is not installed: pip install stranger"
    assert {name for name, row in rows.items() if "seconds" in row} == {"ours", "naive", "sleeps"}
    assert rows["sleeps"]["errors"]["dE"] < 1e-2
    assert rows["sleeps"]["of_ours"] > 1 == rows["ours"]["of_ours"]
    page = report.markdown(found)
    ranks = [page.index(f"| {name} ") for name in ("naive", "sleeps", "raises")]
    assert ranks == sorted(ranks)
    assert page.index("**ours**") < page.index("| sleeps ")
    assert "Not measured (stranger is not installed: pip install stranger): missing." in page
    assert "raises: ZeroDivisionError: by design" in done.stdout  # and the terminal says so, too


@pytest.mark.kills("benchmarks/suites/bench_linear_cross_entropy.py", "assert best <= GATE", "assert best")
@pytest.mark.kills(
    "benchmarks/suites/bench_linear_cross_entropy.py", "assert best <= SOFT_GATE", "assert best"
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("near_the_bare", r"ours / bare products is \d+\.\d\d, best of each; at most 3.0 is allowed"),
        ("near_one_class", r"20 classes / one class is \d+\.\d\d, best of each; at most 1.15 is allowed"),
    ],
)
@pytest.mark.slow
def test_the_gate_sees_a_slow_loss(name: str, message: str, tmp_path: Path) -> None:
    """Ours contains the bare products, so five times ours is above the bound on every machine.

    With targets of several classes, ours runs ten times, twice as often as with class indices.
    """
    gate = ("benchmarks/suites/bench_linear_cross_entropy.py", "--smoke", "-k", name)
    few = ("--rows", "128", "--rounds", "3")
    done, results = suite(tmp_path, "-p", "tests.plugins.repeated_ours", *gate, *few)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = report.load(results)["rows"]
    assert re.search(message, row["raised"])


@pytest.mark.kills("benchmarks/measure.py", "return min(DTYPES, key=best)", "return max(DTYPES, key=best)")
def test_the_gate_compares_with_the_faster_products() -> None:
    """bfloat16 is at least twice as fast as float32 on CPUs with units for it, half as fast on others."""
    small = measure.slice_of(CPU_PROBLEMS[0])
    times = {}
    for name, dtype in measure.DTYPES.items():
        step = measure.products(small.case(FROZEN, measure.DEVICE, dtype), FROZEN)
        times[name] = min(measure.seconds(step) for _ in range(3))
    assert times[measure.faster_dtype(small)] < 1.25 * min(times.values())


@pytest.mark.slow
def test_every_suite_runs_and_its_report_is_complete(tmp_path: Path) -> None:
    names = ("ours", "ours, fast", "ours, triton fused", "naive", "torch chunked", "liger fused linear")
    few = [word for name in names for word in ("--provider", name)]
    done, results = suite(tmp_path, "benchmarks/suites", "--smoke", "-k", WITHOUT_GATES, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.load(results)
    suites = {"linear_cross_entropy", "cross_entropy", "scaling", "accuracy", "train_step"}
    assert {r["suite"] for r in found["rows"]} == suites
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["machine"]["commit"]
    soft = [r for r in found["rows"] if r.get("setting") == "soft-targets" and "seconds" in r]
    assert {r["provider"]: "of_one_class" in r for r in soft} == {
        "ours": True, "ours, fast": True, "naive": False
    }  # fmt: skip
    drawn = report.plots(found, tmp_path / "results")
    assert [path.name for path in drawn] == ["results-time.svg"]  # a smoke run measures no memory
    assert all(path.with_suffix(".png").stat().st_size > 10_000 for path in drawn)
    page = report.markdown(found, [path.name for path in drawn])
    for heading in (
        "## Hidden states and head in",
        "## Logits in",
        "## Error against float64",
        "### N grows; ",
        " x the time with class indices",
        "no support for targets of several classes",
    ):
        assert heading in page
    assert "nan" not in page


@pytest.mark.kills("benchmarks/grid.py", "return not off", "return True")
@pytest.mark.kills("benchmarks/suites/conftest.py", 'test["params"] = {', 'test["unused"] = {')
@pytest.mark.slow
def test_the_options_of_pytest_benchmark(tmp_path: Path) -> None:
    few = ("benchmarks/suites/bench_cross_entropy.py", "--smoke", "--provider", "naive")
    storage = f"--benchmark-storage={tmp_path / 'saved'}"
    done, results = suite(tmp_path, *few, "--benchmark-disable")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 run, 0 skipped, 0 failed; --benchmark-disable: nothing was recorded" in done.stdout
    assert not results.exists()
    written = tmp_path / "written.json"
    done, _ = suite(tmp_path, *few, storage, "--benchmark-save=first", f"--benchmark-json={written}")
    assert done.returncode == 0, done.stdout + done.stderr
    (test,) = json.loads(written.read_text())["benchmarks"]
    assert test["params"] == {"problem": "tiny", "dtype": "bf16", "provider": "naive"}
    seconds = sorted(report.load(results)["rows"][0]["seconds"]["it"])
    assert (test["stats"]["min"], test["stats"]["max"]) == pytest.approx((seconds[0], seconds[-1]))
    done, _ = suite(
        tmp_path, *few, storage, "--benchmark-compare=0001", "--benchmark-compare-fail=min:10000%"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_first)" in done.stdout
    assert "(NOW)" in done.stdout


REFUSED = {
    ("--problem", "no-model"): "--problem: unknown name 'no-model'; available: gemma2, ",
    ("--setting", "thawed"): "--setting: unknown name 'thawed'; available: frozen, ",
    ("--provider", "our"): "--provider: unknown provider 'our'; give a name",
    ("--rounds", "0"): "--rounds must be at least 1, got 0",
    ("--benchmark-min-rounds", "2"): "--benchmark-min-rounds has no effect: the form sets clock",
    ("--benchmark-timer=time.time",): "--benchmark-timer has no effect: the form sets clock",
    ("-n", "2"): "benchmarks run one after another; run them without -n",
}


def test_refuses(tmp_path: Path) -> None:
    """All in one process: importing the suites takes far longer than refusing."""
    results = tmp_path / "results.json"
    program = (
        "import json, sys\n"
        "import pytest\n"
        "common, *attempts = json.loads(sys.argv[1])\n"
        "for attempt in attempts:\n"
        "    code = pytest.main([*common, *attempt])\n"
        "    print('exit code', int(code), file=sys.stderr)\n"
    )
    common = ["-p", "no:cacheprovider", "benchmarks/suites/bench_scaling.py", "--results", str(results)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", program, json.dumps([common, *REFUSED])]
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    *attempts, rest = done.stderr.split("exit code 4\n")
    assert rest == ""
    assert len(attempts) == len(REFUSED), done.stderr
    for attempt, (arguments, said) in zip(attempts, REFUSED.items(), strict=True):
        assert said in attempt, arguments
    assert not results.exists()


def test_the_full_form_is_the_default(tmp_path: Path) -> None:
    done, _ = suite(tmp_path, "benchmarks/suites/bench_scaling.py", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[rows-4096-ours" in done.stdout


# ---- report ----


@pytest.mark.kills("benchmarks/report.py", "(y - my) for x, y in logs", "y for x, y in logs if x > mx")
@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_a_slope_is_the_power(power: float) -> None:
    assert report.slope([(n, 3.0 * n**power) for n in (64, 256, 512, 4096)]) == pytest.approx(
        power, abs=1e-12
    )


@pytest.mark.kills(
    "benchmarks/report.py", 'if "seconds" in row else math.inf', 'if "seconds" in row else 0.0'
)
def test_a_row_without_numbers_is_ranked_last() -> None:
    assert report.time({"wrong": "x"}) > report.time({"seconds": {"it": [1e9]}})


@pytest.mark.parametrize("name", figures.PAGES)
def test_quoted_figures_are_those_of_the_committed_results(name: str) -> None:
    """`python -m benchmarks report --docs` renews a stale page."""
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    assert "<!-- figures " in text
    assert figures.renewed(text, page) == text


@pytest.mark.kills("benchmarks/figures.py", "return _REGION.sub(region, text)", "return text")
def test_a_stale_figure_is_renewed() -> None:
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    stale = re.sub(r"this ratio is [\d.]+", "this ratio is 0.1", text)
    assert stale != text
    assert figures.renewed(stale, page) == text


@pytest.mark.kills(
    "benchmarks/figures.py", 'text.count("<!-- figures ") != 2 * len(_REGION.findall(text))', "False"
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- figures speed: begin -->\n<!-- figures speed: end -->",
            "unknown figures 'speed'; available: summary, ",
        ),
        ("<!-- figures gate: begin -->\n", "do not match"),
    ],
)
def test_invalid_regions_of_figures_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.renewed(text, ROOT / "README.md")


def test_committed_pages_are_those_of_their_results() -> None:
    for path in machine.RESULTS.glob("*/*.json"):
        names = {p.name for p in path.parent.glob(f"{path.stem}-*.svg")}
        drawn = [f"{path.stem}-{name}.svg" for name in ("time", "memory", "error")]
        page = path.with_suffix(".md").read_text(encoding="utf-8")
        assert report.markdown(report.load(path), [name for name in drawn if name in names]) == page


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}'])
def test_a_file_without_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: (cannot read results|not a results file)"):
        report.load(path)


# ---- plots of a GPU ----


@pytest.mark.kills("benchmarks/figures.py", '"ours", "peers", "unsloth"', '"ours", "peers"')
def test_the_plot_of_a_gpu_has_every_implementation_of_its_table(tmp_path: Path) -> None:
    path = next((ROOT / "benchmarks" / "results").glob("*/gpu/*b93a87c4ea35-record.jsonl"))
    rows = figures.gpu_rows(path)
    assert {(r["problem"], r["vocab"]) for r in rows} == {("llama3", 128_256), ("gemma2", 256_000)}
    llama3 = {f"{r['provider']} {r['solves']}": r["of_products"] for r in rows if r["problem"] == "llama3"}
    assert len(llama3) == 11
    assert min(llama3, key=llama3.__getitem__) == "ours s per token"
    assert {"unsloth-zoo s = 0", "unsloth-zoo one s = 0.1", "naive s per token"} <= llama3.keys()
    [drawn] = report.plots({"rows": rows}, tmp_path / "record")
    assert drawn.with_suffix(".png").stat().st_size > 10_000
    (tmp_path / "none.jsonl").write_text('{"stage": "canary", "what": "tma frozen", "verdict": "correct"}\n')
    with pytest.raises(ValueError, match="no steps with a frozen head"):
        figures.gpu_rows(tmp_path / "none.jsonl")


# ---- compare ----


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"suite": "linear_cross_entropy", "problem": "p", "setting": "frozen", "dtype": "bf16"}
    return {"machine": {}, "form": "full", "rows": [about | r for r in rows]}


def timed(name: str, factor: float, slower: float = 1.0, **more: Any) -> dict[str, Any]:
    """Rounds that wander by a tenth, on a machine whose speed wanders by half."""
    clock = [slower * (1 + 0.5 * (i % 3)) for i in range(15)]
    noise = [1 + 0.02 * ((7 * i) % 11 - 5) for i in range(15)]
    it = [factor * c * n for c, n in zip(clock, noise, strict=True)]
    return {"provider": name, "ours": True, "seconds": {"it": it, "products": clock}} | more


@pytest.mark.kills("benchmarks/compare.py", "bool(low > 1 + tolerance)", "bool(ratio > 1 + tolerance)")
@pytest.mark.kills(
    "benchmarks/compare.py", 'np.asarray(s["it"]) / np.asarray(s[limit])', 'np.asarray(s["it"])'
)
def test_a_regression_is_one_beyond_its_noise() -> None:
    factors = {"a": (1.2, 1.5), "b": (1.2, 1.21), "c": (1.2, 0.9), "perhaps": (1.0, 1.07)}
    before = results(*(timed(name, old) for name, (old, _) in factors.items()), timed("gone", 1))
    after = results(*(timed(name, new, 1.6) for name, (_, new) in factors.items()))
    found = compare.compare(before, after)
    verdicts = {c.row.split()[-1]: c for c in found.changes}
    assert [name for name, c in verdicts.items() if c.regressed] == ["a"]
    assert verdicts["a"].ratio == pytest.approx(1.25)
    assert verdicts["a"].low < 1.25 < verdicts["a"].high
    assert verdicts["perhaps"].low < 1.05 < verdicts["perhaps"].ratio
    assert [name.split()[-1] for name in found.only_a] == ["gone"]
    assert found.only_b == []
    assert not any(c.regressed for c in compare.compare(before, after, tolerance=0.3).changes)


@pytest.mark.kills("benchmarks/compare.py", "ratio <= ERROR_MARGIN", "ratio >= 0")
def test_memory_errors_and_failures_are_regressions_too() -> None:
    old = {"peak_bytes": 100 << 20, "errors": {"loss": 1e-5, "dE": 2e-3}}
    before = results(timed("a", 1.0, **old), timed("b", 1.0))
    after = results(
        timed("a", 1.0, peak_bytes=140 << 20, errors={"loss": 3e-5, "dE": 1e-2}),
        {"provider": "b", "wrong": "dE"},
    )
    found = compare.compare(before, after)
    assert {c.what for c in found.changes if c.regressed} == {"memory", "error of dE"}
    assert [f.split()[-2:] for f in found.failed] == [["b:", "dE"]]


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.4, 1)])
def test_the_command_tells_by_its_exit_status(tmp_path: Path, factor: float, status: int) -> None:
    for name, value in (("a", 1.0), ("b", factor)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(timed("ours", value))))
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "compare",
        str(tmp_path / "a.json"),
        str(tmp_path / "b.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert f"{status} regressed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_tables_are_printed_as_json(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(timed("ours", value))))
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = CliRunner().invoke(command_line, ["compare", *paths, "--json"])
    assert done.exit_code == 1
    (change,) = json.loads(done.stdout)["changes"]
    assert (change["what"], change["regressed"]) == ("time", True)
    assert change["ratio"] == pytest.approx(1.4)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "list", "--json"]  # imports the peers
    listed = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert {row["problem"] for row in listed["problems"]} == set(PROBLEMS)
    assert [row["provider"] for row in listed["providers"]["logits"]] == [p.name for p in LOGITS_PROVIDERS]


def test_without_the_text_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path / "main")
    with pytest.raises(
        accuracy.NothingToMeasureError, match=r"GSM8K is missing: .*give hidden states with --states"
    ):
        accuracy.real_states(1)
