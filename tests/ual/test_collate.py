"""Batches: padding, and the weight of a sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ual.data import Collator
from ual.errors import UserError


def feature(labels: list[int], smoothing: float = 0.0, weight: float = 1.0) -> dict[str, object]:
    return {
        "input_ids": [label if label != -100 else 9 for label in labels],
        "labels": labels,
        "label_smoothing": smoothing,
        "sample_weight": weight,
        "id": "a",
    }


def test_a_batch_by_hand():
    batch = Collator(pad_token_id=2, pad_to_multiple_of=4)(
        [feature([-100, 4, 2], 0.1, 2.0), feature([-100, -100, 5, 6, 2], 0.25, 0.0)]
    )
    assert batch.pop("max_loss_tokens") == 2 + 3
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, [[9, 4, 2, 2, 2, 2, 2, 2], [9, 9, 5, 6, 2, 2, 2, 2]]),
        "attention_mask": (torch.int64, [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]),
        "labels": (
            torch.int64,
            [[-100, 4, 2, -100, -100, -100, -100, -100], [-100, -100, 5, 6, 2, -100, -100, -100]],
        ),
        "label_smoothing": (torch.float32, torch.tensor([0.1, 0.25]).tolist()),
        "sample_weight": (torch.float32, [2.0, 0.0]),
    }


rows = st.lists(
    st.tuples(
        st.lists(st.sampled_from([-100, 3, 4]), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 100)
    ),
    min_size=1,
    max_size=5,
)


@given(rows, st.integers(1, 16))
def test_laws(rows, multiple):
    features = [feature(*row) for row in rows]
    batch = Collator(0, multiple)(features)
    longest = max(len(labels) for labels, _, _ in rows)
    T = batch["input_ids"].shape[1]
    assert T % multiple == 0
    assert longest <= T < longest + multiple
    for i, (labels, smoothing, weight) in enumerate(rows):
        n = len(labels)
        assert batch["input_ids"][i].tolist() == features[i]["input_ids"] + [0] * (T - n)
        assert batch["labels"][i].tolist() == labels + [-100] * (T - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (T - n)
        assert batch["label_smoothing"][i] == torch.tensor(smoothing)
        assert batch["sample_weight"][i] == torch.tensor(weight)


@given(rows)
def test_averaging_over_samples_gives_each_row_its_weight_however_long(rows):
    features = [feature(*row) for row in rows]
    batch = Collator(0, average="samples")(features)
    live = (batch["labels"][:, 1:] != -100).sum(1)
    for i, (labels, _, weight) in enumerate(rows):
        expected = weight if any(label != -100 for label in labels[1:]) else 0.0
        assert (batch["sample_weight"][i] * live[i]).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(batch["sample_weight"]).all()


@pytest.mark.parametrize("name", ["label_smoothing", "sample_weight"])
def test_a_lost_column_is_refused(name):
    row = feature([-100, 3])
    del row[name]
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        Collator(0)([feature([-100, 3]), row])


def test_a_data_loader_takes_it():
    dataset = [feature([-100, 3]), feature([-100, 3, 4])]
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=Collator(0)))
    assert [batch["labels"].shape for batch in batches] == [(2, 8)]
