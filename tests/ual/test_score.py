"""Scores divided over processes: the same scores, and equally many forward passes in each process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ual.data import Collator
from ual.models import fuse
from ual.models.score import score


def features(count: int) -> list[dict[str, Any]]:
    samples = []
    for i in range(count):
        ids = torch.randint(3, 264, (6 + i,)).tolist()
        samples.append({"id": f"sample {i}", "input_ids": ids, "labels": [-100, *ids[1:]]})
    return [sample | {"label_smoothing": 0.0, "sample_weight": 1.0} for sample in samples]


@pytest.mark.kills(
    "ual/models/score.py", "            if index >= len(batches):\n                continue\n", ""
)
@pytest.mark.kills("ual/models/score.py", "index = turn * world_size + rank", "index = turn * world_size")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shares_together_are_all_scores(tiny: Path, world_size: int) -> None:
    model = fuse(AutoModelForCausalLM.from_pretrained(tiny))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    samples, collate = features(5), Collator(0)
    expected = {s.sample_id: s for s in score(model, samples, collate, batch_size=2)}
    assert len(passes) == 3
    shares, counts = [], []
    for rank in range(world_size):
        passes.clear()
        shares.append(list(score(model, samples, collate, batch_size=2, share=(rank, world_size))))
        counts.append(len(passes))
    assert len(set(counts)) == 1, "partitioned weights are gathered by all processes or by none"
    together = [scores for share in shares for scores in share]
    assert sorted(s.sample_id for s in together) == sorted(expected)
    for scores in together:
        assert np.array_equal(scores.log_prob, expected[scores.sample_id].log_prob)
