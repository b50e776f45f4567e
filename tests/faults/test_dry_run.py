"""What would fail during training is an error before weights are loaded, in a dry run as in a run."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.faults.test_bad_input import ROWS
from tests.ual.runs import configure
from ual.cli.main import app
from ual.config.run import load
from ual.errors import UserError
from ual.pipelines.preview import plan
from ual.pipelines.train import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ARGUMENTS, FEASIBLE, SAMPLES = "ual/train/arguments.py", "ual/train/feasible.py", "ual/pipelines/samples.py"

REFUSED = {
    "training.report_to=wandb": "report_to: WandbCallback requires wandb to be installed",
    "training.report_to=nonsense": "nonsense is not supported",
    "training.eval_strategy=steps": "set data.eval or data.eval_fraction, or remove eval_strategy",
    "training.eval_on_start=true": "eval_on_start is set, and there are no held-out samples",
    "training.metric_for_best_model=nonsense": "valid: loss, eval_loss",
    "training.save_strategy=best": "needs a metric and evaluations",
    "training.per_device_train_batch_size=0": "must be above 0, got 0",
    "training.gradient_accumulation_steps=-2": "must be above 0, got -2",
    "training.num_train_epochs=0": "num_train_epochs must be above 0",
    "training.max_steps=0": "-1 trains num_train_epochs",
    "training.dataloader_num_workers=-1": "must not be negative",
    "training.optim=adamw_bnb_8bit": "optim: You need to install `bitsandbytes`",
    "training.optim=galore_adamw": "optim: ",
    "training.optim=lomo": "optim: You need to install `lomo_optim`",
    "training.adam_beta1=1.5": "optim: Invalid beta parameter",
    "training.lr_scheduler_type=cosine_with_min_lr": "lr_scheduler_type: One of min_lr or min_lr_rate",
    "training.lr_scheduler_type=warmup_stable_decay": "set lr_scheduler_kwargs",
    "training.lr_scheduler_kwargs={bogus: 1}": "lr_scheduler_type: ",
    "training.lr_scheduler_type=inverse_sqrt training.lr_scheduler_kwargs={timescale:0}": "division",
    "training.lr_scheduler_type=reduce_lr_on_plateau": "requires an eval strategy",
    "data.packing=true training.train_sampling_strategy=group_by_length": "nearly equal lengths",
    "data.streaming=true training.train_sampling_strategy=sequential": "the order of the file",
    "training.train_sampling_strategy=nonsense": "valid: random, sequential, group_by_length",
    "training.log_level=nonsense": "log_level: unknown level 'nonsense'; valid: ",
    "model.quantization=nf4": "needs a CUDA GPU",
}


@pytest.fixture(scope="module")
def weightless(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are not there: whatever is found is found without them."""
    folder = tmp_path_factory.mktemp("weightless")
    for path in tiny.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    return folder


@pytest.mark.kills(ARGUMENTS, "name in _POSITIVE", "name in ()", only="per_device_train_batch_size=0")
@pytest.mark.kills(ARGUMENTS, "name in _NOT_NEGATIVE", "name in ()", only="dataloader_num_workers=-1")
@pytest.mark.kills(FEASIBLE, "            callback()\n", "            callback\n", only="report_to=wandb")
@pytest.mark.kills(FEASIBLE, "if evaluates and not held_out:", "if False:", only="eval_strategy=steps")
@pytest.mark.kills(FEASIBLE, "metric not in _METRICS", "False", only="metric_for_best_model=nonsense")
@pytest.mark.kills(FEASIBLE, "if packing and", "if False and", only="train_sampling_strategy=group_by_length")
@pytest.mark.kills(FEASIBLE, "if streaming and", "if False and", only="train_sampling_strategy=sequential")
@pytest.mark.kills(FEASIBLE, "schedule.lr_lambdas[0](step)", "pass", only="lr_scheduler_kwargs={timescale:0}")
@pytest.mark.parametrize("overrides", REFUSED, ids=lambda value: value.rpartition("training.")[2])
def test_what_cannot_train_is_refused(tmp_path: Path, weightless: Path, overrides: str) -> None:
    words = [word.replace(":", ": ") for word in overrides.replace(": ", ":").split()]
    config = load(configure(tmp_path, weightless, ROWS, uncertainty="column"), words)
    for begin in (plan, run):
        with pytest.raises(UserError) as caught:
            begin(config)
        assert REFUSED[overrides] in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        "training.optim=adafactor",
        "training.optim=adamw_torch_fused lora=null",
        "training.lr_scheduler_type=cosine_with_min_lr training.lr_scheduler_kwargs={min_lr_rate: 0.1}",
        "training.metric_for_best_model=eval_loss training.eval_strategy=steps data.eval_fraction=0.3",
    ],
)
def test_what_can_train_is_planned(tmp_path: Path, weightless: Path, overrides: str) -> None:
    words = [word.replace(":", ": ") for word in overrides.replace(": ", ":").split()]
    assert plan(load(configure(tmp_path, weightless, ROWS, uncertainty="column"), words)).steps == 6


@pytest.mark.kills(SAMPLES, "        if token >= size:", "        if False:")
@pytest.mark.kills(SAMPLES, '{"the padding token": tokenizer.pad_token_id}', "{}")
def test_tokens_without_an_embedding_are_refused(tmp_path: Path, weightless: Path) -> None:
    """A larger tokenizer is harmless until a sample, or padding, has one of its tokens."""
    larger, folder = AutoTokenizer.from_pretrained(weightless), tmp_path / "larger"
    larger.add_tokens([*(f"<{i}>" for i in range(64)), "question"])
    larger.save_pretrained(folder)
    words = [f"model.tokenizer={folder}", "loss=sft"]
    path = configure(tmp_path, weightless, [{"prompt": "x", "completion": "y"}])
    assert plan(load(path, words)).preview.count == 1
    larger.pad_token = "question"
    larger.save_pretrained(folder)
    with pytest.raises(UserError, match=r"the padding token has token \d+ \('question'\), and the embedding"):
        plan(load(path, words))
    larger.pad_token = larger.eos_token
    larger.save_pretrained(folder)
    path = configure(tmp_path, weightless, [{"prompt": "question", "completion": "y", "id": "a"}])
    for begin in (plan, run):
        with pytest.raises(UserError, match=r"sample 'a' has token \d+ \('question'\)"):
            begin(load(path, words))


@pytest.mark.kills("ual/cli/study.py", "and answers.exists() and", "and")
def test_reliability_of_a_missing_file(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("{}\n")
    result = CliRunner().invoke(app, ["reliability", str(tmp_path / "typo"), "-o", str(there)])
    assert result.exit_code == 2, result.output
    assert "typo" in result.output
    assert there.read_text() == "{}\n"
