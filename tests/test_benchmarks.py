"""What the benchmarks measure with is right itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, machine
from benchmarks.problems import SETTINGS, TINY, Setting, exact
from benchmarks.providers import PROVIDERS, chosen
from tests.conftest import ROOT
from tests.kernels.cases import linear_definition


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_the_exact_answer_is_the_definition(setting: Setting, device: torch.device) -> None:
    case = TINY.case(setting, device, torch.float64)
    hidden, head = case.hidden.detach().requires_grad_(), case.head.detach().requires_grad_()
    truth = linear_definition(
        hidden, case.target, linear_weight=head, label_smoothing=case.smoothing, sample_weight=case.weight,
        reduction=case.reduction,
    )  # fmt: skip
    gradients = torch.autograd.grad(truth, (hidden, head), case.upstream)
    found = exact(case)
    torch.testing.assert_close(found.rows if case.reduction == "none" else found.loss, truth)
    torch.testing.assert_close((found.hidden, found.head), gradients)


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
        ValueError, match="nobody is called 'our'; wanted a name, or its start and \\*: ours;"
    ):
        chosen(PROVIDERS, ["our"])


@pytest.mark.parametrize("value", [2.3e-3, float("nan"), None])
def test_a_missed_target_is_seen(value: float | None) -> None:
    record: dict[str, Any] = {
        "provider": "ours",
        "ours": "high",
        "loss": 1e-6,
        "hidden": value,
        "unrounded": 5e-4,
    }
    assert accuracy.missed([record]) == [f"ours: hidden {value}, wanted at most 0.0022"]
    assert accuracy.missed([record | {"ours": "fast"}]) == []
    assert accuracy.missed([record | {"raised": "Error: x"}]) == ["ours raised Error: x"]


def test_without_the_text_it_says_that_it_measured_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path / "main")
    assert accuracy.main([]) == accuracy.SKIPPED == 3
    said = capsys.readouterr().out
    assert said.startswith("SKIPPED, nothing was measured: GSM8K is not here: ")
    assert "give hidden states with --states" in said


@pytest.mark.slow
def test_peers_are_as_accurate_interpreted_as_their_arithmetic_allows(tmp_path: Path) -> None:
    """In a process of its own, for the repairs of the interpreter stay."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy", "--random", "--tokens", "9"]
    command += ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "a.json").read_text())["records"]
    assert [r["provider"] for r in records[1:]] == [p.name for p in PROVIDERS]
    for record in records:
        assert "raised" not in record, record
        assert "skipped" in record or record["hidden"] < 1e-2, record
