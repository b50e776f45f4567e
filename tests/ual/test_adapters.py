"""Every kind of adapter trains under the fused loss, merges without loss, and has a model card."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from tests.ual.runs import configure, gsm8k
from ual.cli import main as cli
from ual.config.run import LoraConfig, ModelConfig, load
from ual.errors import UserError
from ual.models import fuse, unfuse
from ual.models.load import attach_lora, load_model
from ual.models.merge import merge
from ual.pipelines.train import run
from ual.report import card

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # from PEFT for an adapter on one of two tied matrices, which two of these tests need
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some modules": {"target_modules": ["q_proj", "down_proj"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    return {"input_ids": ids, "labels": labels}


def adapted(tiny: Path, options: dict[str, Any]) -> Any:
    """Two steps of training, so that no factor is zero."""
    config = LoraConfig(**({"r": 4, "alpha": 16, "dropout": 0.0} | options))
    model = attach_lora(load_model(ModelConfig(path=str(tiny))), config)
    fuse(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    return model


@pytest.mark.kills("ual/models/merge.py", "    _untie(model)  #", "    #", only="head adapted")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_fused_as_unfused_and_merges(kind: str, tiny: Path, tmp_path: Path) -> None:
    model = adapted(tiny, KINDS[kind])
    names = {
        name.rsplit(".", 3)[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert names == (
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        if "target_modules" not in KINDS[kind]
        else set(KINDS[kind]["target_modules"])
    )
    inputs = batch()
    found = []
    for _ in range(2):  # fused, then transformers' own loss
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        unfuse(model)
    (fused, of_fused), (plain, of_plain) = found
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert of_fused.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        torch.testing.assert_close(of_fused[name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    model.save_pretrained(tmp_path / "adapter")
    merge(ModelConfig(path=str(tiny)), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    logits = model.eval()(input_ids=inputs["input_ids"]).logits
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()(input_ids=inputs["input_ids"]).logits
    error = (merged(input_ids=inputs["input_ids"]).logits - logits).norm()
    # one rounding of every weight, through a few layers; the adapter itself changes the logits far more
    assert error <= 64 * torch.finfo(torch.float32).eps * logits.norm()
    assert (base - logits).norm() > 1e3 * error
    assert merged.config.use_cache
    assert merged.config.tie_word_embeddings == ("head" not in kind)
    files = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".partial")) for name in files)


@pytest.mark.kills("ual/models/merge.py", '"dtype": "float32", "quantization"', '"quantization"')
def test_merging_rounds_once(tiny: Path, tmp_path: Path) -> None:
    """With a bfloat16 base, the merged weight is the float32 sum, rounded."""
    model = adapted(tiny, {"target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "adapter")
    base = ModelConfig(path=str(tiny), dtype="bfloat16")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    exact = model.merge_and_unload().state_dict()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).dtype == torch.bfloat16
            assert torch.equal(file.get_tensor(name), exact[name].to(torch.bfloat16)), name


@pytest.mark.kills("ual/models/load.py", "except SafetensorError as error:", "except KeyError as error:")
def test_a_full_disk_is_a_user_error(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tiny, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", Mock(side_effect=SafetensorError("no space")))
    with pytest.raises(UserError, match="cannot write the merged model: no space"):
        merge(ModelConfig(path=str(tiny)), tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module")
def finished(shared: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    rows = [row | {"source": "ab"[i % 2]} for i, row in enumerate(gsm8k(shared, 24))]
    training = {"max_steps": 6, "report_to": ["tensorboard"]}
    config = configure(folder, stories, rows, training=training, data={"eval_fraction": 0.2})
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    run(load(config, ["data.packing=true"]))
    monkeypatch.undo()
    return folder / "run"


def test_merging_a_run_by_its_folder(finished: Path, tmp_path: Path) -> None:
    command = ["merge", str(finished), "-o", str(tmp_path / "merged")]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a").input_ids
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 2
    assert "exists already" in again.output
    none = CliRunner().invoke(cli.app, ["merge", str(tmp_path), "-o", str(tmp_path / "m")])
    assert none.exit_code == 2
    with pytest.raises(UserError, match="there is no adapter"):
        merge(ModelConfig(path="x"), tmp_path, tmp_path / "m")


def test_the_model_card_has_the_runs_results(finished: Path) -> None:
    text = (finished / "adapter" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "peft"
    assert "base_model" not in facts  # a local folder has no name on the hub
    metrics = json.loads((finished / "metrics.json").read_text())
    for said in (
        "fine-tuned on `rows.jsonl`",
        "loss `ual`",
        f"{metrics['trained_rows']} samples, 6 steps",
        f"| NLL | {metrics['eval_before']['nll']:.4f} | {metrics['eval']['nll']:.4f} |",
        "status: completed",
    ):
        assert said in body, said
    assert str(finished.parent) not in text
    settings = load(finished / "config.yaml")
    hub = settings.model_copy(update={"model": ModelConfig(path="owner/name")})
    assert (
        yaml.safe_load(card(hub, metrics | {"eval": None}, {}).split("---\n")[1])["base_model"]
        == "owner/name"
    )
    assert "not measured on held-out samples" in card(hub, metrics | {"eval": None}, {})


def test_a_runs_metrics_are_logged(finished: Path) -> None:
    """History, tensorboard and the report contain the loss by source and by uncertainty."""
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    logged = [row for row in history if "loss" in row]
    keys = {"token_nll", "token_entropy", "token_margin", "token_p", "std_smoothing", "tokens_per_second"}
    for row in logged:
        assert keys <= row.keys()
        assert 0 < row["token_p"] < 1
        assert 0 < row["token_entropy"] < 6.24  # log 512
    groups = {key for row in logged for key in row if key.startswith("nll/")}
    assert groups == {"nll/source/a", "nll/source/b", *(f"nll/uncertainty/q{i}" for i in range(1, 5))}
    # the uncertainty is the base model's, so the most uncertain quarter has the largest loss
    mean = {g: [row[g] for row in logged if g in row] for g in groups}
    assert sum(mean["nll/uncertainty/q1"]) / len(mean["nll/uncertainty/q1"]) < sum(
        mean["nll/uncertainty/q4"]
    ) / len(mean["nll/uncertainty/q4"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.parent / "tensorboard"))
    events.Reload()
    for tag in ("train/loss", "train/token_entropy", "train/live_fraction", "train/nll/source/a"):
        assert tag in events.Tags()["scalars"], events.Tags()["scalars"]
    page = (finished / "report.html").read_text()
    for words in (
        "plain training loss by source",
        "plain training loss by uncertainty",
        "NLL, entropy and margin",
    ):
        assert words in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_without_a_gpu_is_refused(kind: Any, tiny: Path) -> None:
    with pytest.raises(UserError, match=f"'{kind}' needs a CUDA GPU, and there is none"):
        load_model(ModelConfig(path=str(tiny), quantization=kind))


@pytest.mark.gpu
def test_qlora_trains_on_a_gpu(shared: Path, stories: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = configure(
        tmp_path, stories, gsm8k(shared, 12), model={"path": str(stories), "quantization": "nf4"}
    )
    result = run(load(config))
    assert result.metrics["train_loss_last"] < result.metrics["train_loss_first"]
