"""Streamed samples are those of the file: checked first, then each once per epoch, in the epoch's order."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from tests.ual.runs import configure, history, write_rows
from ual.config import run as configuration
from ual.data import PackedCollator, load, stream
from ual.data import training_set as rows
from ual.errors import UserError
from ual.pipelines.train import run

ROWS = [
    {"id": i, "prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": (7 * i) % 30,
     "source": "even" if i % 2 == 0 else "odd"}
    for i in range(30)
]  # fmt: skip
STREAMED = {"streaming": True, "overlong": "drop", "shuffle_buffer": 8}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_the_same_samples_as_all_at_once(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
    assert [sample for _, sample in stream(str(path))] == load(str(path))


def test_a_wrong_row_is_named_with_its_place(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], ROWS[3] | {"completion": 3}])
    found = stream(str(path))
    assert [next(found)[1].id for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r'line 4, field "completion": expected a string'):
        next(found)
    with pytest.raises(UserError, match="no such file"):
        next(stream(str(tmp_path / "none.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no samples"):
        next(stream(str(tmp_path / "empty.jsonl")))


@pytest.fixture
def settings(tmp_path: Path, tiny: Path) -> configuration.RunConfig:
    path = configure(tmp_path, tiny, ROWS, data=STREAMED, uncertainty="column")
    return configuration.load(path)


def streamed(settings: configuration.RunConfig, tiny: Path) -> rows.TrainingSet:
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    class Model:
        max_position_embeddings = 512

        def get_text_config(self) -> "Model":
            return self

    return rows.streamed(settings, rows.renderer(settings, tokenizer, Model()))


def test_smoothing_by_rank_needs_the_first_pass(settings: configuration.RunConfig, tiny: Path) -> None:
    """Every sample has the smoothing that it has if all are in memory, in any order of reading."""
    found = streamed(settings, tiny)
    expected = {
        s.sample.id: s.label_smoothing
        for s in rows.score(
            load(settings.data.train),
            [rows.Elicited(str(r["id"]), "column", r["uncertainty"]) for r in ROWS],
            settings,
        ).samples
    }
    for epoch in (0, 1):
        found.dataset.set_epoch(epoch)
        epoch_rows = list(found.dataset)
        assert {row["id"]: row["label_smoothing"] for row in epoch_rows} == expected
        assert Counter(row["id"] for row in epoch_rows) == dict.fromkeys(expected, 1)
    assert found.count == 30
    assert found.mean_smoothing == pytest.approx(0.1)
    assert [s.label_smoothing for s in found.shown] == [expected[s.sample.id] for s in found.shown]
    names = found.groups.names
    for row in epoch_rows:
        source, quantile = (names[i] for i in row["groups"])
        original = ROWS[int(row["id"])]
        assert source == f"source/{original['source']}"
        assert quantile == f"uncertainty/q{1 + min(3, int(4 * original['uncertainty'] / 29))}"


@pytest.mark.kills(
    "ual/data/streaming.py", "default_rng([self._seed, self._epoch])", "default_rng(self._seed)"
)
@pytest.mark.kills(
    "ual/data/streaming.py", "islice(samples, self._buffer)", "islice(samples, self._buffer - 1)"
)
def test_an_epochs_order_is_its_own_and_always_the_same(
    settings: configuration.RunConfig, tiny: Path
) -> None:
    orders = []
    for epoch in (0, 1, 0):
        found = streamed(settings, tiny).dataset
        found.set_epoch(epoch)
        orders.append([row["id"] for row in found])
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0], key=int)
    # shuffled within blocks of 8 samples, so that no more is ever in memory
    assert all(int(i) // 8 == place // 8 for place, i in enumerate(orders[0]))


@pytest.mark.kills("ual/data/streaming.py", "        if count != len(self._smoothing):", "        if False:")
@pytest.mark.parametrize(
    ("lines", "message"),
    [(29, "expected 30 samples, got fewer"), (31, "expected 30 samples, got more"), (None, "no such file")],
    ids=["shorter", "longer", "gone"],
)
def test_a_file_that_changes_under_a_run_stops_it(
    settings: configuration.RunConfig, tiny: Path, lines: int | None, message: str
) -> None:
    rows, file = streamed(settings, tiny).dataset, Path(settings.data.train)
    if lines is None:
        file.unlink()
    else:
        write_rows(file, [*ROWS, {**ROWS[0], "id": "new"}][:lines])
    with pytest.raises(UserError, match=message):
        list(rows)


def test_packs_of_a_stream_hold_every_row_once(settings: configuration.RunConfig, tiny: Path) -> None:
    packing = settings.model_copy(update={"data": settings.data.model_copy(update={"packing": True})})
    packs = list(streamed(packing, tiny).dataset)
    assert sorted(int(row["id"]) for p in packs for row in p["rows"]) == list(range(30))
    assert max(sum(len(row["input_ids"]) for row in p["rows"]) for p in packs) <= 192
    assert len(packs) < 30
    assert PackedCollator(0)(packs[:2])["max_loss_tokens"] > 0


@pytest.mark.slow
def test_a_streamed_and_packed_run_resumes_as_if_nothing_had_happened(tmp_path: Path, tiny: Path) -> None:
    data = STREAMED | {"packing": True, "max_length": 128}
    curves = []
    for name, steps in (("whole", [6]), ("stopped", [4, 6])):
        (tmp_path / name).mkdir()
        path = configure(tmp_path / name, tiny, ROWS, data=data, uncertainty="column")
        for i, count in enumerate(steps):
            result = run(
                configuration.load(
                    path, [f"training.max_steps={count}", "training.lr_scheduler_type=constant"]
                ),
                resume=i > 0,
            )
        curves.append([(row["step"], row["loss"]) for row in history(tmp_path / name / "run")])
        assert result.metrics["steps"] == 6
        assert result.metrics["trained_rows"] == 30
        assert result.metrics["mean_smoothing"] == pytest.approx(0.1)
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_steps=-1"], "set training.max_steps"),
        (["data.overlong=refuse"], "cannot refuse a long sample in time"),
        (["data.eval_fraction=0.1"], "name held-out samples in data.eval"),
        (["uncertainty=white_box"], "add a column of uncertainties"),
        (["training.dataloader_num_workers=2"], "reads in one process"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_by_name(
    overrides: list[str], message: str, tmp_path: Path, tiny: Path
) -> None:
    path = configure(tmp_path, tiny, ROWS, data=STREAMED, uncertainty="column")
    with pytest.raises(UserError, match=message):
        configuration.load(path, overrides)
