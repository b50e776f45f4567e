"""Batched generation with a causal model: left-padded, with a cache, one random generator per prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue, with the temperature (0: greedy decoding) and seed of their sampling."""

    input_ids: list[int]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token's text and log-probability at temperature 1, and those of the most likely tokens."""

    text: str
    log_prob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Generated:
    """A continuation. `finished`: it ends with an end token; `length`: tokens, the end token included."""

    text: str
    finished: bool
    length: int
    tokens: list[GeneratedToken] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    top: int = 0,
) -> list[Generated]:
    """Continue each prompt by at most `max_tokens` tokens.

    Gumbel noise is added to a prompt's logits; the largest sum is then a draw from their softmax. Each prompt
    has its own generator, so a draw does not depend on the other prompts of the batch.

    Args:
        model: on any device, fused or not; its mode (train or eval) is restored.
        tokenizer: its padding side is ignored.
        prompts: at least one.
        max_tokens: of each continuation, >= 1.
        top: number of most likely tokens to report at each step; 0 reports no tokens.
    """
    longest = max(len(p.input_ids) for p in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        ids[i, start:] = torch.tensor(prompt.input_ids)
        mask[i, start:] = 1
    sampler = _Sampler(prompts, top)
    ends = _end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with _plain_decoding(model, ends, pad):
            output: Any = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_tokens,
                use_cache=True,
                logits_processor=LogitsProcessorList([sampler]),
            )
    finally:
        model.train(was_training)
    new = output[:, longest:].tolist()
    return [_read(tokens, sampler, i, ends, tokenizer) for i, tokens in enumerate(new)]


@contextmanager
def _plain_decoding(model: Any, ends: set[int], pad: int) -> Iterator[None]:
    """Decode greedily, whatever generation_config.json asks for, such as a penalty of repetition."""
    plain = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad, do_sample=False, num_beams=1)  # type: ignore[no-untyped-call]
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    originals = [of.generation_config for of in models]
    for of in models:
        of.generation_config = plain
    try:
        yield
    finally:
        for of, original in zip(models, originals, strict=True):
            of.generation_config = original


class _Sampler(LogitsProcessor):
    """Turns greedy decoding into sampling, and records log-probabilities at temperature 1."""

    def __init__(self, prompts: Sequence[Prompt], top: int) -> None:
        self._temperatures = [p.temperature for p in prompts]
        self._noise = [torch.Generator().manual_seed(p.seed % 2**63) for p in prompts]
        self._top = top
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        """Per step: log-prob of the chosen token [B], of the most likely tokens [B, top], their ids."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        picked = scores.clone()
        for i, temperature in enumerate(self._temperatures):
            if temperature > 0:
                uniform = torch.rand(scores.shape[-1], generator=self._noise[i]).clamp_(1e-20, 1 - 2**-24)
                picked[i] = scores[i] / temperature - uniform.log().neg().log().to(scores.device)
        if self._top:
            lse = scores.logsumexp(-1)
            values, tokens = scores.topk(min(self._top, scores.shape[-1]), dim=-1)
            chosen = picked.argmax(-1, keepdim=True)
            log_prob = scores.gather(-1, chosen)[:, 0] - lse
            self.steps.append((log_prob.cpu(), (values - lse[:, None]).cpu(), tokens.cpu()))
        return picked


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}


def _read(
    ids: list[int], sampler: _Sampler, index: int, ends: set[int], tokenizer: PreTrainedTokenizerBase
) -> Generated:
    """Return the continuation of prompt `index`, cut at its first end token."""
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    finished = length < len(ids)
    tokens = []
    for token, (log_prob, values, likeliest) in zip(ids[:length], sampler.steps, strict=False):
        texts = (_text(tokenizer, t) for t in likeliest[index].tolist())
        alternatives = tuple(zip(texts, values[index].tolist(), strict=True))
        tokens.append(GeneratedToken(_text(tokenizer, token), float(log_prob[index]), alternatives))
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    return Generated(text, finished, length + finished, tokens)


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
