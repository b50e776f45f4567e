"""`fuse` and what people do with models: copy, pickle, compile, wrap, hook, offload, thread, unwrap."""

import ast
import copy
import inspect
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from tests.test_architecture import in_a_fresh_process
from tests.ual.test_fused_loss import SMALL, assert_same, loss_and_gradients, model_of
from ual.errors import UserError
from ual.models import fuse, unfuse
from ual.models.attach import plain_class
from ual.models.fuse import _meant

FUSE, HEAD, ATTACH = "ual/models/fuse.py", "ual/models/head.py", "ual/models/attach.py"
LOSS, PROBE = "ual/models/loss.py", "ual/models/probe.py"
S = torch.tensor([0.5, 0.1, 0.3])


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 67, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return fuse(model_of("llama"), **options)


def smoothed(model: Any) -> Tensor:
    loss = model(**batch(), label_smoothing=S).loss
    assert isinstance(loss, Tensor)
    return loss.detach()


def own_loss(model: Any, **more: Any) -> Tensor:
    loss = plain_class(model).forward(model, **(batch() | more)).loss
    assert isinstance(loss, Tensor)
    return loss


def double_the_head(model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state in the process, and other tests have made it part of a process group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- copies ----


@pytest.mark.parametrize("of", [copy.deepcopy, lambda m: AveragedModel(m).module], ids=["deepcopy", "ema"])
def test_a_copy_has_its_own_head(of: Any) -> None:
    model = llama()
    before, logits = smoothed(model), model(batch()["input_ids"]).logits
    other = of(model)
    double_the_head(other)
    assert torch.equal(smoothed(model), before)
    assert not torch.equal(smoothed(other), before)
    torch.testing.assert_close(other(batch()["input_ids"]).logits, 2 * logits)


def saved(model: Any) -> Any:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.kills(ATTACH, 'if "_plain" not in vars(cls):', "if True:")
@pytest.mark.parametrize(
    "through", [lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["pickle", "torch.save"]
)
def test_a_pickled_model_is_fused(through: Any) -> None:
    model = llama(z_loss=1e-3)
    other = through(model)
    assert torch.equal(smoothed(other), smoothed(model))
    with pytest.raises(UserError, match="fused already"):
        fuse(other)
    assert type(unfuse(other)) is LlamaForCausalLM
    assert type(other.lm_head) is nn.Linear


def test_fuse_leaves_no_trace() -> None:
    model = model_of("llama")
    mode, attributes = model.model.layers[0].eval().training, dict(vars(model))
    fuse(model.train())
    model.model.layers[0].eval()
    assert {k for k in vars(model) if k not in attributes} == set()
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(unfuse(model)) is LlamaForCausalLM
    assert mode is False


@pytest.mark.kills(PROBE, "module.training = True", "base.train()")
def test_fuse_keeps_the_mode_of_every_module() -> None:
    model = model_of("llama").train()
    model.model.layers[0].eval()
    fuse(model)
    assert model.training
    assert model.lm_head.training
    assert not any(m.training for m in model.model.layers[0].modules())


@pytest.mark.kills(
    ATTACH, "if args or kwargs else super().__new__(cls)", "if False else super().__new__(cls)"
)
def test_a_new_model_of_the_class_is_plain() -> None:
    """Its scale and cap may be others than those of the fused model."""
    model = fuse(model_of("granite"))
    other = copy.deepcopy(model.config)
    other.logits_scaling = 2.0
    made = type(model)(other)
    assert type(made) is plain_class(model)
    assert type(type(model.lm_head)(4, 5)) is nn.Linear
    torch.testing.assert_close(fuse(made).eval()(**batch()).loss, own_loss(made))


def test_save_pretrained_names_the_plain_class(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()


@pytest.mark.kills(HEAD, "class _ThreadState(threading.local):", "class _ThreadState:")
def test_threads_do_not_meet() -> None:
    """Two threads are in the head's call at the same time, and a third makes logits."""
    model = llama()
    expected = [model(**batch(), label_smoothing=s).loss.item() for s in (0.0, 0.5)]
    logits = model(batch()["input_ids"]).logits
    meeting, rounds = threading.Barrier(3, timeout=30), 30
    same: list[bool] = []

    def meet(*_: Any) -> None:
        meeting.wait()

    def compute(i: int) -> None:
        for _ in range(rounds):
            same.append(model(**batch(), label_smoothing=(0.0, 0.5)[i]).loss.item() == expected[i])

    def generate() -> None:
        for _ in range(rounds):
            same.append(torch.equal(model(batch()["input_ids"]).logits, logits))

    handle = model.lm_head.register_forward_pre_hook(meet)
    jobs = [threading.Thread(target=compute, args=(i,)) for i in range(2)]
    jobs.append(threading.Thread(target=generate))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    handle.remove()
    assert same == [True] * 3 * rounds
    assert torch.equal(model(batch()["input_ids"]).logits, logits)


def test_a_replica_computes_with_its_own_head() -> None:
    """`nn.DataParallel` makes a replica as here, one per GPU."""
    model = llama()
    replica = model._replicate_for_data_parallel()
    replica._modules = {**model._modules, "lm_head": nn.Linear(32, 67, bias=False)}
    torch.testing.assert_close(replica(**batch()).loss, own_loss(replica))
    assert not torch.equal(smoothed(replica), smoothed(model))


class Larger(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


CHANGES = {
    "resized": lambda m: m.resize_token_embeddings(80, mean_resizing=False),
    "another head": lambda m: setattr(m, "lm_head", nn.Linear(32, 67)),
    "parametrized": lambda m: parametrize.register_parametrization(m.lm_head, "weight", Larger()),
    "pruned": lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.3),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "copied": copy.copy,
}


@pytest.mark.parametrize("before", [True, False], ids=["fused, then changed", "changed, then fused"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_changes(change: str, before: bool) -> None:
    torch.manual_seed(0)
    model = model_of("llama")
    if before:
        fuse(model)
    CHANGES[change](model)
    if not before:
        fuse(model)
    fused = loss_and_gradients(model, **batch())
    own = loss_and_gradients(unfuse(model), **batch())
    if change == "bfloat16":  # the model rounds its logits, of about 6, and the fused loss does not
        assert abs(fused[0] - own[0]) <= 8 * torch.finfo(torch.bfloat16).eps
    else:
        assert_same(fused, own)


def test_weights_that_come_with_the_call() -> None:
    model = llama()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights["lm_head.weight"] *= 2
    called = functional_call(model, weights, (batch()["input_ids"],), {"labels": batch()["labels"]}).loss
    double_the_head(model)
    torch.testing.assert_close(called, model(**batch()).loss)


def test_reentrant_checkpoints() -> None:
    model = llama().train()
    plain = loss_and_gradients(model, **batch(), label_smoothing=S)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, **batch(), label_smoothing=S), plain)


@pytest.mark.kills(LOSS, "import ual_kernels.flops  # noqa", "import ual_kernels  # noqa")
@pytest.mark.slow
def test_flop_counters_see_the_loss() -> None:
    """Forward and backward take the products of the model's own loss, no more and no fewer."""
    program = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from ual.models import fuse
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, pad_token_id=0))
ids = torch.arange(1, 13)[None]
for change in (lambda model: model, fuse):
    change(model)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    print(counter.get_total_flops())
"""
    own, fused = in_a_fresh_process(program).split()
    assert int(own) == int(fused) > 0


# ---- columns ----


@pytest.mark.kills(LOSS, "if shift and value.ndim == labels.ndim:", "if False:")
def test_values_per_token_belong_to_their_labels() -> None:
    model, inputs = llama(), batch()
    chosen = torch.zeros(3, 11)
    chosen[:, 5] = 1
    alone = torch.where(chosen == 1, inputs["labels"], -100)
    expected = model(input_ids=inputs["input_ids"], labels=alone, label_smoothing=0.3).loss
    torch.testing.assert_close(model(**inputs, label_smoothing=0.3, sample_weight=chosen).loss, expected)
    partly = model(**inputs, label_smoothing=0.3 * chosen, sample_weight=chosen).loss
    torch.testing.assert_close(partly, expected)


def test_shift_labels_are_not_shifted_again() -> None:
    model, inputs = llama(), batch()
    weight = torch.rand(3, 11)
    expected = model(**inputs, label_smoothing=S, sample_weight=weight).loss
    moved = {
        "shift_labels": nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100),
        "sample_weight": nn.functional.pad(weight[:, 1:], (0, 1)),
        "label_smoothing": S,
    }
    torch.testing.assert_close(model(inputs["input_ids"], **moved).loss, expected)
    # as sequence parallelism does: labels come along, and shift_labels count
    halves = [model(input_ids=inputs["input_ids"], labels=inputs["labels"] * 0, **moved).loss]
    torch.testing.assert_close(halves[0], expected)


@pytest.mark.kills(
    FUSE, "return (*args[:place], None, *args[place + 1 :]), args[place]", "return args, labels"
)
def test_positional_labels_are_labels() -> None:
    model, inputs = llama(), batch()
    place = list(inspect.signature(model.forward).parameters).index("labels")
    args = [inputs["input_ids"], *[None] * (place - 1), inputs["labels"]]
    assert torch.equal(model(*args, label_smoothing=S).loss.detach(), smoothed(model))
    with pytest.raises(TypeError, match="multiple values"):
        model(*args, labels=inputs["labels"])


@pytest.mark.parametrize("made", [np.asarray, list, lambda s: s.double()], ids=["numpy", "list", "float64"])
def test_columns_of_any_kind(made: Any) -> None:
    model = llama()
    assert torch.equal(model(**batch(), label_smoothing=made(S)).loss.detach(), smoothed(model))


@pytest.mark.kills(
    LOSS, "torch.stack(list(value)) if tensors else torch.as_tensor(value)", "torch.as_tensor(value)"
)
def test_a_list_of_tensors_keeps_its_gradients() -> None:
    model, learned = llama(), S.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(**batch(), label_smoothing=learned).loss, learned)
    (found,) = torch.autograd.grad(model(**batch(), label_smoothing=list(learned)).loss, learned)
    assert torch.equal(found, expected)


@pytest.mark.kills(LOSS, "if not value.is_floating_point():  # JSON's 0 and 1", "if False:")
def test_integers_are_numbers_and_none_is_nothing() -> None:
    model = llama()
    plain = model(**batch()).loss
    assert torch.equal(model(**batch(), label_smoothing=None, sample_weight=None).loss, plain)
    assert torch.equal(model(**batch(), label_smoothing=[0, 0, 0], sample_weight=[1, 1, 1]).loss, plain)
    one = model(**batch(), sample_weight=torch.tensor([0, 1, 0])).loss
    torch.testing.assert_close(one, own_loss(model, **{k: v[1:2] for k, v in batch().items()}))
    torch.testing.assert_close(
        model(**batch(), label_smoothing=torch.tensor(0.2)).loss, model(**batch(), label_smoothing=0.2).loss
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"label_smoothing": ["a", "b", "c"]}, "label_smoothing must be numbers"),
        ({"label_smoothing": torch.rand(2)}, r"label_smoothing must have shape \[3, 11\]"),
        ({"sample_weight": torch.rand(3, 10)}, r"sample_weight must have shape \[3, 11\]"),
    ],
)
def test_columns_of_another_shape_are_refused(column: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama()(**batch(), **column)


@pytest.mark.kills(FUSE, "difflib.get_close_matches(name, _ADDED, n=1, cutoff=0.82)", "[]")
@pytest.mark.kills(FUSE, "if re.fullmatch(pattern, name)]", "if False]")
@pytest.mark.kills(FUSE, 'targets?)|probabilities|probs",', 'targets?)",', only="probs-option_probabilities")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("label_smoothign", "label_smoothing"),
        ("labels_smoothing", "label_smoothing"),
        ("smoothing", "label_smoothing"),
        ("sample_weights", "sample_weight"),
        ("sampel_weigth", "sample_weight"),
        ("weights", "sample_weight"),
        ("token_weights", "sample_weight"),
        ("per_sample_weight", "sample_weight"),
        ("smooth", "label_smoothing"),
        ("num_items", "num_items_in_batch"),
        ("return_statistic", "return_statistics"),
        ("option_tokens", "option_ids"),
        ("options", "option_ids"),
        ("option_probs", "option_probabilities"),
        ("soft_labels", "option_probabilities"),
        ("soft_target", "option_probabilities"),
        ("target_probabilities", "option_probabilities"),
        ("teacher_probs", "option_probabilities"),
        ("label_distribution", "option_probabilities"),
        ("probabilities", "option_probabilities"),
        ("probs", "option_probabilities"),
    ],
)
def test_a_name_near_ours_is_refused(name: str, meant: str) -> None:
    model = llama()
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        model(**batch(), **{name: S})


@pytest.mark.kills(FUSE, r'((options?|labels?|targets?|soft|teacher)_)+"', r'(\w+_)*"')
@pytest.mark.slow
def test_no_argument_of_a_model_is_near_ours() -> None:
    """A causal LM passes arguments that its signature does not name on to its parts, as `**kwargs`."""
    no_text = {"sapiens2", "zoedepth"}  # vision models: label_weights, probabilities
    found = set()
    for path in (Path(transformers.__file__).parent / "models").rglob("modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.FunctionDef)
                and node.name == "forward"
                and path.parent.name not in no_text
            ):
                found |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    assert {"labels", "mc_labels", "router_probs", "target_values"} <= found
    assert [name for name in found if _meant(name) is not None] == []


@pytest.mark.kills(
    FUSE, 'if asked:\n        problem = f"the call has', 'if False:\n        problem = f"the call has'
)
def test_columns_without_labels_are_refused() -> None:
    model = llama()
    for columns in ({"label_smoothing": S}, {"sample_weight": S}, {"return_statistics": True}):
        with pytest.raises(UserError, match=f"has {next(iter(columns))} but no labels"):
            model(batch()["input_ids"], **columns)


@pytest.mark.kills(FUSE, "(require,) if isinstance(require, str) else tuple(require)", "require")
@pytest.mark.kills(FUSE, "if missing and _is_training(model):", "if False:")
@pytest.mark.kills(FUSE, "if name not in (*_COLUMNS, *_OPTIONS)]:", "if name not in _COLUMNS]:")
def test_a_required_column_must_come() -> None:
    model = llama(require=("label_smoothing",)).train()
    with pytest.raises(UserError, match="the batch has no label_smoothing"):
        model(**batch(), sample_weight=S)
    with pytest.raises(UserError, match="training call without labels"):
        model(batch()["input_ids"])
    smoothed(model)
    with torch.no_grad():
        model(**batch())  # an evaluation needs no smoothing
    for require in ("label_smoothing", (name for name in ["label_smoothing"])):
        with pytest.raises(UserError, match="the batch has no label_smoothing"):
            llama(require=require).train()(**batch())
    for required in ("option_ids", "option_probabilities"):
        with pytest.raises(UserError, match=f"the batch has no {required}, which"):
            llama(require=required).train()(**batch())
    ids = batch()["labels"][..., None]
    given = {"option_ids": ids, "option_probabilities": torch.ones(3, 11, 1)}
    assert llama(require=tuple(given)).train()(**batch(), **given).loss > 0
    with pytest.raises(UserError, match="require must name columns"):
        fuse(model_of("llama"), require=("smoothing",))


@pytest.mark.kills(FUSE, "ignore_index=ignore_index,\n", "")
def test_another_ignore_index() -> None:
    model, inputs = llama(), batch()
    labels = inputs["labels"].where(inputs["labels"] != -100, 7)
    expected = own_loss(model, labels=labels, ignore_index=7)
    torch.testing.assert_close(
        model(inputs["input_ids"], labels=labels, ignore_index=7, sample_weight=torch.ones(3, 11)).loss,
        expected,
    )


@pytest.mark.kills(FUSE, 'if "_loss_function" in vars(model):', "if False:")
def test_a_loss_function_of_the_user_is_refused() -> None:
    model = llama()
    model.loss_function = lambda logits, **_: logits.sum()
    with pytest.raises(UserError, match="loss_function was set"):
        model(**batch())
    plain = model_of("llama")
    plain.loss_function = lambda logits, **_: logits.sum()
    with pytest.raises(UserError, match="does not compute its loss as the cross entropy"):
        fuse(plain)
    assert type(plain) is LlamaForCausalLM


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": batch()["labels"].tolist()}, "labels must be an integer tensor"),
        ({"ignore_index": None}, "ignore_index must be an integer"),
    ],
)
def test_labels_of_another_type_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        llama()(**(batch() | inputs))


def test_logits_to_keep_and_return_dict() -> None:
    model, inputs = llama(), batch()
    kept = {"labels": inputs["labels"][:, -4:], "logits_to_keep": 4}
    torch.testing.assert_close(model(inputs["input_ids"], **kept).loss, own_loss(model, **kept))
    loss = model(**inputs).loss
    assert torch.equal(model(**inputs, return_dict=False)[0], loss)
    model.config.return_dict = False
    with pytest.raises(UserError, match="return_dict=False in the call"):
        model(**inputs)


@pytest.mark.kills(FUSE, "return_statistics or self.training or torch.is_grad_enabled()", "True")
def test_evaluation_gets_logits() -> None:
    model = llama()
    with torch.no_grad():
        outputs = model(**batch(), label_smoothing=S)
        assert torch.equal(outputs.logits, model(batch()["input_ids"]).logits)
        assert torch.equal(outputs.loss, smoothed(model))
        assert llama(eval_logits=False)(**batch()).logits is None
        assert model.train()(**batch()).logits is None
    assert model.eval()(**batch()).logits is None


# ---- compilers ----


@pytest.mark.kills(
    FUSE, "@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]\n", "", only="plain"
)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "lora"])
@pytest.mark.slow
def test_compiled_whole(adapter: bool) -> None:
    model = llama()
    if adapter:
        options = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
        model = get_peft_model(model, options).eval()
        smoothed(model)  # the first call prepares an adapter that came after fuse
    plain = loss_and_gradients(model, **batch(), label_smoothing=S)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not adapter)
    inputs = batch() | {
        "label_smoothing": S,
        "max_length_q": 11,
    }  # attention's, as collators without padding add it
    assert_same(loss_and_gradients(compiled, **inputs), _renamed(plain, "_orig_mod."))
    model.compile(backend="aot_eager")
    assert_same(loss_and_gradients(model, **batch(), label_smoothing=S), plain)


def _renamed(result: Any, prefix: str) -> Any:
    return result[0], {prefix + name: gradient for name, gradient in result[1].items()}


# ---- wrappers and hooks ----


def test_accelerate_unwraps_a_prepared_model_without_harm() -> None:
    model = llama()
    expected = smoothed(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert abs(smoothed(prepared) - expected) < 0.05
    for keep in (True, False):
        assert abs(smoothed(accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)) - expected) < 0.05
        assert abs(smoothed(prepared) - expected) < 0.05
    assert torch.equal(smoothed(prepared), expected)
    with pytest.raises(UserError, match=r"by accelerate.*\n.*first, before accelerator.prepare"):
        fuse(accelerator.prepare(model_of("llama")))


def offloaded(model: Any, folder: Path) -> Any:
    places = {"model": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.kills(ATTACH, "    if hooked_is_bound:\n", "    if False:\n")
@pytest.mark.parametrize("before", [True, False], ids=["fused, then hooked", "hooked, then fused"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights(kind: str, before: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of("llama")
    own, expected = model(**batch()).loss, smoothed(fuse(copy.deepcopy(model)))
    if before:
        fuse(model)
    model = cpu_offload(model, execution_device="cpu") if kind == "cpu" else offloaded(model, tmp_path)
    if not before:
        fuse(model)
    assert "label_smoothing" in inspect.signature(model.forward).parameters
    torch.testing.assert_close(smoothed(model), expected)
    unfuse(model)
    assert hasattr(model, "_hf_hook")
    torch.testing.assert_close(model(**batch()).loss, own)
    assert plain_class(model) is type(model)


@pytest.mark.kills(ATTACH, "    if own_is_bound:\n", "    if False:\n")
def test_a_removed_hook_leaves_nothing_behind() -> None:
    model = cpu_offload(llama(), execution_device="cpu")
    remove_hook_from_module(model, recurse=True)
    assert "forward" in vars(model)  # the bound method of a fused class
    own = own_loss(model)
    unfuse(model)
    torch.testing.assert_close(model(**batch()).loss, own)
    assert smoothed(fuse(model)) > 0


def observe(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.kills(HEAD, "if not origin.startswith(_FRAMEWORKS):", "if False:")
def test_forward_hooks_of_the_user_on_the_head() -> None:
    model = llama()
    handle = model.lm_head.register_forward_hook(observe)
    with pytest.raises(UserError, match="forward hook observe"):
        model(**batch())
    assert model(batch()["input_ids"]).logits is not None  # it runs where logits are made
    handle.remove()
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    torch.testing.assert_close(model(**batch()).loss, own_loss(model))  # a pre-hook changes both
    handle.remove()
    hooked = model_of("llama")
    hooked.lm_head.register_forward_hook(observe)
    with pytest.raises(UserError, match="forward hook observe"):
        fuse(hooked)


@pytest.mark.kills(FUSE, '        if name == "forward":\n', "        if False:\n")
def test_a_forward_that_would_drop_the_fused_one_is_refused() -> None:
    model = llama()
    with pytest.raises(UserError, match="was to be replaced, by tests"):
        model.forward = MethodType(lambda self, *args, **kwargs: None, model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(smoothed(model), smoothed(llama()))
    patched = model_of("llama")
    patched.forward = MethodType(observe, patched)
    with pytest.raises(UserError, match="was replaced, by tests"):
        fuse(patched)


@pytest.mark.kills(FUSE, 'if code is not None and "fused_lm_head" in code.co_varnames:', "if False:")
def test_trl_must_not_put_its_own_head_in(stories: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (make bench installs it)")
    from datasets import Dataset
    from transformers import AutoTokenizer

    model = fuse(AutoModelForCausalLM.from_pretrained(stories))
    arguments = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    with pytest.raises(UserError, match="UALSFTTrainer"):
        trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list([{"text": "once upon a time"}]),
            processing_class=AutoTokenizer.from_pretrained(stories),
        )


# ---- transformers' Trainer ----


def trainer(model: Any, folder: Path, *, drop: str = "", **options: Any) -> Trainer:
    own = {k: options.pop(k) for k in ("compute_loss_func", "compute_metrics") if k in options}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_strategy="no", log_level="error", **options,
    )  # fmt: skip
    rows = [
        {
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "label_smoothing": float(s),
            "sample_weight": 1,
        }
        for ids, labels, s in zip(*batch().values(), S, strict=True)
    ]
    data: Any = [{k: v for k, v in row.items() if k != drop} for row in rows]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, **own)


def test_the_trainer_trains_with_integer_columns(tmp_path: Path) -> None:
    model = llama()
    expected = model(**batch(), label_smoothing=S).loss
    result = trainer(model, tmp_path, learning_rate=0.0).train()
    assert result.training_loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_trainer(tmp_path: Path) -> None:
    model = llama()
    expected = smoothed(model).item()
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "learning_rate": 0.0}
    assert trainer(model, tmp_path, **options).train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()},
    ],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_a_trainer_that_takes_the_labels_away_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no labels.*\n.*label_smoothing_factor or compute_loss_func"):
        trainer(llama(), tmp_path, **options).train()


def test_a_trainer_whose_data_lost_a_required_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the batch has no label_smoothing"):
        trainer(llama(require=["label_smoothing"]), tmp_path, drop="label_smoothing").train()


@pytest.mark.kills(FUSE, "inspect.Parameter(_ColumnName(name),", "inspect.Parameter(name,")
def test_an_evaluation_without_smoothing_has_a_loss(tmp_path: Path) -> None:
    """The Trainer takes parameters with "label" in their names for labels, and wants them all."""
    model = llama()
    expected = model(**batch()).loss.item()
    evaluated = trainer(model, tmp_path, drop="label_smoothing").evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_a_trainer_get_logits(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        assert prediction.label_ids.shape == (3, 11)
        return {"shapes": float(len(shapes))}

    made = trainer(llama(), tmp_path, compute_metrics=metrics)
    assert made.evaluate()["eval_shapes"] == 1
    assert made.predict(made.eval_dataset).predictions.shape == (3, 11, 67)  # type: ignore[arg-type]
    assert shapes == [(3, 11, 67)] * 2


# ---- heads, logits and losses of many models ----


class Packed(Tensor):
    """A weight that stores something else than it shows, as quantized weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Packed":
        made: Packed = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda t: t.inner if isinstance(t, Packed) else t, args)
        result = func(*plain, **(kwargs or {}))
        return Packed(result) if func is torch.ops.aten.detach.default else result


class Scaled(nn.Linear):
    """Another layer under a familiar name, as PEFT's GraLoRA and RandLoRA are."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_head(head: nn.Module) -> Any:
    model = model_of("llama")
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
    model.lm_head = head
    return model


def packed() -> Any:
    model = model_of("llama")
    model.lm_head.weight = nn.Parameter(Packed(model.lm_head.weight.data), requires_grad=False)
    return model


@pytest.mark.kills(HEAD, "if plain_class(module).forward is not nn.Linear.forward:", "if False:")
@pytest.mark.kills(HEAD, "if _is_packed(weight) and not _is_vocab_parallel(self):", "if False:")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_head(Scaled(32, 67, bias=False)), "Scaled, which has a forward of its own"),
        (packed, "has a weight of type Packed"),
        (lambda: T5ForConditionalGeneration(_t5()), "is an encoder-decoder"),
        (lambda: nn.Linear(2, 2), "got Linear"),
        (lambda: nn.DataParallel(model_of("llama")), "got DataParallel"),
    ],
    ids=["subclass", "packed weight", "encoder-decoder", "no model", "wrapped"],
)
def test_what_cannot_be_fused_is_refused_at_once(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(UserError, match=message):
        fuse(model)
    if isinstance(model, LlamaForCausalLM):
        assert type(model) is LlamaForCausalLM


def _t5() -> T5Config:
    return T5Config(vocab_size=67, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match=r"backend must be one of .*got 'tritn'"):
        fuse(model_of("llama"), backend="tritn")  # type: ignore[arg-type]
    for z_loss in (-1.0, float("nan"), [1e-4]):
        with pytest.raises(UserError, match="z_loss must be a finite number >= 0"):
            fuse(model_of("llama"), z_loss=z_loss)  # type: ignore[arg-type]


@pytest.mark.kills(PROBE, "if (padded_loss - loss).abs() > bound:", "if False:")
def test_a_model_that_drops_the_labels_of_padding_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = AutoConfig.for_model(
        "qwen2_audio", audio_config={**sizes, "num_mel_bins": 8, "max_source_positions": 8},
        text_config={"model_type": "qwen2", **SMALL}, audio_token_index=66,
    )  # fmt: skip
    with pytest.raises(UserError, match="drops the labels of padding"):
        fuse(AutoModelForMultimodalLM.from_config(config))


class Passing(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.kills(FUSE, 'if getattr(outputs, "loss", None) is not None:', "if False:")
def test_labels_that_fuse_does_not_see_are_refused() -> None:
    model, inputs = fuse(Passing(model_of("llama").config)), batch()
    assert model(inputs["input_ids"]).loss is None
    with pytest.raises(UserError, match=r"returned a loss.*\n.*labels by name"):
        model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    with pytest.raises(ValueError, match=r"labels must have shape \[3, 11\], got \[3, 10\]"):
        model(inputs["input_ids"], labels=inputs["labels"][:, 1:])


ADAPTERS = {
    "lora dropout 0.1": {"lora_dropout": 0.1},
    r"not plain|other than plain LoRA \(Dora\)": {"use_dora": True},
    r"other than plain LoRA \(ALora\)": {"alora_invocation_tokens": [5]},
}


@pytest.mark.kills(
    HEAD, "    if isinstance(head, LoraLinear):\n        trained", "    if False:\n        trained"
)
@pytest.mark.parametrize("message", ADAPTERS)
def test_adapters_that_cannot_be_fused_are_refused_at_once(message: str) -> None:
    options = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], **ADAPTERS[message])
    with pytest.raises(UserError, match=f"(?i){message}"):
        fuse(get_peft_model(model_of("llama"), options))


def test_a_second_adapter_without_a_saved_head() -> None:
    saved = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"])
    plain = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    model = get_peft_model(llama(), saved).eval()
    double_the_head(model)
    model.add_adapter("second", plain)
    losses = []
    for name in ("default", "second"):
        model.set_adapter(name)
        fused = loss_and_gradients(model, **batch())
        unfuse(model)
        assert_same(fused, loss_and_gradients(model, **batch()))
        fuse(model)
        losses.append(fused[0])
    assert losses[0] != losses[1]


def two_adapters() -> Any:
    options = {"init_lora_weights": False, "target_modules": ["q_proj", "lm_head"]}
    model = get_peft_model(llama(), LoraConfig(r=4, **options))
    model.add_adapter("second", LoraConfig(r=2, **options))
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


@pytest.mark.kills(
    HEAD, "scaled = [factor * scale for factor, scale in zip(b, scaling, strict=True)]", "scaled = b"
)
def test_adapters_that_are_active_together_merged_and_unloaded() -> None:
    model = two_adapters()
    fused = loss_and_gradients(model, **batch())
    assert_same(fused, loss_and_gradients(unfuse(model), **batch()))
    fuse(model)
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(model(**batch()).loss.detach(), fused[0], rtol=1e-5, atol=1e-5)
    expected = smoothed(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(smoothed(other), expected)
    plain = model.merge_and_unload()
    torch.testing.assert_close(smoothed(plain), expected, rtol=1e-5, atol=1e-5)
    assert type(unfuse(plain).lm_head) is nn.Linear


@pytest.mark.kills(
    HEAD, "        _check_adapter_names(kwargs)\n        layer: Any = self", "        layer: Any = self"
)
@pytest.mark.parametrize("saved", [True, False], ids=["modules_to_save", "lora"])
def test_adapters_by_sample_on_the_head_are_refused(saved: bool) -> None:
    targets = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    options = LoraConfig(r=4, **(targets if saved else {"target_modules": ["lm_head"]}))
    model = get_peft_model(llama(), options).eval()
    with pytest.raises(UserError, match="another adapter for each sample"):
        model(**batch(), adapter_names=["default", "__base__", "default"])


def moe(**options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", **SMALL, num_local_experts=4, router_aux_loss_coef=0.3, **options
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.kills(PROBE, "        return 0.0\n    config", "        return 0.0\n    return 0.0\n    config")
@pytest.mark.parametrize("when", ["in the config", "in the call", "after fuse"])
def test_the_router_loss_of_a_mixture_of_experts(when: str) -> None:
    model = moe(output_router_logits=when == "in the config")
    fuse(model)
    plain = model(**batch()).loss
    if when == "after fuse":
        model.config.output_router_logits = True
    inputs = batch() | ({"output_router_logits": True} if when == "in the call" else {})
    fused = loss_and_gradients(model, **inputs)
    unfuse(model)
    assert_same(fused, loss_and_gradients(model, **inputs))
    assert when == "in the config" or not torch.isclose(plain, fused[0], rtol=1e-3)


@pytest.mark.kills(PROBE, "                    del module._forward_hooks[key]", "                    pass")
@pytest.mark.kills(PROBE, "vars(module).pop(_RECORDING, None)", "pass")
def test_a_mixture_of_experts_is_pickled_before_its_first_step() -> None:
    """transformers records router outputs by hooks that cannot be pickled; `fuse` removes its own."""
    model = fuse(moe(output_router_logits=True))
    other = pickle.loads(pickle.dumps(model))
    fused = loss_and_gradients(other, **batch())
    assert_same(fused, loss_and_gradients(model, **batch()))
    assert_same(fused, loss_and_gradients(unfuse(model), **batch()))


@pytest.mark.kills(PROBE, "return LossForm(scale, softcap, shifts)", "return LossForm(scale, softcap, True)")
def test_a_model_that_does_not_shift_its_labels() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bart", vocab_size=67, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    own = loss_and_gradients(model, **batch())
    assert_same(loss_and_gradients(fuse(model), **batch()), own)
    chosen = torch.zeros(3, 11)
    chosen[:, 5] = 1
    alone = torch.where(chosen == 1, batch()["labels"], -100)
    torch.testing.assert_close(
        model(**batch(), sample_weight=chosen).loss, model(batch()["input_ids"], labels=alone).loss
    )


@pytest.mark.kills(PROBE, "softcap = top if capped else None", "softcap = None")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cap_is_found_in_any_dtype(dtype: torch.dtype) -> None:
    """RecurrentGemma calls its cap `logits_soft_cap`, and no other model does."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "recurrent_gemma", **(SMALL | {"num_hidden_layers": 2}), logits_soft_cap=3.0, lru_width=32,
        block_types=["recurrent", "attention"], attention_window_size=16,
    )  # fmt: skip
    model = fuse(AutoModelForCausalLM.from_config(config).eval().to(dtype))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # the cap matters once logits have grown
    own = own_loss(model).item()
    bound = 4 * torch.finfo(dtype).eps * 3
    assert model(**batch()).loss.item() == pytest.approx(own, abs=bound)


def test_weights_that_are_not_in_memory() -> None:
    """Scale and cap are found with the body replaced; the shape of the loss is right on the meta device."""
    config = AutoConfig.for_model("gemma2", **SMALL, final_logit_softcapping=3.0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="weights are not in memory"):
        fuse(model)
    assert not isinstance(model, type(fuse(model_of("llama"))))
    fuse(model, verify=False)
    assert model._settings.form.softcap == pytest.approx(3.0)
    assert model._settings.form.shifts_labels


@pytest.mark.kills("ual/models/loss.py", "labels = self.targets.to(device)", "labels = self.targets")
def test_labels_on_another_device_than_the_head() -> None:
    """`device_map` puts hidden states and labels on different devices; the meta device stands for one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    fuse(model, verify=False)
    ids = batch()["input_ids"].to("meta")
    loss = model(ids, labels=batch()["labels"], label_smoothing=S, num_items_in_batch=torch.tensor(9)).loss
    assert loss.is_meta
    assert loss.shape == ()


def test_importing_fuse_needs_torch_transformers_and_peft_only() -> None:
    program = """
import sys, torch, transformers, peft
before = {name.split(".")[0] for name in sys.modules}
from ual.models import fuse
print(*sorted({name.split(".")[0] for name in sys.modules} - before))
"""
    assert in_a_fresh_process(program).split() == ["ual", "ual_kernels"]
