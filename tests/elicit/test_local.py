"""A Transformers model in this process: its draws, its log-probabilities, its scores."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from ual.config.elicit import BudgetConfig, LocalConfig
from ual.config.run import ModelConfig
from ual.errors import UserError
from ual.models.generate import Prompt, generate
from ual.records import Message
from ual.uncertainty.backends import local
from ual.uncertainty.budget import Budget, Spent
from ual.uncertainty.protocol import Reply, Request, RequestError

PROMPTS = [[1, 403, 407], [1, 261, 400, 267, 300, 301, 302], [1], [1, 350, 266, 410, 290]]


@pytest.fixture(scope="module")
def loaded(stories: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)


@pytest.mark.kills(
    "ual/models/generate.py",
    "        mask[i, start:] = 1",
    "        mask[i] = 1",
)
def test_greedy_is_the_argmax_at_every_step_with_any_padding(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    made = generate(model, tokenizer, [Prompt(ids) for ids in PROMPTS], max_tokens=6, top=4)
    for ids, found in zip(PROMPTS, made, strict=True):
        ids = list(ids)
        for token in found.tokens:
            log_p = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = int(log_p.argmax())
            assert token.text == tokenizer.decode([best])
            assert token.log_prob == pytest.approx(log_p[best].item(), abs=1e-4)
            likeliest = log_p.topk(4)
            assert [p for _, p in token.alternatives] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
            ids.append(best)
        assert found.length == len(found.tokens) + found.finished


@pytest.mark.kills("ual/models/generate.py", "generator=self._noise[i]", "generator=self._noise[0]")
def test_draws_do_not_depend_on_the_other_prompts(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [Prompt(ids, 1.0, seed) for seed, ids in enumerate(PROMPTS)]
    together = generate(model, tokenizer, prompts, max_tokens=12)
    alone = [generate(model, tokenizer, [prompt], max_tokens=12)[0] for prompt in prompts]
    assert [g.text for g in together] == [g.text for g in alone]
    others = generate(
        model, tokenizer, [Prompt(p.input_ids, 1.0, p.seed + 9) for p in prompts], max_tokens=12
    )
    assert [g.text for g in others] != [g.text for g in alone]


@pytest.mark.kills(
    "ual/models/generate.py", "picked[i] = scores[i] / temperature -", "picked[i] = scores[i] -"
)
def test_draws_have_the_softmax_frequencies(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    n, temperature = 1500, 0.7
    ids = PROMPTS[0]
    drawn = generate(model, tokenizer, [Prompt(ids, temperature, seed) for seed in range(n)], max_tokens=1)
    p = (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
    for token in p.topk(3).indices.tolist():
        share = sum(g.text == tokenizer.decode([token], skip_special_tokens=True) for g in drawn) / n
        expected = p[token].item()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-3


def ask(config: LocalConfig, requests: Sequence[Request], budget: Budget | None = None) -> list[Any]:
    async def main() -> list[Any]:
        backend = local.backend(config, budget or Budget())
        try:
            return await asyncio.gather(*map(backend, requests), return_exceptions=True)
        finally:
            await backend.close()

    return asyncio.run(main())


def config(stories: Path, **options: Any) -> LocalConfig:
    values = {
        "kind": "local",
        "model": str(stories),
        "chat_template": "plain",
        "batch_size": 3,
        "max_length": 64,
    }
    return LocalConfig.model_validate(values | options)


def test_requests_are_batched_and_answered_in_order(stories: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    story = (Message("user", "Tell me a story"), Message("assistant", "Once upon a time"))
    asked = [Request((Message("user", f"{'word ' * i}?"),), max_tokens=4, temperature=1.0) for i in range(5)]
    asked += [Request(story, task="score"), Request((Message("user", "long " * 99),), max_tokens=4)]
    budget = Budget()
    replies = ask(config(stories), asked, budget)
    assert all(isinstance(reply, Reply) and reply.prompt_tokens for reply in replies[:6])
    assert isinstance(replies[6], RequestError)
    assert "have room before the reply" in str(replies[6])
    assert budget.spent.requests == 7
    assert budget.spent.completion_tokens == sum(reply.completion_tokens for reply in replies[:6])
    again = ask(config(stories, batch_size=1), asked[:5])
    assert [reply.text for reply in again] == [reply.text for reply in replies[:5]]
    other = ask(config(stories, seed=1), asked[:5])
    assert [reply.text for reply in other] != [reply.text for reply in again]

    scores = replies[5].scores
    text = "User: Tell me a story\nAssistant:"
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer(text + " Once upon a time", add_special_tokens=False).input_ids
    whole = [*whole, tokenizer.eos_token_id]
    whole = (
        [tokenizer.bos_token_id, *whole] if tokenizer("x").input_ids[0] == tokenizer.bos_token_id else whole
    )
    log_p = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    picked = log_p[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
    tokens = scores["tokens"]
    assert tokens in (len(whole) - len(prompt), len(whole) - len(prompt) - 1)
    assert scores["nll"] == pytest.approx(-picked[-tokens:].mean().item(), rel=1e-4)
    entropy = -(log_p.exp() * log_p).sum(-1)[-tokens:]
    assert scores["max_entropy"] == pytest.approx(entropy.max().item(), rel=1e-4)


def test_the_identity_is_the_content_of_the_model(stories: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / stories.name
    shutil.copytree(stories, copy)
    copy.chmod(0o755)
    assert local.identity(config(copy)) == local.identity(config(stories))
    (copy / "config.json").chmod(0o644)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert local.identity(config(copy)) != local.identity(config(stories))
    with pytest.raises(UserError, match="no such folder"):
        local.backend(config(tmp_path / "nowhere"), Budget())


def test_a_classifier_is_read_by_the_names_of_its_labels(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    names = ("contradiction", "ENTAILMENT", "neutral")
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = BertForSequenceClassification(shape).eval()
    model.save_pretrained(tmp_path)
    nli = ModelConfig(path=str(tmp_path))
    pair = (Message("user", "a b"), Message("user", "c"))

    async def main() -> list[Reply]:
        backend = local.entailment(nli, Budget())
        requests = [Request(pair, task="entail"), Request(pair[::-1], task="entail")]
        return list(await asyncio.gather(*map(backend, requests)))

    forward, backward = asyncio.run(main())
    inputs = BertTokenizerFast.from_pretrained(tmp_path)("a b", "c", return_tensors="pt")
    expected = model(**inputs).logits.softmax(-1)[0].tolist()
    assert forward.scores is not None
    assert [forward.scores[name.lower()] for name in names] == pytest.approx(expected, abs=1e-5)
    assert backward.scores != forward.scores
    shape.id2label = {0: "yes", 1: "no", 2: "maybe"}
    BertForSequenceClassification(shape).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="labels must be"):
        local.entailment(nli, Budget())


def test_a_budget_holds_for_a_local_model_too(stories: Path) -> None:
    budget = Budget(BudgetConfig(requests=2))
    requests = [Request((Message("user", "x"),), max_tokens=1, draw=i) for i in range(4)]
    results = ask(config(stories), requests, budget)
    assert sum(isinstance(result, Reply) for result in results) == budget.spent.requests == 2
    assert budget.spent != Spent()
