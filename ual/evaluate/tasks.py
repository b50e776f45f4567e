"""What a model answers to posed questions: the probabilities of options, or a worked answer's number.

Where the replies to a question differ at one token (`ual.data.decision`), the probabilities of that token
after the prompt are those of the options, from one forward pass. Other replies are scored by the sums of
their tokens' log-probabilities, end of turn included, one pass each. In both cases the probabilities are
renormalized over the options, and `mass` is their sum before. Sums favor short replies, so replies that
differ at one token are the better choice.
"""

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ual.data import Collator, Renderer
from ual.data.tasks import Wording
from ual.data.training_set import features
from ual.models.generate import Prompt, generate
from ual.models.score import score
from ual.records import Message, Sample


@dataclass(frozen=True, slots=True)
class Posed:
    """A wording of a question, under a key of its own."""

    key: str
    wording: Wording
    place: str = ""

    def sample(self, reply: str, *, options: Sequence[str] = ()) -> Sample:
        """Return the question with a reply."""
        turns = Message("user", self.wording.prompt), Message("assistant", reply)
        return Sample(
            self.key, turns, place=self.place, options=dict.fromkeys(options, 1 / max(1, len(options)))
        )


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answer to a posed question.

    `value` is the most probable option, or a normalized number; None if none could be parsed. `text` is the
    reply. `probabilities` are those of the options, renormalized; `mass` is their sum before. Both are empty
    and NaN for worked answers. `finished` is False for a worked answer that was cut at the limit of tokens.
    """

    key: str
    text: str
    value: str | None
    probabilities: dict[str, float]
    mass: float
    finished: bool = True


@torch.no_grad()
def choose(
    model: Any,
    renderer: Renderer,
    posed: Sequence[Posed],
    *,
    batch_size: int = 16,
    known: Container[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[list[Answered]]:
    """Yield the answers to questions with options, a batch at a time, short prompts first.

    Batches depend on `posed` and `batch_size` alone. A batch whose keys are all known is skipped, so a
    process that resumes computes the same numbers.

    Args:
        model: fused by `ual.models.fuse`, on any device; its mode (train or eval) is restored.
        renderer: with ``undecided="drop"``.
        posed: with distinct keys and at least two replies each.
        batch_size: questions of a forward pass.
        known: keys whose answers are there.
        advance: called with the number of questions done.

    Raises:
        UserError: as `Renderer.render`.
    """
    decided, spelled = [], []
    for question in posed:
        replies = list(question.wording.replies)
        rendered = renderer.render(question.sample(replies[0], options=replies))
        if rendered is None:
            spelled.append(question)
        else:
            decided.append((rendered.input_ids[: rendered.decision], rendered.option_ids, question))
    decided.sort(key=lambda entry: len(entry[0]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(decided), batch_size):
            batch = decided[start : start + batch_size]
            if any(question.key not in known for *_, question in batch):
                yield [
                    _answered(question, log_probs)
                    for (*_, question), log_probs in zip(
                        batch, _at_decision(model, renderer, batch), strict=True
                    )
                ]
            advance(len(batch))
        for start in range(0, len(spelled), batch_size):
            questions = spelled[start : start + batch_size]
            if any(question.key not in known for question in questions):
                yield [
                    _answered(question, _sums(model, renderer, question, batch_size))
                    for question in questions
                ]
            advance(len(questions))
    finally:
        model.train(was_training)


@torch.no_grad()
def work_out(
    model: Any,
    renderer: Renderer,
    posed: Sequence[Posed],
    *,
    read: Callable[[str], str | None],
    max_tokens: int,
    draws: Sequence[tuple[float, int]] | None = None,
    batch_size: int = 16,
    known: Container[str] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[list[Answered]]:
    """Yield worked answers to questions, a batch at a time.

    Args:
        model, renderer, posed, batch_size, known, advance: as in `choose`.
        read: returns the value of a reply; None if it has none.
        max_tokens: of a reply.
        draws: temperature and seed of each question's reply; None is greedy decoding.
    """
    tokenizer: Any = renderer.tokenizer
    prompts = []
    for i, question in enumerate(posed):
        text = renderer.render_prompt(question.sample(""))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append((Prompt(ids, *(draws[i] if draws else (0.0, 0))), question))
    prompts.sort(key=lambda entry: len(entry[0].input_ids))
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        if any(question.key not in known for _, question in batch):
            replies = generate(model, tokenizer, [prompt for prompt, _ in batch], max_tokens=max_tokens)
            yield [
                Answered(question.key, reply.text, read(reply.text), {}, float("nan"), reply.finished)
                for (_, question), reply in zip(batch, replies, strict=True)
            ]
        advance(len(batch))


def _at_decision(
    model: Any, renderer: Renderer, batch: Sequence[tuple[Any, Sequence[int], Posed]]
) -> list[list[float]]:
    """Return the options' log-probabilities at the token after each prompt."""
    longest = max(len(ids) for ids, *_ in batch)
    pad: Any = renderer.tokenizer.pad_token_id
    input_ids = torch.full((len(batch), longest), renderer.tokenizer.eos_token_id if pad is None else pad)
    mask = torch.zeros_like(input_ids)
    for i, (ids, *_) in enumerate(batch):
        input_ids[i, : len(ids)] = torch.from_numpy(ids).long()
        mask[i, : len(ids)] = 1
    last = [len(ids) - 1 for ids, *_ in batch]
    positions = sorted(set(last))
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    if _keeps_positions(model):
        inputs["logits_to_keep"] = torch.tensor(positions, device=model.device)
        logits = model(**inputs).logits
    else:
        logits = model(**inputs).logits[:, positions]
    found = []
    for i, (_, option_ids, _) in enumerate(batch):
        log_probs = logits[i, positions.index(last[i])].double().log_softmax(-1)
        found.append(log_probs[list(option_ids)].tolist())
    return found


def _keeps_positions(model: Any) -> bool:
    """Return whether the model computes logits at some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _sums(model: Any, renderer: Renderer, question: Posed, batch_size: int) -> list[float]:
    """Return the log-probability of each whole reply."""
    rendered = []
    for i, reply in enumerate(question.wording.replies):
        sample = renderer.render(question.sample(reply))
        assert sample is not None
        rendered.append(features(sample) | {"id": str(i)})
    pad: Any = renderer.tokenizer.pad_token_id
    collate = Collator(renderer.tokenizer.eos_token_id if pad is None else pad)
    scores = score(model, rendered, collate, batch_size=batch_size)
    by_id = {int(scored.sample_id): float(scored.log_prob.sum()) for scored in scores}
    return [by_id[i] for i in range(len(rendered))]


def _answered(question: Posed, log_probs: Sequence[float]) -> Answered:
    logs = torch.tensor(log_probs, dtype=torch.float64)
    by_option: dict[str, float] = {}
    for option, p in zip(question.wording.replies.values(), logs.softmax(-1).tolist(), strict=True):
        by_option[option] = by_option.get(option, 0.0) + p
    best = max(by_option, key=by_option.__getitem__)
    return Answered(question.key, question.wording.reply(best), best, by_option, float(logs.exp().sum()))
