"""A new loss kind, estimator or arm is one file: each is tried in a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ual.runs import ENVIRONMENT, configure

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"prompt": f"{i} + {i}?", "completion": f"{2 * i}", "uncertainty": i / 10} for i in range(8)]
LOSS_KIND = """
LOSS_KINDS["focused"] = LossKind(
    "A loss for this test: MiLe's weights under another name",
    weights="made",
    preset="mile",
    options={"gamma": (_Finite, 2.0), "sigma": (_Finite, 1.0)},
)
"""
ESTIMATOR = '''
"""u = the length of the response, for this test."""

from typing import Literal

from ual.records import Elicited, Sample
from ual.uncertainty.protocol import Ask, Estimator


class Length(Estimator):
    """u = characters of the response / 1000."""

    name: Literal["length"] = "length"

    async def estimate(self, sample: Sample, ask: Ask) -> Elicited:
        return Elicited(sample.id, self.label, len(sample.response) / 1000)
'''


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in ("ual", "ual_kernels"):
        shutil.copytree(
            ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path / "tree"


def run(tree: Path, *words: object) -> str:
    command = [sys.executable, "-m", "ual", *map(str, words)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(tree / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_loss_kind_is_a_record(copy: Path, tmp_path: Path, tiny: Path) -> None:
    with (copy / "ual" / "config" / "objectives.py").open("a") as file:
        file.write(LOSS_KIND)
    config = configure(tmp_path, tiny, ROWS, training={"max_steps": 1}, data={"eval_fraction": 0.3})
    assert "loss focused" in run(copy, "train", config, "loss=focused", "loss.gamma=3", "--dry-run")
    assert "focused" in run(copy, "train", config, "loss=focused", "loss.gamma=3", "name=focused")
    assert "another name" in (tmp_path / "run" / "report.html").read_text()


def test_an_estimator_is_a_file(copy: Path, tmp_path: Path) -> None:
    (copy / "ual" / "uncertainty" / "estimators" / "length.py").write_text(ESTIMATOR)
    configure(tmp_path, tmp_path, ROWS)
    config = tmp_path / "elicit.yaml"
    backend = {"kind": "endpoint", "model": "none", "base_url": "http://127.0.0.1:1/v1"}
    values = {"data": str(tmp_path / "rows.jsonl"), "backend": backend, "estimators": ["length"]}
    config.write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "elicited")}))
    assert "length 0" in run(copy, "elicit", config, "--dry-run")
    run(copy, "elicit", config)
    assert '"uncertainty": 0.001' in (tmp_path / "elicited" / "rows.jsonl").read_text()


@pytest.mark.slow
def test_an_arm_is_a_mapping(copy: Path, tmp_path: Path, tiny: Path) -> None:
    base = yaml.safe_load(configure(tmp_path, tiny, ROWS, uncertainty="column").read_text())
    del base["output_dir"]
    arms = {"sft": {"loss": "sft"}, "careful": {"smoothing": {"map": "power", "power": 3}}}
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump({"base": base, "arms": arms}, sort_keys=False))
    assert "careful seeds 42" in run(copy, "compare", config, "--dry-run")
