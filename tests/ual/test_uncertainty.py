"""Estimators of training and the scores that they read: one record per sample, by its id, with evidence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ual.data import Collator
from ual.errors import UserError
from ual.models import fuse
from ual.models.score import score
from ual.records import Message, Sample
from ual.uncertainty.estimators import column, white_box


def sample(i: int, uncertainty: float | None = None) -> Sample:
    turns = (Message("user", f"q{i}"), Message("assistant", f"a{i}"))
    return Sample(str(i), turns, uncertainty=uncertainty)


def test_a_column_keeps_its_missing_values() -> None:
    values = [e.value for e in column.own_uncertainties([sample(0, 0.5), sample(1), sample(2, -3.0)])]
    assert values == [0.5, None, -3.0]


def test_a_column_that_no_sample_has_is_refused() -> None:
    with pytest.raises(UserError, match="white_box"):
        list(column.own_uncertainties([sample(0), sample(1)]))


def test_white_box_is_the_mean_nll_of_the_response(stories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    lengths = [9, 4, 17, 6]
    features = []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 512, (n,)).tolist()
        labels = [-100] * (n // 2) + ids[n // 2 :]
        features.append(
            {"id": str(i), "input_ids": ids, "labels": labels, "label_smoothing": 0.0, "sample_weight": 1.0}
        )
    expected = {}
    for f in features:
        log_p = model(input_ids=torch.tensor([f["input_ids"]])).logits[0, :-1].log_softmax(-1).double()
        selected = torch.tensor(f["labels"][1:]) != -100
        picked = log_p[selected, torch.tensor(f["input_ids"][1:])[selected]]
        expected[f["id"]] = -picked.mean().item()
    fuse(model)
    done: list[int] = []
    by_id = {f["id"]: f for f in features}
    scores = score(model, features, Collator(0), batch_size=3, advance=done.append)
    samples = [sample(i) for i in range(4)]
    elicited = {e.sample_id: e for e in white_box.estimate(samples, scores)}
    assert sum(done) == 4
    assert elicited.keys() == expected.keys()
    for key, value in expected.items():
        assert elicited[key].value == pytest.approx(value, rel=1e-5)
        assert elicited[key].evidence["tokens"] == sum(label != -100 for label in by_id[key]["labels"][1:])


def test_a_sample_without_a_score_is_none_not_a_number() -> None:
    (elicited,) = white_box.estimate([sample(0)], [])
    assert elicited.value is None


def test_scoring_keeps_the_mode_of_the_model(stories: Path) -> None:
    model = fuse(AutoModelForCausalLM.from_pretrained(stories)).train()
    features = [
        {
            "id": "0",
            "input_ids": [1, 2, 3],
            "labels": [-100, 2, 3],
            "label_smoothing": 0.0,
            "sample_weight": 1.0,
        }
    ]
    (scores,) = score(model, features, Collator(0))
    assert model.training
    assert np.isfinite(scores.entropy).all()
    assert scores.correct.dtype == bool
