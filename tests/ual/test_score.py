"""Scoring shared out over processes: the same scores, and equally many forward passes in each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ual.data import Collator
from ual.models import fuse, score


def features(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        ids = torch.randint(3, 264, (6 + i,)).tolist()
        rows.append({"id": f"row {i}", "input_ids": ids, "labels": [-100, *ids[1:]]})
    return [row | {"label_smoothing": 0.0, "sample_weight": 1.0} for row in rows]


@pytest.mark.kills(
    "ual/models/score.py", "            if mine >= len(starts):\n                continue\n", ""
)
@pytest.mark.kills("ual/models/score.py", "mine = turn * world_size + rank", "mine = turn * world_size")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shares_together_are_the_whole(tiny: Path, world_size: int) -> None:
    model = fuse(AutoModelForCausalLM.from_pretrained(tiny))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    rows, collate = features(5), Collator(0)
    whole = {s.sample_id: s for s in score(model, rows, collate, batch_size=2)}
    assert len(passes) == 3
    shares, counts = [], []
    for rank in range(world_size):
        passes.clear()
        shares.append(list(score(model, rows, collate, batch_size=2, share=(rank, world_size))))
        counts.append(len(passes))
    assert len(set(counts)) == 1, "partitioned weights are gathered by all or by none"
    together = [scores for share in shares for scores in share]
    assert sorted(s.sample_id for s in together) == sorted(whole)
    for scores in together:
        assert np.array_equal(scores.log_prob, whole[scores.sample_id].log_prob)
