"""Generate with a causal model: batched, left-padded, with its cache; a row's draws are its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue; `seed` and `temperature` (0 is greedy) say how."""

    input_ids: list[int]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token's text, its log-probability at temperature 1, and those of the likeliest ones."""

    text: str
    log_prob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Generated:
    """A continuation; `finished` by the model's own end, not by the length."""

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

    A row is sampled by adding Gumbel noise of its own generator to its logits (the largest sum is then a draw
    from their softmax), so that its draws do not depend on the rows beside it.

    Args:
        model: on any device, fused or not.
        tokenizer: pads on the left whatever its own side is.
        prompts: at least one.
        max_tokens: of each continuation, >= 1.
        top: how many of the likeliest tokens to report at each step; 0 reports no tokens.
    """
    longest = max(len(p.input_ids) for p in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = model.device
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[row, longest - len(prompt.input_ids) :] = 1
    draws = _Draws(prompts, top)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        output: Any = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([draws]),
        )
    finally:
        model.train(was_training)
    ends = _end_tokens(model, tokenizer)
    new = output[:, longest:].tolist()
    return [_read(row, draws, i, ends, tokenizer) for i, row in enumerate(new)]


class _Draws(LogitsProcessor):
    """Turns greedy decoding into sampling, and writes down the log-probabilities before it does."""

    def __init__(self, prompts: Sequence[Prompt], top: int) -> None:
        self._temperatures = torch.tensor([p.temperature for p in prompts])
        self._noise = [torch.Generator().manual_seed(p.seed % 2**63) for p in prompts]
        self._top = top
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        """Per step: log-probability of the chosen token [B], of the likeliest, and those, both [B, top]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        picked = scores.clone()
        for row, temperature in enumerate(self._temperatures.tolist()):
            if temperature > 0:
                uniform = torch.rand(scores.shape[-1], generator=self._noise[row]).clamp_(1e-20, 1 - 2**-24)
                picked[row] = scores[row] / temperature - uniform.log().neg().log().to(scores.device)
        if self._top:
            lse = scores.logsumexp(-1)
            values, tokens = scores.topk(min(self._top, scores.shape[-1]), dim=-1)
            chosen = picked.argmax(-1, keepdim=True)
            log_prob = scores.gather(-1, chosen)[:, 0] - lse
            self.steps.append((log_prob.cpu(), (values - lse[:, None]).cpu(), tokens.cpu()))
        return picked


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}


def _read(
    row: list[int], draws: _Draws, index: int, ends: set[int], tokenizer: PreTrainedTokenizerBase
) -> Generated:
    length = next((i for i, token in enumerate(row) if token in ends), None)
    finished = length is not None
    length = len(row) if length is None else length
    tokens = []
    for step in range(length if draws.steps else 0):
        log_prob, values, likeliest = draws.steps[step]
        pairs = zip(likeliest[index].tolist(), values[index].tolist(), strict=True)
        tokens.append(
            GeneratedToken(
                _text(tokenizer, [row[step]]),
                float(log_prob[index]),
                tuple((_text(tokenizer, [token]), value) for token, value in pairs),
            )
        )
    text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
    return Generated(text, finished, length + finished, tokens)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))
