"""Backends that run Transformers models in this process."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ual.config.elicit import LocalConfig
from ual.config.run import ModelConfig
from ual.data import Collator, Renderer
from ual.errors import UserError
from ual.files import sha256
from ual.models import fuse
from ual.models.entailment import Entailment
from ual.models.generate import Prompt, generate
from ual.models.load import load_model, load_tokenizer
from ual.models.score import score
from ual.records import Message, Sample
from ual.uncertainty import protocol
from ual.uncertainty.backends.batching import BatchingBackend
from ual.uncertainty.budget import Budget
from ual.uncertainty.estimators.white_box import summary
from ual.uncertainty.protocol import Reply, Request, RequestError, Token

_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def identity(config: LocalConfig) -> dict[str, Any]:
    """Return what determines a local model's replies: the content of its files, precision and seed."""
    return {
        "local": _fingerprint(config.model),
        "dtype": config.model.dtype,
        "seed": config.seed,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
    }


def backend(config: LocalConfig, budget: Budget, *, trust_remote_code: bool = False) -> BatchingBackend:
    """Load the model that a configuration names.

    Raises:
        UserError: the model cannot be loaded, or the fused loss does not support it.
    """
    model = _LocalModel(config, trust_remote_code=trust_remote_code)
    return BatchingBackend(
        identity(config),
        frozenset({"generate", "score"}),
        model.answer,
        config.batch_size,
        budget,
        config.reasoning_tokens,
    )


def entailment(config: ModelConfig, budget: Budget, *, batch_size: int = 16) -> BatchingBackend:
    """Load the classifier of a configuration's `nli`."""
    classify = Entailment(config, device=_device(None))

    def answer(requests: Sequence[Request]) -> list[Reply | RequestError]:
        pairs = [(r.messages[0].content, r.messages[1].content) for r in requests]
        return [Reply("", scores=scores) for scores in classify(pairs)]

    return BatchingBackend(nli_identity(config), frozenset({"entail"}), answer, batch_size, budget)


def nli_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what determines a classifier's verdicts."""
    return {"nli": _fingerprint(config)}


def token_counter(config: LocalConfig) -> Callable[[Request], int]:
    """Return a function that counts the tokens of a request's prompt."""
    tokenizer: Any = load_tokenizer(config.model)
    renderer = Renderer(tokenizer, chat_template=config.chat_template)
    return lambda request: len(_prompt_ids(renderer, tokenizer, request.messages))


class _LocalModel:
    def __init__(self, config: LocalConfig, *, trust_remote_code: bool) -> None:
        self._config = config
        self._tokenizer: Any = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
        model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
        model.to(_device(config.device))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = min(config.max_length, context or config.max_length)
        self._renderer = Renderer(
            self._tokenizer,
            chat_template=config.chat_template,
            max_length=length,
            context_length=context,
            overlong="drop",
        )
        self._model: Any = fuse(model)
        self._collate = Collator(self._tokenizer.pad_token_id, average="weights")

    def answer(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        """Answer a batch of one kind."""
        try:
            if requests[0].task == "score":
                return self._score(requests)
            return self._generate(requests)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a batch of {len(requests)} does not fit into the device's memory",
                place="configuration, backend.batch_size",
                remedy="lower it and run the same command again; it resumes from the cache",
            ) from error

    def _generate(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        first = requests[0]
        room = self._renderer.max_length - first.max_tokens
        replies: list[Reply | RequestError] = []
        prompts: dict[int, Prompt] = {}  # by the place of the request
        for i, request in enumerate(requests):
            ids = _prompt_ids(self._renderer, self._tokenizer, request.messages)
            replies.append(
                RequestError(
                    f"the prompt has {len(ids)} tokens, {max(room, 0)} have room before the reply", own=True
                )
            )
            if len(ids) <= room:
                seed = int.from_bytes(protocol.key({"seed": self._config.seed}, request)[:7])
                prompts[i] = Prompt(ids, request.temperature, seed)
        if not prompts:
            return replies
        batch = list(prompts.values())
        made = generate(
            self._model, self._tokenizer, batch, max_tokens=first.max_tokens, top=first.top_logprobs
        )
        for i, prompt, generated in zip(prompts, batch, made, strict=True):
            replies[i] = Reply(
                generated.text,
                "stop" if generated.finished else "length",
                tuple(Token(t.text, t.log_prob, t.alternatives) for t in generated.tokens),
                len(prompt.input_ids),
                generated.length,
            )
        return replies

    def _score(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        limit = self._renderer.max_length
        replies: list[Reply | RequestError] = [
            RequestError(f"longer than {limit} tokens", own=True) for _ in requests
        ]
        samples: dict[str, dict[str, Any]] = {}
        for i, request in enumerate(requests):
            rendered = self._renderer.render(Sample(str(i), request.messages))
            if rendered is not None:
                replies[i] = Reply("")
                tokens = {"id": str(i), "input_ids": rendered.input_ids, "labels": rendered.labels}
                samples[str(i)] = tokens | {"label_smoothing": 0.0, "sample_weight": 1.0}
        batch = list(samples.values())
        for scores in score(self._model, batch, self._collate, batch_size=max(1, len(batch))):
            values = summary(scores) if len(scores.log_prob) else None
            length = len(samples[scores.sample_id]["input_ids"])
            replies[int(scores.sample_id)] = Reply("", scores=values, prompt_tokens=length)
        return replies


def _prompt_ids(renderer: Renderer, tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    text = renderer.render_prompt(Sample("", (*messages, Message("assistant", ""))))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", place="configuration, backend.device") from error


def _fingerprint(config: ModelConfig) -> Mapping[str, Any]:
    """Return the hash of a folder's content, or the name and revision of a hub model."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        return {"name": config.path, "revision": config.revision}
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(sha256(path)))
    return {"name": folder.name, "sha256": digest.hexdigest()}
