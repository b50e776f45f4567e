"""A sample for each assistant turn, and the date of a run, from the configuration to the run folder."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ual.runs import configure
from tests.ual.test_render import near_today
from ual.config.base import dump, parse_as
from ual.config.experiment import ExperimentConfig
from ual.config.run import RunConfig, load
from ual.data import Stream, training_set
from ual.errors import UserError
from ual.pipelines import samples
from ual.pipelines.experiment import checked
from ual.pipelines.preview import preview
from ual.pipelines.train import run
from ual.report import card

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
# as Qwen3's: the reasoning of earlier turns is not rendered
FORGETS = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
DATED = "{{ strftime_now('%Y-%m-%d') }}" + FORGETS


def conversation(number: int, turns: int) -> dict[str, Any]:
    chat = []
    for turn in range(turns):
        said = {"role": "assistant", "content": f"a{number}{turn}", "reasoning_content": f"r{number}{turn}"}
        chat += [{"role": "user", "content": f"q{number}{turn}"}, said]
    about = {"id": f"c{number}", "uncertainty": float(number), "sample_weight": 1.0 + number}
    return about | {"messages": chat}


ROWS = [conversation(number, 1 + number % 3) for number in range(9)]  # 18 assistant turns


def configured(folder: Path, tiny: Path, template: str, **data: Any) -> Path:
    path = folder / "template.jinja"
    path.write_text(template)
    return configure(
        folder, tiny, ROWS, uncertainty="column", loss={"kind": "ual"},
        data={"chat_template": str(path), "max_length": 192, **data},
        training={"max_steps": 1, "save_steps": 1},
    )  # fmt: skip


def test_each_turn_is_a_sample_with_the_conversations_values(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, FORGETS)
    with pytest.raises(UserError, match="renders the turn differently") as caught:
        preview(load(path))
    assert 'set data.train_on to "each", or set data.train_on to "last"' in str(caught.value.remedy)
    found = preview(load(path, ["data.train_on=each"]), count=18)
    assert (found.count, found.trained) == (18, 18)
    shown = {s.sample.id: s for s in found.shown}
    assert {"c0", "c1/1", "c1/2", "c2/1", "c2/2", "c2/3"} <= shown.keys()
    for number, row in enumerate(ROWS):
        parts = [s for id, s in shown.items() if id.partition("/")[0] == f"c{number}"]
        assert {(s.sample.uncertainty, s.weight) for s in parts} == {
            (row["uncertainty"], row["sample_weight"])
        }
        assert len({s.smoothing for s in parts}) == 1
        for turn, part in enumerate(parts):
            said = "".join(span.text for span in part.spans if span.trained)
            assert said == f"<think>r{number}{turn}</think>a{number}{turn}</s>"
            assert "".join(span.text for span in part.spans).count("<think>") == 1
    assert any("every assistant turn is a sample" in note for note in found.notes)


@pytest.mark.kills("ual/data/training_set.py", "list(apart(train)), list(apart(held_out))", "train, held_out")
def test_a_conversation_is_held_out_with_all_its_turns(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, FORGETS, eval_fraction=0.4, train_on="each")
    read = training_set.read(load(path))
    train, held_out = read.train, read.held_out
    assert len(train) + len(held_out) == 18
    ids = [{sample.id.partition("/")[0] for sample in part} for part in (train, held_out)]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_ids_that_turns_would_get_twice_are_refused(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, FORGETS, train_on="each")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(conversation(1, 1) | {"id": "c1/2"}) + "\n")
    with pytest.raises(UserError, match="'c1/2'"):
        training_set.read(load(path))


def test_each_turn_of_a_stream(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, FORGETS, train_on="each", streaming=True, overlong="drop")
    config = load(path)
    assert preview(config).count == 18
    found = training_set.streamed(config, samples.renderer(config)[1])
    assert found.count == 18
    assert isinstance(found.dataset, Stream)
    assert {sample["id"] for sample in found.dataset} == found.loss_tokens.keys()


def prompts(config: RunConfig) -> set[str]:
    """The first ten characters of the prompts that a run was trained on: the date."""
    lines = (Path(config.output_dir) / "samples.jsonl").read_text().splitlines()
    return {json.loads(line)["prompt"][:10] for line in lines}


@pytest.mark.kills("ual/pipelines/train.py", "config.on(distributed.from_first(folder.date))", "config")
@pytest.mark.kills("ual/runs/folder.py", "return began or datetime", "return datetime")
@pytest.mark.slow
def test_a_resumed_run_keeps_the_date_on_which_it_began(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, DATED, train_on="each")
    config = load(path)
    before = preview(config)
    run(config)
    recorded = Path(config.output_dir) / "config.yaml"
    began = load(recorded).data.date
    assert began in near_today()
    assert prompts(config) == {str(began)}
    assert "".join(span.text for span in before.shown[0].spans).startswith(tuple(map(str, near_today())))
    recorded.write_text(
        recorded.read_text().replace(f"date: '{began}'", "date: '2024-02-29'")
    )  # some day later
    run(load(path, ["training.max_steps=2"]), resume=True)
    assert prompts(config) == {"2024-02-29"}
    assert load(recorded).data.date == datetime.date(2024, 2, 29)
    assert "".join(span.text for span in preview(config).shown[0].spans).startswith("2024-02-29")
    with pytest.raises(UserError, match="differs"):
        run(load(path, ["data.date=2024-03-01", "training.max_steps=2"]), resume=True)


@pytest.mark.kills("ual/pipelines/experiment.py", "cell.config.on(min(dates))", "cell.config")
def test_all_runs_of_an_experiment_have_the_date_of_the_first(tmp_path: Path, tiny: Path) -> None:
    base = yaml.safe_load(configured(tmp_path, tiny, DATED).read_text())
    del base["output_dir"]
    raw = {"base": base, "arms": {"ual": {}, "sft": {"loss": "sft"}}, "output_dir": str(tmp_path / "study")}
    config = parse_as(ExperimentConfig, raw, place="test")
    (today,) = {cell.config.data.date for cell in checked(config)}
    assert today in near_today()
    first = next(config.cells()).config.on(datetime.date(2024, 2, 29))
    Path(first.output_dir).mkdir(parents=True)
    (Path(first.output_dir) / "config.yaml").write_text(dump(first))
    assert {cell.config.data.date for cell in checked(config)} == {first.data.date}


def test_the_date_is_a_day(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, DATED)
    assert load(path, ["data.date=2024-02-29"]).data.date == datetime.date(2024, 2, 29)
    with pytest.raises(UserError, match=r"data\.date: .*valid date"):
        load(path, ["data.date=29 Feb"])
    with pytest.raises(UserError, match="'messages' is set by the renderer"):
        load(path, ["data.chat_template_kwargs={messages: []}"])
    with pytest.raises(UserError, match="write a date in quotes"):
        load(path, ["data.chat_template_kwargs.date_string=2024-07-26"])


@pytest.mark.kills("ual/report/card.py", 'return_tensors="pt"{variables}', 'return_tensors="pt"')
def test_the_model_card_sets_the_variables_of_the_template(tmp_path: Path, tiny: Path) -> None:
    path = configured(tmp_path, tiny, FORGETS, chat_template_kwargs={"enable_thinking": False})
    page = card(
        load(path),
        {"trained_rows": 1, "steps": 1, "status": "completed", "mean_smoothing": 0.1, "loss_kind": "ual"},
        {},
    )
    assert 'return_tensors="pt", enable_thinking=False\n' in page


@pytest.mark.parametrize(
    ("written", "eos", "ends"),
    [
        ({"eos_token_id": [2, 60]}, 2, "Z"),  # generation_config.json, which holds a stop token beside EOS
        (None, [2, 60], "Z"),  # config.json alone
        (None, 2, "Z</s>"),
    ],
)
def test_the_models_own_stop_tokens_end_a_turn(
    written: dict[str, Any] | None, eos: Any, ends: str, tmp_path: Path, tiny: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([60]) == "Z"
    (folder / "generation_config.json").unlink(missing_ok=True)
    if written:
        (folder / "generation_config.json").write_text(json.dumps(written))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"eos_token_id": eos}))
    path = configured(
        tmp_path, tiny, FORGETS.replace("m.content + '\n'", "m.content + 'Z\n'"), train_on="each"
    )
    shown = preview(load(path, [f"model={folder}"])).shown[0]
    assert shown.spans[-1].text.endswith(f"a00{ends}")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        preview(load(path, [f"model={folder}"]))
