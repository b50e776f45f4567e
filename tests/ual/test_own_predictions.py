"""`loss: confidence`: a growing share of the target of a decision token is the model's own prediction."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tests.ual.runs import configure, history
from tests.ual.test_fused_loss import ADAPTERS, SMALL, loss_and_gradients, model_of
from tests.ual.test_options import chaosnli, definition, dense_loss, ual
from ual.config.objectives import LOSS_KINDS
from ual.config.run import LossConfig
from ual.config.run import load as load_config
from ual.data import Collator
from ual.errors import UserError
from ual.models import fuse
from ual.models.loss import LossForm, TokenLoss
from ual.train import UALTrainer
from ual.train.objective import Objective, objective

LOSS, FUSE = "ual/models/loss.py", "ual/models/fuse.py"
B, T, K = 3, 11, 4
VOCAB = SMALL["vocab_size"]
PLAIN = LossForm(1.0, None, True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def labeled(options: int = K - 1) -> dict[str, Any]:
    """Tokens of which some have 2 to K - 1 options, in places of an ignored token and after padding too."""
    ids = torch.randint(3, VOCAB, (B, T))
    labels = torch.where(torch.arange(T) < 3, -100, ids)
    option_ids, p = torch.full((B, T, K), -100), torch.full((B, T, K), 0.7)  # padding's are not used
    for b in range(B):
        for t in range(1, T, 2):  # t = 1 is ignored
            count = 2 + (b + t) % (options - 1)
            others = torch.randperm(VOCAB)
            option_ids[b, t, :count] = others[others != ids[b, t]][:count]
            p[b, t, :count] = torch.randn(count).softmax(-1)
    return {"input_ids": ids, "labels": labels, "option_ids": option_ids, "option_probabilities": p}


def decisions(batch: Mapping[str, Tensor]) -> list[tuple[int, int, Tensor, Tensor]]:
    """Each decision token that is not ignored: its place, its options and their probabilities."""
    found = []
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        options = batch["option_ids"][b, t]
        if len(options := options[options >= 0]):
            found.append((b, t, options, batch["option_probabilities"][b, t, : len(options)].double()))
    return found


def largest(of_options: Sequence[Tensor], labels: Sequence[Tensor]) -> list[int]:
    return [int(logits.argmax()) for logits in of_options]


def balanced(of_options: Sequence[Tensor], labels: Sequence[Tensor]) -> list[int]:
    """Two options: the tokens with the largest differences have option 0, as many as the labels have."""
    differences = torch.stack(list(of_options)) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    count = round(float(torch.stack(list(labels)).mean(0)[0]) * len(differences))
    first = set(differences.topk(count).indices.tolist())
    return [0 if i in first else 1 for i in range(len(differences))]


def definition_of(
    logits: Tensor, batch: Mapping[str, Tensor], share: float, own_of: Any = largest, spread: float = 0.0
) -> Tensor:
    """The loss [] in float64, from logits [B, T, V]: dense targets, made one token at a time."""
    z, labels = logits.double()[:, :-1], batch["labels"][:, 1:]
    q = torch.zeros(*z.shape, dtype=torch.float64)
    q.scatter_(-1, labels.clamp(min=0)[..., None], 1.0)
    found = decisions(batch)
    own = own_of([z[b, t - 1, options].detach() for b, t, options, _ in found], [p for *_, p in found])
    for (b, t, options, p), chosen in zip(found, own, strict=True):
        mixed = (1 - share) * p
        mixed[chosen] += share
        q[b, t - 1] = 0.0
        q[b, t - 1, options] = (1 - spread) * mixed + spread / len(options)
    valid = labels != -100
    return -(q * z.log_softmax(-1)).sum(-1)[valid].sum() / valid.sum()


def built(kind: str) -> Any:
    """A model whose logits have a scale, a softcap, a bias or an adapter."""
    if kind in ADAPTERS:
        options = LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[kind])
        return get_peft_model(model_of("llama"), options).eval()
    if kind != "phi":
        return model_of(kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **SMALL))
    torch.nn.init.normal_(model.lm_head.bias, std=3.0)
    return model.eval()


# ---- the loss ----


@pytest.mark.kills(LOSS, "linear_bias=bias,\n            linear_lora", "linear_lora", only="phi")
@pytest.mark.kills(LOSS, "linear_lora=lora,\n            softcap", "softcap", only="head")
@pytest.mark.kills(LOSS, "return p + share * (own.probabilities - p)", "return p + share * own.probabilities")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "phi", *ADAPTERS])
def test_loss_and_gradient_are_those_of_the_definition(kind: str) -> None:
    model, batch = built(kind), labeled()
    model.zero_grad()
    expected = definition_of(model(input_ids=batch["input_ids"]).logits, batch, 0.4)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    fuse(model)
    loss, found = loss_and_gradients(model, **batch, own_share=torch.tensor(0.4))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, name
    assert torch.equal(model(**batch, own_share=0.4).loss, loss)
    assert abs(model(**batch).loss - loss) > 1e-3 * loss


@pytest.mark.kills(LOSS, "softcap=self.form.softcap,\n            logit_scale", "logit_scale", only="True")
@pytest.mark.kills(LOSS, "balance=self.balance_own,", "balance=False,")
@pytest.mark.kills(FUSE, "            balance_own=balance_own,\n", "")
@pytest.mark.kills(LOSS, "valid = (ids >= 0) & (labels", "valid = (labels", only="False")
@pytest.mark.kills(LOSS, " & (labels != self.ignore_index)[..., None]", "", only="False")
@pytest.mark.parametrize("capped", [False, True])
def test_balanced_predictions(capped: bool) -> None:
    """A softcap changes differences of logits. Tokens without a loss or without options are not counted."""
    model, batch = model_of("gemma2" if capped else "llama"), labeled(2)
    if capped:
        model.lm_head.weight.data *= 5
    batch["option_ids"].clamp_(min=-1)  # any negative number is padding
    batch["option_probabilities"][..., :2] = torch.tensor([0.3, 0.7])
    batch["option_probabilities"][:, 1, :2] = torch.tensor([1.0, 0.0])  # of ignored tokens
    logits = model(input_ids=batch["input_ids"]).logits.detach()
    expected = definition_of(logits, batch, 0.4, balanced)
    fuse(model)
    found = model(**batch, own_share=0.4, balance_own=True).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.kills(LOSS, "p = self._with_own(", "spread, p = 0.0, self._with_own(", only="options")
@pytest.mark.parametrize("over", ["options", "all"])
def test_smoothing_is_added_to_the_mixture(over: str) -> None:
    """As it is to any other target."""
    model, batch = model_of("llama"), labeled()
    logits = model(input_ids=batch["input_ids"]).logits.detach()
    smoothed = {"label_smoothing": 0.3, "smoothing_over": over}
    found = fuse(model)(**batch, own_share=0.4, **smoothed).loss
    expected = definition_of(logits, batch, 0.4, spread=0.3)
    if over == "all":
        uniform = -logits.double()[:, :-1].log_softmax(-1).mean(-1)[batch["labels"][:, 1:] != -100].mean()
        expected = 0.7 * definition_of(logits, batch, 0.4) + 0.3 * uniform
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "head"])
@pytest.mark.parametrize("given", [True, False], ids=["probabilities", "labels"])
def test_a_share_of_0_is_the_loss_without_it_bit_for_bit(kind: str, given: bool) -> None:
    model, batch = fuse(built(kind)), labeled()
    if not given:
        batch["option_ids"][..., 0] = batch["labels"].where(batch["option_ids"][..., 0] >= 0, -100)
        del batch["option_probabilities"]
    plain, gradients = loss_and_gradients(model, **batch)
    assert plain.isfinite()
    for share in (0.0, torch.tensor(0.0)):
        loss, found = loss_and_gradients(model, **batch, own_share=share, balance_own=given)
        assert torch.equal(loss, plain)
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_probabilities_keep_their_gradient() -> None:
    """d loss / dp has the factor 1 - share: own predictions are constants."""
    model, batch = fuse(model_of("llama")), labeled()
    p = batch["option_probabilities"].requires_grad_()
    batch["num_items_in_batch"] = 7  # the default divisor has a gradient too
    [plain] = torch.autograd.grad(model(**batch).loss, p)
    [found] = torch.autograd.grad(model(**batch, own_share=0.25).loss, p)
    torch.testing.assert_close(found, 0.75 * plain)
    assert plain.any()


@pytest.mark.kills(LOSS, "(share >= 0) & (share <= 1)", "share == share")
def test_a_tensor_outside_0_to_1_is_nan() -> None:
    model, batch = fuse(model_of("llama")), labeled()
    for share in (-1e-3, 1.001, float("nan")):
        assert model(**batch, own_share=torch.tensor(share)).loss.isnan()
    assert model(**batch, own_share=torch.tensor(1)).loss.isfinite()
    nothing = batch | {"option_ids": torch.full((B, T, K), -1)}
    assert torch.equal(model(**nothing, own_share=torch.tensor(0.5)).loss, model(**nothing).loss)


@pytest.mark.kills(FUSE, "        _check_own(own_share, balance_own, option_ids)\n", "")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"own_share": 0.5, "option_ids": None, "option_probabilities": None}, "own_share needs option_ids"),
        ({"balance_own": True}, "balance_own needs own_share"),
        ({"own_share": 1.5}, "own_share must be a number in [0, 1], or a tensor, got 1.5"),
        ({"own_share": float("nan")}, "own_share must be a number in [0, 1], or a tensor, got nan"),
        ({"own_share": [0.5] * B}, "own_share must be a number in [0, 1], or a tensor, got [0.5, 0.5, 0.5]"),
        ({"own_share": torch.full((B,), 0.5)}, "own_share must have no dimensions, got a tensor [3]"),
    ],
)
def test_what_it_refuses(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        fuse(model_of("llama"))(**(labeled() | more))


@pytest.mark.kills(FUSE, '        named["own_share"] = own_share\n', "")
def test_a_share_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match="the call has own_share but no labels"):
        fuse(model_of("llama"))(input_ids=labeled()["input_ids"], own_share=0.5)


@pytest.mark.kills(LOSS, "if isinstance(weight, DTensor):\n            raise", "if False:\n            raise")
def test_a_tensor_parallel_head_is_refused(tmp_path: Path) -> None:
    fresh = not torch.distributed.is_initialized()  # an earlier test of this process may have begun a group
    if fresh:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        weight = DTensor.from_local(torch.randn(VOCAB, 8), init_device_mesh("cpu", (1,)), [Shard(0)])
        ids, targets = torch.tensor([[[3, 4]]]), torch.tensor([[3]])
        loss = TokenLoss(targets=targets, form=PLAIN, option_ids=ids, own_share=0.5)
        with pytest.raises(UserError, match="tensor parallelism splits the head"):
            loss(torch.randn(1, 1, 8), weight, None, None)
    finally:
        if fresh:
            torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(Dynamo does not know|The .grad attribute):UserWarning")  # graph breaks
def test_a_compiled_model_takes_shares_without_compiling_again() -> None:
    model, batch = fuse(model_of("llama")), labeled()
    shares = [torch.tensor(i / 8) for i in range(8)]
    expected = [model(**batch, own_share=share).loss for share in shares]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch, own_share=shares[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share, loss in zip(shares, expected, strict=True):
            torch.testing.assert_close(compiled(**batch, own_share=share).loss, loss)


# ---- training ----


def test_a_kind_is_data() -> None:
    config = LossConfig(kind="confidence")
    assert config.options == {"coefficient": 0.5, "warm_up": 0.1, "balance": False}
    assert [name for name, kind in LOSS_KINDS.items() if kind.own_predictions] == ["confidence"]
    own = objective(LossConfig(kind="confidence", coefficient=0.8, warm_up=0.2, balance=True))
    assert own.own_share is not None
    assert [own.own_share(progress) for progress in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.4, 0.8, 0.8]
    assert own.balance_own
    for wrong in ({"coefficient": 1.1}, {"warm_up": -0.1}, {"balance": "half"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LossConfig(kind="confidence", **wrong)
    with pytest.raises(ValueError, match="loss soft_labels has no parameter 'balance'"):
        LossConfig(kind="soft_labels", balance=True)


def samples() -> list[dict[str, Any]]:
    """Two micro-batches of two samples; those of the second have no decision token."""
    made: list[dict[str, Any]] = []
    for i in range(4):
        ids = torch.randint(3, VOCAB, (9,)).tolist()
        made.append({"id": str(i), "input_ids": ids, "labels": [-100, -100, *ids[2:]]})
        made[-1] |= {"label_smoothing": 0.0, "sample_weight": 1.0}
        if i < 2:
            made[-1] |= {"decision": 4, "option_ids": (ids[4], 1), "option_probabilities": (0.3, 0.7)}
    return made


def trained(folder: Path, dataset: list[Any], resume: str | None = None) -> tuple[list[Any], Any]:
    """Train for eight steps with an evaluation; return what each call was given, and the model."""

    class InOrder(UALTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    torch.manual_seed(0)
    model, given = fuse(model_of("llama")), []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        share = kwargs.get("own_share")
        given.append((module.training, None if share is None else share.item(), kwargs.get("balance_own")))

    model.register_forward_pre_hook(record, with_kwargs=True)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=3, eval_strategy="steps", eval_steps=8, report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, label_names=["labels"], learning_rate=1e-3,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, data_collator=Collator(0),
        objective=objective(LossConfig(kind="confidence", coefficient=0.8, warm_up=0.5, balance=True)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return given, model


@pytest.mark.kills("ual/train/objective.py", ' and "option_ids" in inputs', "")
@pytest.mark.kills("ual/train/objective.py", "share=chosen[", "share=0.1 * chosen[")
@pytest.mark.kills("ual/train/trainer.py", "self.state.global_step / self.state.max_steps", "1.0")
@pytest.mark.kills("ual/train/trainer.py", "self.state.global_step / self.state.max_steps",
                   "len(self._window) / 2")  # fmt: skip
def test_the_share_grows_with_steps_and_is_the_same_after_resuming(tmp_path: Path) -> None:
    """Both micro-batches of a step have the same share, and an evaluation has none."""
    dataset = samples()
    given, whole = trained(tmp_path, dataset[:2] * 2)
    expected = [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    in_training = [call for call in given if call[0]]
    assert in_training == [(True, pytest.approx(share), True) for share in expected for _ in range(2)]
    assert {call for call in given if not call[0]} == {(False, None, None)}
    resumed, model = trained(tmp_path, dataset[:2] * 2, str(tmp_path / "checkpoint-3"))
    assert resumed == given[6:]
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
    some, _ = trained(tmp_path / "some", dataset)
    assert some[:4] == [(True, 0.0, True), (True, None, None), (True, pytest.approx(0.2), True), some[1]]


def test_other_objectives_have_no_share() -> None:
    inputs = Collator(0)(samples())
    assert Objective().prepare(inputs, 0.5) is inputs


def mixed(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], share: float) -> list[Any]:
    """Each sample's target at its decision token, from texts."""
    made = []
    for given in rows:
        p = given["label_distribution"]
        prompt = f"User: {given['prompt']}\nAssistant:"
        position, ids, every = definition([f"{prompt} {option}</s>" for option in p], tokenizer)
        of_options = model(torch.tensor([every[0][:position]])).logits[0, -1, ids]
        own = list(p)[int(of_options.argmax())]
        made.append({option: (1 - share) * p[option] + share * (option == own) for option in p})
    return made


@pytest.mark.kills("ual/train/objective.py", "if kind.own_predictions:", "if False:")
def test_a_run_trains_on_it(shared: Path, stories: Path, tmp_path: Path) -> None:
    """The first logged loss of `ual train` is the definition's."""
    rows = chaosnli(shared, 4)
    config = configure(
        tmp_path, stories, rows, uncertainty="column", data={"max_length": 500},
        loss={"kind": "confidence", "coefficient": 0.75, "warm_up": 0.0},
        training={"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    ual("train", config)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with torch.no_grad():
        targets = mixed(model, tokenizer, rows, 0.75)
        expected = dense_loss(model, tokenizer, rows, targets).item()
        plain = dense_loss(model, tokenizer, rows, [given["label_distribution"] for given in rows]).item()
    first, *_, last = history(tmp_path / "run")
    assert first["loss"] == pytest.approx(expected, rel=1e-5)  # the run computes in float32
    assert abs(plain - expected) > 1e-3
    assert last["loss"] < first["loss"]
    written = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert written[0]["options"] == pytest.approx(rows[0]["label_distribution"])
    assert "growing share of the model" in (tmp_path / "run/report.html").read_text()
    assert load_config(config, ["loss.balance=true"]).loss.options["balance"] is True
    other = configure(tmp_path, stories, [{k: v for k, v in rows[0].items() if k != "label_distribution"}],
                      loss="confidence", output_dir=str(tmp_path / "other"))  # fmt: skip
    assert "is missing, and the loss needs it" in ual("train", other, code=2).output
