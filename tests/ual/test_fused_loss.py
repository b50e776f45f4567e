"""`fuse`: the model's own loss and gradients, for every family and every kind of head."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from ual.errors import UserError
from ual.models import fuse, unfuse

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "olmo2": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
}


def model_of(family: str) -> Any:
    options = FAMILIES[family]
    size = (
        {k: SMALL[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")} if family == "gpt2" else SMALL
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(size | options)))
    with torch.no_grad():  # large enough weights that softcap and scale matter
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.ndim > 1 else p)
    return model.eval()


def batch(vocab: int = 67) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, vocab, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1] = -100
    return ids, labels


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: Any, expected: Any) -> None:
    """Two fp32 computations of one number differ by some tens of roundings, relative to the largest entry."""
    (loss, gradients), (own_loss, own_gradients) = actual, expected
    torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss(family: str) -> None:
    model = model_of(family)
    ids, labels = batch()
    own = loss_and_gradients(model, input_ids=ids, labels=labels)
    fuse(model)
    assert_same(loss_and_gradients(model, input_ids=ids, labels=labels), own)
    assert model(input_ids=ids, labels=labels).logits is None


def test_smoothing_and_weights_are_the_samples_own(stories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    ids, labels = batch(512)
    labels[1, 6:] = ids[1, 6:]
    logits = model(input_ids=ids).logits[:, :-1]
    smoothing, weight = torch.tensor([0.0, 0.1, 0.3]), torch.tensor([1.0, 0.5, 2.0])
    target = labels[:, 1:]
    log_p = logits.log_softmax(-1)
    token = -(1 - smoothing[:, None]) * log_p.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    token = token - smoothing[:, None] * log_p.mean(-1)
    scale = weight[:, None] * (target != -100)
    fuse(model)
    inputs = {"input_ids": ids, "labels": labels, "label_smoothing": smoothing, "sample_weight": weight}
    torch.testing.assert_close(model(**inputs).loss, (token * scale).sum() / scale.sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=7).loss, (token * scale).sum() / 7)


ADAPTERS = {
    "body": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("before", [True, False], ids=["fused, then wrapped", "wrapped, then fused"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str, before: bool) -> None:
    model = model_of("llama")
    options = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[adapter])
    ids, labels = batch()
    if before:
        fuse(model)
    wrapped = get_peft_model(model, options).eval()
    if not before:
        fuse(wrapped)
    fused = loss_and_gradients(wrapped, input_ids=ids, labels=labels)
    unfuse(wrapped)
    assert_same(fused, loss_and_gradients(wrapped, input_ids=ids, labels=labels))


def test_a_disabled_adapter_is_not_in_the_loss() -> None:
    model = fuse(model_of("llama"))
    ids, labels = batch()
    plain = model(input_ids=ids, labels=labels).loss
    wrapped = get_peft_model(
        model, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head"])
    ).eval()
    assert not torch.equal(wrapped(input_ids=ids, labels=labels).loss, plain)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids=ids, labels=labels).loss, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lora_dropout": 0.1}, "LoRA dropout 0.1"), ({"use_dora": True}, "other than plain LoRA")],
)
def test_heads_that_cannot_be_fused_are_refused(options: dict[str, Any], message: str) -> None:
    wrapped = get_peft_model(fuse(model_of("llama")), LoraConfig(r=4, target_modules=["lm_head"], **options))
    ids, labels = batch()
    with pytest.raises(UserError, match=message):
        wrapped.train()(input_ids=ids, labels=labels)


def test_no_logits_are_materialized(stories: Path) -> None:
    """Outside the loss operator, no tensor of a training step has one entry per token and class."""

    class Logits(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                self.seen += isinstance(t, torch.Tensor) and t.ndim >= 2 and t.shape[-1] == 512
            return out

    model = AutoModelForCausalLM.from_pretrained(stories)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    ids, labels = batch(512)
    with Logits() as own:
        model(input_ids=ids, labels=labels).loss.backward()
    fuse(model)
    with Logits() as fused:
        model(input_ids=ids, labels=labels).loss.backward()
    assert own.seen > 0
    assert fused.seen == 0


def test_statistics_describe_the_next_token(stories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories)
    ids, labels = batch(512)
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    statistics = fuse(model)(input_ids=ids, labels=labels, return_statistics=True).statistics
    mask = labels[:, 1:] != -100
    theirs = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(statistics.log_prob[:, :-1][mask], theirs[mask], rtol=1e-5, atol=1e-5)
    assert statistics.log_prob[:, :-1][~mask].isnan().all()
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    torch.testing.assert_close(statistics.entropy[:, :-1][mask], entropy[mask], rtol=1e-4, atol=1e-4)


def test_generation_and_logits_without_labels_are_unchanged(stories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    ids = torch.randint(3, 512, (1, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before, logits = model.generate(ids, **options), model(input_ids=ids).logits
    fuse(model)
    assert torch.equal(model.generate(ids, **options), before)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_gradient_checkpointing_and_autocast(stories: Path) -> None:
    model = fuse(AutoModelForCausalLM.from_pretrained(stories)).train()
    ids, labels = batch(512)
    plain = loss_and_gradients(model, input_ids=ids, labels=labels)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = loss_and_gradients(model, input_ids=ids, labels=labels)
    assert_same(checkpointed, plain)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, input_ids=ids, labels=labels)
    assert loss.dtype == torch.float32
    assert abs(loss - plain[0]) < 0.05 * plain[0]
    assert all(g.dtype == torch.float32 for g in gradients.values())


def test_the_signature_names_the_columns_that_trainers_must_keep() -> None:
    parameters = inspect.signature(fuse(model_of("llama")).forward).parameters
    assert {"input_ids", "attention_mask", "labels", "label_smoothing", "sample_weight"} <= set(parameters)
    assert next(iter(parameters)) == "input_ids"


def test_refusals() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="fused already"):
        fuse(fuse(model))
    with pytest.raises(UserError, match="got Linear"):
        fuse(torch.nn.Linear(2, 2))


def test_a_model_with_another_logit_transform_is_refused() -> None:
    model = model_of("gemma2")
    forward = model.forward

    def bent(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits + 0.5 * out.logits.softmax(-1)
        return out

    model.forward = bent
    with pytest.raises(UserError, match="cannot be fused"):
        fuse(model)


@pytest.mark.kills("ual/models/loss.py", 'if self.smoothing_over == "others":', "if False:")
def test_a_batch_says_over_which_classes_smoothing_spreads(stories: Path) -> None:
    model = fuse(AutoModelForCausalLM.from_pretrained(stories))
    ids, labels = batch()
    smoothing, vocab = torch.tensor([0.0, 0.1, 0.3]), model.get_output_embeddings().weight.shape[0]
    inputs = {"input_ids": ids, "labels": labels}
    others = model(**inputs, label_smoothing=smoothing, smoothing_over="others").loss
    converted = model(**inputs, label_smoothing=smoothing * vocab / (vocab - 1)).loss
    assert torch.equal(others, converted)
    assert not torch.equal(others, model(**inputs, label_smoothing=smoothing).loss)
    with pytest.raises(ValueError, match="smoothing_over"):
        model(**inputs, smoothing_over="nothing")
